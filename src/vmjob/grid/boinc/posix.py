"""What differs from Windows: shared memory in a file, record locks, who the parent is.

macOS takes this way too and was NEVER RUN there. By reading: the file, the lock and the parent are
the same; only a file's bytes are not safe after fsync, which `files` knows.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

from vmjob.grid.boinc.errors import ChannelsUnusable

__all__ = ["exists", "lock", "open_memory"]


def open_memory(path: Path, length: int) -> mmap.mmap:
    """The first ``length`` bytes of the client's file; raises `ChannelsUnusable`.

    Whoever may write the file could still make it shorter, and a touch would end this process
    (SIGBUS). That takes the client's own rights; the client never does.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise ChannelsUnusable(f"cannot open {path}: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ChannelsUnusable(f"{path} is not a regular file")
        if found.st_size < length:
            raise ChannelsUnusable(f"{path} has {found.st_size} bytes, not {length}")
        return mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise ChannelsUnusable(f"cannot map {path}: {error.strerror}") from None
    finally:
        os.close(fd)


def lock(path: Path) -> int | None:
    """Lock a whole file (made when missing) against other processes; None when one has it.

    The lock lasts until the returned descriptor, *or any other one of this file in this process*,
    is closed. Children do not inherit it. Raises `OSError`.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            return None
        raise
    return fd


def exists(pid: int) -> bool:
    """Whether there is a process of that number, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it is another user's
    return True
