"""The clock that limits go by: it stands still while the machine does."""

from __future__ import annotations

import time

import anyio

__all__ = ["RunClock"]


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
