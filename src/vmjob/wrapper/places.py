"""How many machines run at once on a computer, whichever project they work for.

A place is a locked file; the kernel frees the lock when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from vmjob.errors import Busy, HomeUnusable

__all__ = ["taken"]


@contextlib.contextmanager
def taken(directory: Path, count: int) -> Iterator[int]:
    """Take one of ``count`` places; its number, from 0. Raises `Busy` when there is none."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise HomeUnusable(f"cannot make {directory}: {error.strerror}") from None
    for number in range(count):
        try:
            fd = os.open(directory / f"place-{number}",
                         os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HomeUnusable(f"cannot write in {directory}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield number
            return
        finally:
            os.close(fd)
    machines = "machine runs" if count == 1 else "machines run"
    raise Busy(f"{count} virtual {machines} on this computer, and no more are to",
               advice="It starts by itself when one of them has ended.")
