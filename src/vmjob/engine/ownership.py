"""Who owns a machine's directory, and the sweep of what owners left behind.

An owner holds a lock on the directory's ``lock`` file; the kernel frees it when the
owner dies, however it dies, so a recycled process id can never be mistaken for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio

from vmjob.errors import HomeUnusable, HostDiskFull
from vmjob.home import Home, remove_tree

__all__ = ["OWNER", "Leftover", "claim", "held", "leftovers", "sweep"]

#: Seconds between looks at a lock that another process holds.
LOCK_PERIOD = 0.05
LOCK = "lock"
OWNER = "owner.json"
NEW = ".new-"
#: Seconds for which a directory without a lock file is taken to be one that is just being made.
NEWBORN = 60.0


@dataclass(frozen=True)
class Leftover:
    """A machine's directory whose owner is gone."""

    id: str
    directory: Path


@contextlib.contextmanager
def claim(home: Home) -> Iterator[tuple[str, Path]]:
    """A new machine's id and directory, ours until the block ends; then it is removed."""
    machines = home.machines
    name = os.urandom(6).hex()
    # Under another name until it is locked: a sweep takes an unlocked one for a dead owner's.
    newborn, directory = machines / f"{NEW}{name}", machines / name
    fd = -1
    try:
        newborn.mkdir(mode=0o700)
        fd = os.open(newborn / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        (newborn / OWNER).write_text(json.dumps(owner))
        newborn.rename(directory)
    except OSError as error:
        remove_tree(newborn)
        if fd >= 0:
            os.close(fd)
        raise (HostDiskFull if error.errno == 28 else HomeUnusable)(
            f"cannot make a machine's directory in {machines}: {error.strerror}") from error
    try:
        yield name, directory
    finally:
        try:
            remove_tree(directory)
        finally:
            os.close(fd)


@contextlib.asynccontextmanager
async def held(path: Path, deadline: float | None = None) -> AsyncIterator[None]:
    """Hold the lock ``path``, which others may hold for long; after ``deadline`` seconds, go ahead.

    Not by a thread that waits for it: as many as a pool has machines would take all threads there
    are, and one whose caller was cancelled would get the lock for nobody.
    """
    with path.open("a") as file:
        with anyio.move_on_after(deadline):
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await anyio.sleep(LOCK_PERIOD)
        yield


def leftovers(home: Home) -> Iterator[Leftover]:
    """Directories whose owner is gone; the lock of each is held while it is looked at."""
    for directory in sorted(home.machines.iterdir()):
        if directory.name.startswith(NEW):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - directory.stat().st_mtime > NEWBORN:
                    yield Leftover(directory.name, directory)
            continue
        try:
            fd = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except NotADirectoryError:
            continue
        except FileNotFoundError:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - directory.stat().st_mtime > NEWBORN:
                    yield Leftover(directory.name, directory)
            continue
        except OSError:
            continue  # another user's
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been removed, and so given up, between opening and locking.
            if (directory / LOCK).exists():
                yield Leftover(directory.name, directory)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(fd)


def sweep(home: Home) -> list[Leftover]:
    """Remove what dead owners left; a machine's process died with its owner."""
    found = []
    for leftover in leftovers(home):
        remove_tree(leftover.directory)
        found.append(leftover)
    return found
