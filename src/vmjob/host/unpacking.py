"""Programs that come as an archive: unpacked once, found again at once.

An archive is known by its checksum, so that another version lies beside it and a damaged one is
never taken for it. What is in a directory whose name has no dot in front is whole: it is written
under another name, synced, and renamed. Of two processes that want it at once, one waits.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from vmjob.errors import ArchiveDamaged, HomeUnusable, HostDiskFull
from vmjob.home import locked, remove_tree
from vmjob.host import durable
from vmjob.host.seal import read_seal, seal_of, write_seal

__all__ = ["unpacked", "MEMBERS", "TOTAL"]

#: Bytes that an archive may hold, unpacked: QEMU with its libraries takes 60 MiB.
TOTAL = 512 << 20
#: Members that it may have: QEMU's has 300.
MEMBERS = 5000
#: Bytes that are read at once. tarfile reads more only when a header says that it is itself longer.
PIECE = 1 << 20


def unpacked(archive: Path, below: Path, *, name: str = "qemu") -> Path:
    """The directory with the content of a tar.gz, ``below/NAME-<its SHA-256, 16 digits>``.

    Unpacks it when it is not there: regular files and directories only, of bounded number and
    size. The checksum is kept as long as nobody touches the archive, so that later calls take
    0.1 ms. Raises `ArchiveDamaged`, `HostDiskFull`, `HomeUnusable`.
    """
    try:
        below.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = below / f"{name}-{_checksum(archive, below)[:16]}"
        if not target.is_dir():
            with locked(below / ".unpacking", wait=True, what=str(below)):
                if not target.is_dir():
                    _unpack(archive, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HostDiskFull(f"there is no room to unpack {archive} in {below}") from error
        raise HomeUnusable(f"cannot unpack {archive} in {below}: "
                           f"{error.strerror or error}") from error
    return target


def _checksum(archive: Path, below: Path) -> str:
    """SHA-256 of the archive; the one found before while its file is as it was then."""
    cache = below / f"{archive.name}.checksum.json"
    seal = seal_of([(archive, "")])
    known = read_seal(cache)
    if isinstance(known, dict) and known.get("of") == seal and isinstance(known.get("is"), str):
        return str(known["is"])
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    write_seal(cache, {"of": seal, "is": found})
    return found


def _unpack(archive: Path, target: Path) -> None:
    """Make the whole directory, or nothing of it that has its name; called under the lock."""
    draft = target.with_name(f".{target.name}")
    remove_tree(draft)  # of a process that was killed
    try:
        draft.mkdir(mode=0o700)
        try:
            _fill(draft, archive)
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
            raise ArchiveDamaged(f"{archive} is damaged: {error}") from error
        for path in sorted(draft.rglob("*"), reverse=True):
            durable.sync(path)
        durable.sync(draft)
        draft.rename(target)
        durable.sync(target.parent)
    finally:
        remove_tree(draft)


def _write(path: Path, member: tarfile.TarInfo, content: IO[bytes] | None) -> None:
    """One member, readable by all; of its mode only whether it may be run is kept."""
    if content is None:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    mode = 0o755 if member.mode & 0o100 else 0o644
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        while piece := content.read(PIECE):
            file.write(piece)


def _fill(draft: Path, archive: Path) -> None:
    """Write the archive's files and directories; raises `ValueError` for what none of ours has."""
    names: set[PurePosixPath] = set()
    total = 0
    with (gzip.open(archive) as content,
          tarfile.open(fileobj=_Bounded(content), mode="r:") as tar):  # type: ignore[call-overload]
        for member in tar:
            path = PurePosixPath(member.name)
            if not (member.isreg() or member.isdir()):
                raise ValueError(f"{member.name!r} is neither file nor directory")
            # The holes of a sparse file are in no archive: they would be written all the same.
            if member.issparse():
                raise ValueError(f"{member.name!r} is sparse")
            total += member.size if member.isreg() else 0
            _fits(total)
            if path.is_absolute() or ".." in path.parts or "\0" in member.name:
                raise ValueError(f"{member.name!r} leads out of its directory")
            if path in names:
                raise ValueError(f"{member.name!r} is there twice")
            names.add(path)
            if len(names) > MEMBERS:
                raise ValueError(f"it has more than {MEMBERS} members")
            _write(draft / path, member, tar.extractfile(member) if member.isreg() else None)
        # tarfile stops at the end mark; only at the end of the file gzip compares its checksum.
        while content.read(PIECE):
            pass


class _Bounded:
    """What tarfile reads from: no more in all, and at once, than an honest archive needs."""

    def __init__(self, content: gzip.GzipFile) -> None:
        self._content = content

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= PIECE:
            raise ValueError("a header is too long")
        _fits(self._content.tell() + size)
        return self._content.read(size)

    def seek(self, position: int) -> int:
        _fits(position)
        return self._content.seek(position)

    def tell(self) -> int:
        return self._content.tell()


def _fits(position: int) -> None:
    # The end mark and the padding of a record lie behind the content.
    if position > TOTAL + PIECE:
        raise ValueError(f"it holds more than {TOTAL >> 20} MiB")
