"""The clock that limits go by: it stands still while the machine does."""

from __future__ import annotations

import time

import anyio

__all__ = ["Pace", "RunClock"]


class RunClock:
    """Seconds that a job has run, over all processes of ours that carried it."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = None
        self._changed = anyio.Event()

    @property
    def seconds(self) -> float:
        """Run time so far. A computer's sleep does not count (`time.monotonic` stops)."""
        running = time.monotonic() - self._since if self._since is not None else 0.0
        return self._before + running

    def go(self) -> None:
        """The machine runs."""
        if self._since is None:
            self._since = time.monotonic()
            self._tell()

    def stop(self) -> None:
        """The machine stands still."""
        if self._since is not None:
            self._before, self._since = self.seconds, None
            self._tell()

    async def going(self) -> None:
        """Wait until the machine runs."""
        while self._since is None:
            await self._changed.wait()

    async def reach(self, seconds: float) -> None:
        """Wait until the clock shows that much."""
        while (left := seconds - self.seconds) > 0:
            changed = self._changed
            with anyio.move_on_after(left if self._since is not None else None):
                await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


class Pace:
    """How often something is done: every ``seconds`` of run time, or never (None).

    Whoever wants it done may change that at any time.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds
        self._changed = anyio.Event()

    @property
    def seconds(self) -> float | None:
        return self._seconds

    def change(self, seconds: float | None) -> None:
        """From now on, and for the wait that is under way."""
        if seconds != self._seconds:
            self._seconds = seconds
            self._changed.set()
            self._changed = anyio.Event()

    async def passed(self, clock: RunClock) -> None:
        """Wait until that much run time is over since now."""
        began = clock.seconds
        while True:
            changed, due = self._changed, None if self._seconds is None else began + self._seconds
            if due is not None and clock.seconds >= due:
                return
            async with anyio.create_task_group() as waiting:
                async def heard(changed: anyio.Event = changed) -> None:
                    await changed.wait()
                    waiting.cancel_scope.cancel()

                waiting.start_soon(heard)
                if due is not None:
                    await clock.reach(due)
                    waiting.cancel_scope.cancel()
