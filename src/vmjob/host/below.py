"""Files in a directory that a guest fills: names below it, and nothing else, whatever it holds."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Seen", "look", "occupied", "read", "remove"]


#: What the kernel counts a file's room in, bytes (stat(2)).
BLOCK = 512


@dataclass(frozen=True)
class Seen:
    """A regular file as it was at one look: it has changed when this has."""

    inode: int
    size: int
    mtime_ns: int


def look(root: Path, name: str) -> Seen | None:
    """The regular file ``name`` (a relative path) below ``root``; None when there is none."""
    fd = _opened(root, name)
    if fd is None:
        return None
    try:
        return _seen(fd)
    finally:
        os.close(fd)


def read(root: Path, name: str, limit: int) -> tuple[Seen, bytes] | None:
    """The same with its first ``limit`` bytes."""
    fd = _opened(root, name)
    if fd is None:
        return None
    try:
        seen = _seen(fd)
        if seen is None:
            return None
        with os.fdopen(fd, "rb", closefd=False) as file:
            return seen, file.read(limit)
    finally:
        os.close(fd)


def remove(root: Path, name: str) -> None:
    """Remove the file ``name`` below ``root``, if there is one."""
    found = _parent(root, name)
    if found is not None:
        directory, last = found
        try:
            os.unlink(last, dir_fd=directory)
        except OSError:
            pass
        finally:
            os.close(directory)


def occupied(root: Path, most: int) -> tuple[int, int]:
    """Bytes on the disk of all that is below ``root``, and how much that is; ends after ``most``.

    Whatever it is, and whoever may read it. What lies deeper than a path can name is not counted,
    and therefore more than ``most``.
    """
    size = count = 0
    waiting = [os.fspath(root)]
    while waiting and count <= most:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    count += 1
                    facts = entry.stat(follow_symlinks=False)
                    size += facts.st_blocks * BLOCK
                    if stat.S_ISDIR(facts.st_mode):
                        waiting.append(entry.path)
                    if count > most:
                        break
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return size, most + 1
            # Else it is gone, or closed to us.
    return size, count


def _opened(root: Path, name: str) -> int | None:
    """A descriptor of the file; None for any error."""
    found = _parent(root, name)
    if found is None:
        return None
    directory, last = found
    try:
        # What is not a file (a pipe, a device) must not keep us waiting.
        return os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                       dir_fd=directory)
    except OSError:
        return None
    finally:
        os.close(directory)


def _parent(root: Path, name: str) -> tuple[int, str] | None:
    """The directory that a file is in, each part entered without following a link, and its name."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        return None
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        at = os.open(root, flags)
    except OSError:
        return None
    for part in parts[:-1]:
        try:
            inner = os.open(part, flags | os.O_NOFOLLOW, dir_fd=at)
        except OSError:
            return None
        finally:
            os.close(at)
        at = inner
    return at, parts[-1]


def _seen(fd: int) -> Seen | None:
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        return None
    return Seen(facts.st_ino, facts.st_size, facts.st_mtime_ns)
