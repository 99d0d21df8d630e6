"""When a job's checkpoints are made, and what of the job belongs to one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import anyio
import anyio.to_thread
from msgspec import structs

from vmjob.engine.clock import Pace, RunClock
from vmjob.engine.generations import Generation
from vmjob.engine.keeping import Kept, keep, turn
from vmjob.engine.life import Life, State
from vmjob.engine.output import Output
from vmjob.engine.progress import Progress
from vmjob.engine.slot import Slot, Streams
from vmjob.engine.work import Work
from vmjob.errors import CheckpointFailed, VmjobError
from vmjob.grid.contract import Grid
from vmjob.home import Home

__all__ = ["Checkpointer", "Subject", "Tasks"]

#: Seconds for output that the checkpoint contains to reach the slot.
OUTPUT_DEADLINE = 30.0


class Subject(Protocol):
    """What runs in the machine, as its checkpoints have to know it."""

    @property
    def running(self) -> bool:
        """Whether there is anything to keep."""
        ...

    def steady(self) -> AbstractAsyncContextManager[None]:
        """While the block runs, host and guest are of one mind about what runs."""
        ...

    def progress(self) -> Progress:
        """How far it is; called while the guest stands still."""
        ...

    async def settle(self, progress: Progress) -> None:
        """Return when what the host has of it is safe; raises `CheckpointFailed`."""
        ...


class Tasks:
    """A job's tasks, their output, and its folders."""

    def __init__(self, work: Work, output: Output, streams: Streams,
                 folders: Callable[[], dict[str, dict[str, Any]]] = dict) -> None:
        self._work = work
        self._output = output
        self._streams = streams
        self._folders = folders

    @property
    def running(self) -> bool:
        return self._work.running

    def steady(self) -> AbstractAsyncContextManager[None]:
        return self._work.steady

    def progress(self) -> Progress:
        return structs.replace(self._work.progress(), folders=self._folders())

    async def settle(self, progress: Progress) -> None:
        """Return when the output that the checkpoint contains is safe in the slot."""
        try:
            with anyio.fail_after(OUTPUT_DEADLINE):
                await self._output.reached(progress.position)
        except TimeoutError:
            raise CheckpointFailed("nobody takes the job's output") from None
        try:
            await anyio.to_thread.run_sync(self._streams.sync)
        except ValueError:  # they are closed
            raise CheckpointFailed("the job ended while it was being kept") from None


class Checkpointer:
    """Makes the checkpoints of one job; one at a time, and one at a time in a home."""

    def __init__(self, home: Home, slot: Slot, kept: Kept, subject: Subject, clock: RunClock,
                 life: Life, grid: Grid, disk_limit: int | None = None) -> None:
        self._home = home
        self._slot = slot
        self._kept = kept
        self._subject = subject
        self._clock = clock
        self._life = life
        self._grid = grid
        self._disk_limit = disk_limit
        self._told: str | None = None

    async def every(self, pace: Pace) -> None:
        """Make one at this pace of the job's run time, for ever.

        One that fails is told, and the next one is made as usual.
        """
        while True:
            await pace.passed(self._clock)
            try:
                await self.take()
            except (VmjobError, OSError) as error:
                self._warn(f"no checkpoint was made: {error}")

    async def take(self) -> Generation | None:
        """Make one now; None when no task runs, so that there is nothing to keep.

        That of a suspended job is made when it goes on. Raises `CheckpointFailed`, `HostDiskFull`;
        the job goes on, earlier checkpoints stay good.
        """
        while True:
            await self._clock.going()
            async with turn(self._home), self._subject.steady():
                if not self._subject.running:
                    return None
                if self._life.state is State.SUSPENDED:
                    continue  # since it was its turn
                with self._life.during(State.CHECKPOINT):
                    return await self._take()

    async def _take(self) -> Generation:
        noted: list[Progress] = []

        def progress() -> Progress:
            noted.append(self._subject.progress())
            return noted[0]

        async def settle() -> None:
            await self._subject.settle(noted[0])

        limit = self._disk_limit
        room = None if limit is None else limit - self._slot.disk_bytes()
        made = await keep(self._slot.generations, self._kept, progress, settle, room)
        self._grid.checkpoint(made.number, made.still_seconds, made.written_bytes)
        return made

    def _warn(self, text: str) -> None:
        if text != self._told:
            self._grid.warning(text)
        self._told = text
