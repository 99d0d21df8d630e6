"""The CD that starts an image's kernel."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import pycdlib
import pytest

from vmjob.errors import HostDiskFull, ImageCorrupt
from vmjob.image.iso import LOADER, MAX_LOADER, MODULE, write_iso

SECTOR = 2048


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path, Path]:
    loader, kernel, initrd = tmp_path / "loader", tmp_path / "kernel", tmp_path / "initrd"
    archive(loader)
    kernel.write_bytes(os.urandom(10_001))
    initrd.write_bytes(os.urandom(20_002))
    return loader, kernel, initrd


def archive(path: Path, **change: bytes | None) -> None:
    content = {LOADER: b"\xfa" * 4000, MODULE: b"module", **change}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in content.items():
            if data is not None:
                file.writestr(name, data)


def read(iso: Path) -> dict[str, bytes]:
    opened, found = pycdlib.PyCdlib(), {}
    opened.open(str(iso))
    for name in ("ISOLINUX.BIN", "LDLINUX.C32", "ISOLINUX.CFG", "KERNEL.", "INITRD."):
        content = io.BytesIO()
        opened.get_file_from_iso_fp(content, iso_path=f"/{name};1")
        found[name] = content.getvalue()
    opened.close()
    return found


def test_the_cd_holds_the_kernel_and_starts_it_with_its_arguments(
        tmp_path: Path, parts: tuple[Path, Path, Path]) -> None:
    loader, kernel, initrd = parts
    write_iso(tmp_path / "cd", loader, kernel, initrd, "quiet one=two")
    found = read(tmp_path / "cd")
    assert found["KERNEL."] == kernel.read_bytes()
    assert found["INITRD."] == initrd.read_bytes()
    assert b"\n APPEND quiet one=two\n" in found["ISOLINUX.CFG"]
    assert b"TIMEOUT 0\n" in found["ISOLINUX.CFG"]
    content = (tmp_path / "cd").read_bytes()
    assert b"EL TORITO" in content[17 * SECTOR:18 * SECTOR]
    catalog, = struct.unpack_from("<I", content, 17 * SECTOR + 0x47)
    bootable, *_, = struct.unpack_from("<BBHBBH", content, catalog * SECTOR + 32)
    assert bootable == 0x88


@pytest.mark.parametrize("change", [{LOADER: None}, {MODULE: None},
                                    {MODULE: bytes(MAX_LOADER + 1)}])
def test_a_loader_that_is_not_whole_or_too_large_is_corrupt(
        tmp_path: Path, parts: tuple[Path, Path, Path], change: dict[str, bytes | None]) -> None:
    loader, kernel, initrd = parts
    archive(loader, **change)
    with pytest.raises(ImageCorrupt):
        write_iso(tmp_path / "cd", loader, kernel, initrd, "")


def test_a_loader_that_is_no_archive_is_corrupt(tmp_path: Path,
                                                parts: tuple[Path, Path, Path]) -> None:
    loader, kernel, initrd = parts
    whole = loader.read_bytes()
    for content in (b"", b"PK", whole[:-10], whole[:100] + b"\xff" * 50 + whole[150:]):
        loader.write_bytes(content)
        with pytest.raises(ImageCorrupt):
            write_iso(tmp_path / "cd", loader, kernel, initrd, "")


def test_where_no_cd_can_be_written_that_is_told(tmp_path: Path,
                                                 parts: tuple[Path, Path, Path]) -> None:
    with pytest.raises(HostDiskFull):
        write_iso(tmp_path / "nowhere" / "cd", *parts, "")
