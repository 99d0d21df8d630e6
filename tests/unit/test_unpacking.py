"""Programs that come as an archive: whole or not at all, whatever the archive says."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmjob.errors import ArchiveDamaged, HomeUnusable, HostDiskFull
from vmjob.host import unpacking
from vmjob.host.unpacking import unpacked


def member(name: str, data: bytes = b"", mode: int = 0o644, **more: object,
           ) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), mode
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(plain.getvalue()))
    return path


GOOD = (member("bin", type=tarfile.DIRTYPE), member("bin/tool", b"#!/bin/sh\n", 0o755),
        member("share/text", b"hello", 0o600))


def below_of(tmp_path: Path) -> Path:
    return tmp_path / "programs"


def test_an_archive_is_unpacked_once_under_its_checksum(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", *GOOD)
    found = unpacked(archive, below_of(tmp_path))
    assert found.name == f"qemu-{hashlib.sha256(archive.read_bytes()).hexdigest()[:16]}"
    assert (found / "share" / "text").read_bytes() == b"hello"
    assert stat.S_IMODE((found / "bin" / "tool").stat().st_mode) == 0o755
    before = (found / "bin" / "tool").stat()
    assert unpacked(archive, below_of(tmp_path)) == found
    assert (found / "bin" / "tool").stat() == before


def test_an_archive_that_was_not_touched_is_not_read_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", *GOOD)
    found = unpacked(archive, below_of(tmp_path))
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert unpacked(archive, below_of(tmp_path)) == found


def test_another_archive_of_the_same_name_is_another_directory(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    first = unpacked(archive_of(archive, *GOOD), below_of(tmp_path))
    second = unpacked(archive_of(archive, member("other")), below_of(tmp_path))
    assert first != second
    assert (second / "other").exists()


@pytest.mark.parametrize("hostile", [
    member("../out"), member("a/../../out"), member("/out"),
    member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    member("link", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    member("device", type=tarfile.CHRTYPE), member("pipe", type=tarfile.FIFOTYPE),
], ids=["dots", "inner dots", "absolute", "symlink", "hard link", "device", "pipe"])
def test_a_member_that_leads_elsewhere_is_refused_and_nothing_stays(
        hostile: tuple[tarfile.TarInfo, bytes], tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", *GOOD, hostile)
    with pytest.raises(ArchiveDamaged):
        unpacked(archive, below_of(tmp_path))
    assert not (tmp_path / "out").exists()
    assert not [path for path in below_of(tmp_path).iterdir() if path.is_dir()]


def test_a_file_through_a_file_of_the_same_name_is_refused(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", member("x", b"1"), member("x", b"2"))
    with pytest.raises(ArchiveDamaged, match="twice"):
        unpacked(archive, below_of(tmp_path))


def test_a_small_archive_of_endless_zeros_is_refused_by_what_it_says(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "TOTAL", 8 << 20)
    archive = archive_of(tmp_path / "a.tar.gz", member("zeros", bytes(20 << 20)))
    with pytest.raises(ArchiveDamaged, match="more than 8 MiB"):
        unpacked(archive, below_of(tmp_path))


#: Ways to say in a header that a file has holes; its length is then what is said there.
SPARSE = [
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "big",
     "GNU.sparse.realsize": str(2 << 30)},
    {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2 << 30)},
    {"GNU.sparse.size": str(2 << 30), "GNU.sparse.numblocks": "0"},
]


def with_header(path: Path, headers: dict[str, str]) -> Path:
    info, data = member("big", b"0\n".ljust(512, b"\0"))
    info.pax_headers = headers
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(plain.getvalue()))
    return path


@pytest.fixture
def nothing_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill a disk."""
    def write(*_: object) -> None:
        raise AssertionError("it is written")

    monkeypatch.setattr(unpacking, "_write", write)


@pytest.mark.usefixtures("nothing_written")
@pytest.mark.parametrize("headers", SPARSE, ids=["1.0", "0.1", "0.0"])
def test_a_file_of_holes_is_refused(headers: dict[str, str], tmp_path: Path) -> None:
    """A few bytes in an archive would be as long on the disk as they say."""
    with pytest.raises(ArchiveDamaged, match="is sparse"):
        unpacked(with_header(tmp_path / "a.tar.gz", headers), below_of(tmp_path))


