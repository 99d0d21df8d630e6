"""What signals do to a job that a command of the shell carries."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

from vmjob.errors import VmjobError
from vmjob.host.standstill import stop_us

if TYPE_CHECKING:
    from vmjob.engine.control import Control

__all__ = ["MARGIN", "Signals", "farewell"]

#: Seconds after a deadline in which all must be cleared up; then the process ends as it is.
MARGIN = 5.0

Work = Callable[[], Coroutine[None, None, None]]


class Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGTSTP, for the job that the current task carries.

    ``slot``: where the job can be continued from, if anywhere. A last checkpoint may take
    ``stop_deadline`` seconds. What the disk does not finish by then is left unfinished, as by
    SIGKILL: the checkpoints before it are good, and our end ends the machine and frees the slot.
    """

    def __init__(self, control: Control, slot: Path | None, stop_deadline: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.caught: list[int] = []
        self._task = task
        self._control = control
        self._slot = slot
        self._deadline = stop_deadline if slot is not None else 0.0
        self._loop = asyncio.get_running_loop()
        self._work: set[asyncio.Task[None]] = set()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._end, number)
        self._loop.add_signal_handler(signal.SIGTSTP, self._begin, self._suspend)

    def _end(self, number: int) -> None:
        first = not self.caught
        self.caught.append(number)
        if first and number == signal.SIGTERM and self._deadline:
            self._end_by(self._deadline + MARGIN)
            self._begin(self._keep)
        else:
            self._end_by(MARGIN)
            self._task.cancel()

    def _end_by(self, seconds: float) -> None:
        """End the process by then, whatever its loop and its threads wait for."""
        if self._slot is not None:
            timer = threading.Timer(seconds, self._leave)
            timer.daemon = True
            timer.start()

    def _leave(self) -> None:
        if select.select([], [2], [], 0)[1]:
            with contextlib.suppress(OSError):
                os.write(2, f"{farewell(self._slot)} (not all was cleared up in time)\n".encode())
        os._exit(128 + self.caught[0])

    def _begin(self, work: Work) -> None:
        task = self._loop.create_task(work())
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _keep(self) -> None:
        try:
            with contextlib.suppress(VmjobError):  # the checkpoints before it stay good
                await self._control.checkpoint(self._deadline)
        finally:
            self._task.cancel()

    async def _suspend(self) -> None:
        """Stop as any program does at Ctrl-Z, the machine first."""
        with contextlib.suppress(VmjobError):
            await self._control.suspend()
        stop_us(self._loop)
        with contextlib.suppress(VmjobError):
            await self._control.resume()


def farewell(slot: Path | None) -> str:
    """How the job goes on."""
    return f"vmjob: stopped; continue with: vmjob run --resume {slot}"
