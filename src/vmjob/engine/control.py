"""What whoever started a job may do to it while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import anyio

from vmjob.engine.life import Life, State

if TYPE_CHECKING:
    from vmjob.engine.checkpointing import Checkpointer
    from vmjob.engine.clock import RunClock
    from vmjob.engine.generations import Generation
    from vmjob.engine.session import Session

__all__ = ["Control"]


class Control:
    """Suspend, resume and keep one job. Before its tasks run, and after, these do nothing."""

    def __init__(self) -> None:
        self._parts: tuple[Session, RunClock, Life] | None = None
        self._checkpointer: Checkpointer | None = None
        self._turn = anyio.Lock()

    @contextlib.asynccontextmanager
    async def attached(self, session: Session, clock: RunClock, life: Life,
                       checkpointer: Checkpointer | None) -> AsyncIterator[None]:
        """The job's tasks run while the block does; a machine that stands still then goes on."""
        self._parts, self._checkpointer = (session, clock, life), checkpointer
        try:
            yield
        finally:
            async with self._turn:
                self._parts = self._checkpointer = None
                if life.state is State.SUSPENDED:
                    await self._go_on(session, clock, life)

    async def suspend(self) -> bool:
        """Stand still; true when the job does. Its clock stands still as well."""
        async with self._turn:
            if self._parts is None:
                return False
            session, clock, life = self._parts
            await session.suspend()
            clock.stop()
            life.enter(State.SUSPENDED)
            return True

    async def resume(self) -> None:
        """Go on after `suspend`."""
        async with self._turn:
            if self._parts is None:
                return
            session, clock, life = self._parts
            if life.state is State.SUSPENDED:
                await self._go_on(session, clock, life)

    async def _go_on(self, session: Session, clock: RunClock, life: Life) -> None:
        try:
            await session.machine.resume()  # when the checkpoint under way is finished
        finally:
            clock.go()
            life.enter(State.RUN)
        await session.resume()

    async def checkpoint(self, deadline: float) -> Generation | None:
        """Make a checkpoint within so many seconds; None when there was none to make, or no time.

        Giving up is safe: the checkpoints before it stay good. Raises what `Checkpointer.take`
        raises.
        """
        if self._checkpointer is None:
            return None
        with anyio.move_on_after(deadline):
            return await self._checkpointer.take()
        return None