@pytest.mark.usefixtures("nothing_written")
def test_a_file_of_holes_in_gnus_old_form_is_refused(tmp_path: Path) -> None:
    info, data = member("big", type=tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % (2 << 30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(header) + bytes(10240)))
    with pytest.raises(ArchiveDamaged, match="is sparse"):
        unpacked(tmp_path / "a.tar.gz", below_of(tmp_path))


@pytest.mark.usefixtures("nothing_written")
def test_a_file_that_says_it_is_longer_than_all_may_be_is_not_begun(tmp_path: Path) -> None:
    archive = with_header(tmp_path / "a.tar.gz", {"GNU.sparse.realsize": str(2 << 30)})
    with pytest.raises(ArchiveDamaged, match="more than 512 MiB"):
        unpacked(archive, below_of(tmp_path))


def test_a_header_that_says_it_is_very_long_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    header = info.tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header + bytes(10240)))
    with pytest.raises(ArchiveDamaged, match="too long"):
        unpacked(tmp_path / "a.tar.gz", below_of(tmp_path))


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MEMBERS", 10)
    archive = archive_of(tmp_path / "a.tar.gz", *(member(f"f{n}") for n in range(11)))
    with pytest.raises(ArchiveDamaged, match="more than 10"):
        unpacked(archive, below_of(tmp_path))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.98])
def test_an_archive_that_was_cut_off_is_refused(keep: float, tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", *GOOD, member("more", os.urandom(100_000)))
    data = archive.read_bytes()
    archive.write_bytes(data[:int(len(data) * keep)])
    with pytest.raises(ArchiveDamaged):
        unpacked(archive, below_of(tmp_path))


def test_a_flipped_bit_is_noticed_wherever_it_changes_the_content(tmp_path: Path) -> None:
    noise = os.urandom(5_000)
    archive = archive_of(tmp_path / "a.tar.gz", *GOOD, member("more", noise))
    data = archive.read_bytes()
    refused = 0
    for at in range(10, len(data), 97):  # before it is a date
        archive.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])
        try:  # some bits of gzip's mean nothing
            assert (unpacked(archive, below_of(tmp_path)) / "more").read_bytes() == noise
        except ArchiveDamaged:
            refused += 1
    assert refused > 40


def test_no_archive_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(HomeUnusable):
        unpacked(tmp_path / "none", below_of(tmp_path))


def test_a_full_disk_is_said_and_leaves_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(unpacking.durable, "sync", full)
    with pytest.raises(HostDiskFull):
        unpacked(archive_of(tmp_path / "a.tar.gz", *GOOD), below_of(tmp_path))
    assert not [path for path in below_of(tmp_path).iterdir() if path.is_dir()]


def test_many_at_once_get_the_same_whole_directory(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", *GOOD, member("more", os.urandom(1 << 20)))
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: unpacked(archive, below_of(tmp_path)), range(8)))
    assert len(found) == 1
    assert (found.pop() / "more").stat().st_size == 1 << 20


#: Unpacks an archive, and is killed when it has written 500 members.
KILLED = """
import itertools, os, pathlib, signal, sys
from vmjob.host import unpacking

write, count = unpacking._write, itertools.count(1)

def killed(*arguments):
    write(*arguments)
    if next(count) == 500:
        os.kill(os.getpid(), signal.SIGKILL)

unpacking._write = killed
unpacking.unpacked(*map(pathlib.Path, sys.argv[1:]))
"""


def test_after_a_kill_in_the_middle_it_is_unpacked_anew(tmp_path: Path) -> None:
    files = [member(f"file{n}", os.urandom(10_000)) for n in range(1000)]
    archive = archive_of(tmp_path / "a.tar.gz", *files)
    below = below_of(tmp_path)
    process = subprocess.run([sys.executable, "-c", KILLED, str(archive), str(below)], timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(list(below.glob(".qemu-*/*"))) == 500
    assert not list(below.glob("qemu-*"))
    found = unpacked(archive, below)
    assert len(list(found.iterdir())) == 1000
    assert [path.name for path in below.iterdir() if path.is_dir()] == [found.name]
