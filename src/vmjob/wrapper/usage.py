"""What a job costs this computer: ourselves, the hypervisor, and whatever either has started."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

import psutil

__all__ = ["Usage", "Used"]

#: Seconds between looks for new processes: that reads a file of every process of the computer.
LOOK_PERIOD = 10.0


@dataclass(frozen=True)
class Used:
    """Seconds of processor time since the measuring began, and bytes of memory now."""

    cpu_seconds: float
    memory_bytes: int


class Usage:
    """Measures this process and all below it; what has ended counts as long as we waited for it."""

    def __init__(self) -> None:
        self._below: dict[int, psutil.Process] = {}
        self._looked = -LOOK_PERIOD
        self._most = 0.0

    def measure(self) -> Used:
        """Never less processor time than before: a process that just ended is counted once."""
        now = time.monotonic()
        if now - self._looked >= LOOK_PERIOD or not self._below:
            self._looked = now
            self._below = {each.pid: each for each in psutil.Process().children(recursive=True)}
        spent = os.times()
        total = spent.user + spent.system + spent.children_user + spent.children_system
        memory = psutil.Process().memory_info().rss
        for pid, process in list(self._below.items()):
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    memory += process.memory_info().rss
            except psutil.Error:
                del self._below[pid]
                continue
            total += times.user + times.system
            with contextlib.suppress(AttributeError):  # not on every system
                total += times.children_user + times.children_system
        self._most = max(self._most, total)
        return Used(self._most, memory)
