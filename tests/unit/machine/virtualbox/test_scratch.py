"""The writable disk's start: qcow2 as an image has it becomes the same disk as VDI."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmjob.errors import ImageCorrupt
from vmjob.machine.virtualbox.scratch import MAGIC, MAX_L1, make_scratch, read_clusters

MIB = 1 << 20
QEMU_IMG = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="there is no qemu-img")


def qcow2(path: Path, content: bytes, *, compressed: bool, options: str = "") -> Path:
    raw = path.with_suffix(".raw")
    raw.write_bytes(content)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2",
                    *(["-c"] if compressed else []), *(["-o", options] if options else []),
                    raw, path], check=True)
    return path


@pytest.fixture(scope="module")
def content() -> bytes:
    """Zeros, what can be packed, what cannot; up to the last byte."""
    made = bytearray(6 * MIB)
    made[65536 * 3:65536 * 5] = b"packed" * (65536 * 2 // 6) + b"ab"
    made[3 * MIB + 100:3 * MIB + 200100] = os.urandom(200_000)
    made[-1] = 1
    return bytes(made)


@QEMU_IMG
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("options", ["", "cluster_size=4k", "cluster_size=1M", "compat=0.10"])
def test_the_disk_begins_as_the_images_part(tmp_path: Path, content: bytes, compressed: bool,
                                            options: str) -> None:
    source = qcow2(tmp_path / "s", content, compressed=compressed, options=options)
    make_scratch(source, tmp_path / "d.vdi", 8 * MIB, uuid.uuid4())
    subprocess.run(["qemu-img", "convert", "-f", "vdi", "-O", "raw", tmp_path / "d.vdi",
                    tmp_path / "d"], check=True)
    assert (tmp_path / "d").read_bytes() == content + bytes(2 * MIB)


@QEMU_IMG
def test_what_lies_on_another_or_has_larger_clusters_is_refused(tmp_path: Path) -> None:
    base = qcow2(tmp_path / "base", bytes(MIB), compressed=False)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base,
                    tmp_path / "top"], check=True)
    large = qcow2(tmp_path / "large", bytes(MIB), compressed=False, options="cluster_size=2M")
    for path in (tmp_path / "top", large):
        with pytest.raises(ImageCorrupt):
            read_clusters(path.read_bytes())


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_a_disk_or_a_corrupt_image(data: bytes, marked: bool) -> None:
    read_or_corrupt((MAGIC if marked else b"") + data)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(bits=st.integers(0, 24), size=st.integers(0, 1 << 64 - 1), tables=st.integers(0, MAX_L1),
       entries=st.lists(st.integers(0, (1 << 64) - 1), max_size=64), tail=st.binary(max_size=300))
def test_any_tables_are_a_disk_or_a_corrupt_image(bits: int, size: int, tables: int,
                                                  entries: list[int], tail: bytes) -> None:
    head = struct.pack(">4sIQIIQIIQ", MAGIC, 3, 0, 0, bits, size & ((1 << 64) - 1), 0, tables, 48)
    body = b"".join(struct.pack(">Q", each % 2048 if each % 3 else each) for each in entries)
    read_or_corrupt(head + body + tail)


def read_or_corrupt(data: bytes) -> None:
    try:
        size, clusters = read_clusters(data)
    except ImageCorrupt:
        return
    assert all(0 <= at < size for at in clusters)


@pytest.mark.parametrize("size", [1 << 20, 1 << 40])
def test_a_disk_that_says_more_than_a_machine_has_is_corrupt(tmp_path: Path, size: int) -> None:
    """A cluster behind the end of the machine's disk has no place on it."""
    head = struct.pack(">4sIQIIQIIQ", MAGIC, 3, 0, 0, 16, 1 << 62, 0, 1024, 1 << 16)
    table = bytearray(8 * 1024)
    table[-8:] = struct.pack(">Q", 2 << 16)
    data = head.ljust(1 << 16, b"\0") + bytes(table).ljust(1 << 16, b"\0") + struct.pack(
        ">Q", 3 << 16).ljust(1 << 16, b"\0") + b"x" * (1 << 16)
    (tmp_path / "s").write_bytes(data)
    if size == 1 << 40:
        make_scratch(tmp_path / "s", tmp_path / "d", size, uuid.uuid4())
        return
    with pytest.raises(ImageCorrupt):
        make_scratch(tmp_path / "s", tmp_path / "d", size, uuid.uuid4())
