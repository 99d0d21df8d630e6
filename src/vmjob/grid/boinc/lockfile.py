"""One app at a time in a slot: the lock on ``boinc_lockfile``.

A client that is restarted after a crash starts the app again in the same slot and on the same
shared memory, while the first instance may still run. Both would take messages from each other. So
the lock comes before the channels are touched.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from vmjob.grid.boinc.errors import SlotTaken, SlotUnusable

__all__ = ["SlotLock"]

FILE = "boinc_lockfile"
#: Seconds to wait for another instance, as BOINC's library does: after 30 s without a heartbeat one
#: that uses the library has left.
WAIT = 35.0
#: Seconds between tries; a lock announces its release to nobody who has a deadline.
PERIOD = 0.1


class SlotLock:
    """Held from `take` to `release`, and no longer than this process lives.

    On POSIX: nobody else in this process may open and close the lock file, or the lock is lost.
    The file stays: were it removed, two others could each hold "the" lock. The client empties the
    slot.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._handle: int | None = None

    def take(self, wait: float = WAIT, hopeless: Callable[[], bool] = lambda: False) -> None:
        """Raises `SlotTaken` after ``wait`` seconds, or as soon as ``hopeless`` says so, which is
        asked meanwhile; `SlotUnusable` when no lock can be made here.
        """
        until = time.monotonic() + wait
        try:
            while (handle := _lock(self._path)) is None:
                if time.monotonic() >= until or hopeless():
                    raise SlotTaken(f"another process holds {self._path}")
                time.sleep(PERIOD)
        except OSError as error:
            raise SlotUnusable(f"cannot lock {self._path}: {error.strerror}") from error
        self._handle = handle

    def release(self) -> None:
        """Let the next one in; a second time is fine."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _unlock(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.release()


def _lock(path: Path) -> int | None:
    if sys.platform == "win32":
        from vmjob.grid.boinc import windows

        return windows.lock(path)
    from vmjob.grid.boinc import posix

    return posix.lock(path)


def _unlock(handle: int) -> None:
    if sys.platform == "win32":
        from vmjob.grid.boinc import windows

        windows.unlock(handle)
    else:
        os.close(handle)
