"""Locks that tell who holds them, without being taken to find out.

POSIX record locks: the kernel frees them when their holder dies, however it dies, no child inherits
them, and who asks (F_GETLK) disturbs nobody. Their trap: a process loses its lock when it closes
*any* descriptor of the file, so a holder must open the file once only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["held", "holder"]

#: ``struct flock`` of 64-bit Linux: type, whence, start, length, process.
FLOCK = struct.Struct("@hhqqi4x")
#: Seconds between tries; such a lock announces its release to nobody who has a deadline.
PERIOD = 0.02


@contextlib.contextmanager
def held(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock on a file (made when missing) until the block ends.

    Waits at most ``patience`` seconds: raises `BlockingIOError` then, and `FileNotFoundError` when
    the file was moved away while we waited.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= until:
                    raise BlockingIOError(f"{path} is locked") from None
                time.sleep(PERIOD)
        if not os.path.samestat(os.fstat(fd), path.stat()):
            raise FileNotFoundError(path)
        yield
    finally:
        os.close(fd)


def holder(path: Path) -> int | None:
    """The process that holds the lock on a file; None when none does. Not for its holder."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else pid
