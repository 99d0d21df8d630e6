"""What whoever started a job may do to it while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

import anyio

from vmjob.engine.life import Life, State
from vmjob.errors import VmjobError, WrongState

if TYPE_CHECKING:
    from vmjob.engine.checkpointing import Checkpointer
    from vmjob.engine.clock import RunClock
    from vmjob.engine.generations import Generation
    from vmjob.machine.contract import Machine

__all__ = ["Control"]


class Sleeper(Protocol):
    """What stands still: a `Session`, or a machine without an agent."""

    @property
    def machine(self) -> Machine: ...

    async def suspend(self) -> None: ...

    async def resume(self) -> None: ...


class Control:
    """Suspend, resume and keep one job; cut off its network.

    A wish to stand still, or to be without a network, that comes before the tasks run is obeyed
    when they begin; a job whose tasks have ended just ends.
    """

    def __init__(self) -> None:
        self._parts: tuple[Sleeper, RunClock, Life] | None = None
        self._still = False
        self._online = True
        self._checkpointer: Checkpointer | None = None
        self._turn = anyio.Lock()

    @contextlib.asynccontextmanager
    async def attached(self, session: Sleeper, clock: RunClock, life: Life,
                       checkpointer: Checkpointer | None) -> AsyncIterator[None]:
        """The job's tasks run while the block does; a machine that stands still then goes on."""
        self._parts, self._checkpointer = (session, clock, life), checkpointer
        try:
            with contextlib.suppress(WrongState):  # it is gone: its tasks tell it, and better
                await self.set_network(self._online)
                if self._still:
                    await self.suspend()
            yield
        finally:
            async with self._turn:
                self._parts = self._checkpointer = None
                if life.state is State.SUSPENDED:
                    with contextlib.suppress(VmjobError):  # it is gone: what ended it is the story
                        await self._go_on(session, clock, life)

    async def suspend(self) -> bool:
        """Stand still; true when the job does. Its clock stands still as well."""
        self._still = True
        async with self._turn:
            if self._parts is None:
                return False
            session, clock, life = self._parts
            try:
                await session.suspend()
            finally:  # it may stand all the same, a little later; only what stands can go on again
                clock.stop()
                life.enter(State.SUSPENDED)
            return True

    async def resume(self) -> None:
        """Go on after `suspend`."""
        self._still = False
        async with self._turn:
            if self._parts is None:
                return
            session, clock, life = self._parts
            if life.state is State.SUSPENDED:
                await self._go_on(session, clock, life)

    async def set_network(self, available: bool) -> None:
        """Let the job reach its network, if it has one, or not."""
        self._online = available
        if self._parts is not None:
            machine = self._parts[0].machine
            if machine.spec.network != "none":
                await machine.set_network(available)

    @property
    def pid(self) -> int | None:
        """The process that the job's machine is, while tasks run in it."""
        return self._parts[0].machine.pid if self._parts is not None else None

    @property
    def worn(self) -> bool:
        """Whether the job had better go on in a new machine, from its last checkpoint."""
        return self._parts is not None and self._parts[0].machine.worn

    @property
    def has_network(self) -> bool:
        """Whether the job's machine has a network, while tasks run in it."""
        return self._parts is not None and self._parts[0].machine.spec.network != "none"

    def traffic(self) -> tuple[int, int]:
        """Bytes that the job's machine has sent and received; 0 while no tasks run."""
        return self._parts[0].machine.traffic() if self._parts is not None else (0, 0)

    async def _go_on(self, session: Sleeper, clock: RunClock, life: Life) -> None:
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
