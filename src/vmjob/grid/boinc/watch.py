"""Is the client still there?

Heartbeats do not tell: while it leaves, the client sends none for up to a minute, and still waits
for its apps. Its process does.
"""

from __future__ import annotations

import os
import sys
import time

__all__ = ["ClientWatch"]

#: Seconds between looks at a client that is not our parent, as in BOINC's own library.
PERIOD = 10.0


class ClientWatch:
    """Watches a process; 0, a client that did not tell its number, is never gone."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        # Windows keeps the number of a parent that has ended.
        self._is_parent = pid > 0 and sys.platform != "win32" and os.getppid() == pid
        self._next = 0.0

    def gone(self) -> bool:
        """For the first time at once, later within 0.1 s of a parent's end, 10 s of another's."""
        if self._is_parent:
            return os.getppid() != self._pid
        now = time.monotonic()
        if self._pid <= 0 or now < self._next:
            return False
        self._next = now + PERIOD
        return not _exists(self._pid)


def _exists(pid: int) -> bool:
    if sys.platform == "win32":
        from vmjob.grid.boinc import windows

        return windows.exists(pid)
    from vmjob.grid.boinc import posix

    return posix.exists(pid)
