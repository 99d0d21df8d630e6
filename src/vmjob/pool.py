"""Machines that are ready before they are asked for.

    with vmjob.Pool.create(2, memory_mb=256) as pool:
        with pool.machine() as machine:
            machine.run(["true"])

Each is used once and then gone; another one takes its place meanwhile. A machine of a pool has
started already and done its first work, so a command takes what it takes in a running machine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from vmjob.api import AsyncMachine, Machine
from vmjob.errors import UsageError, WrongState

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

__all__ = ["AsyncPool", "Pool"]

#: Machines that one pool may hold: each costs its memory.
MOST = 1000


class _Ready:
    """A machine that waits to be taken, or the reason why there is none; made by its keeper."""

    def __init__(self, machine: AsyncMachine | None, error: Exception | None) -> None:
        self.machine = machine
        self.error = error
        self.over = asyncio.Event()
        keeper = asyncio.current_task()
        assert keeper is not None
        self.keeper = keeper


class AsyncPool:
    """Ready machines of one shape. Make one with `create`."""

    def __init__(self, size: int, shape: dict[str, Any]) -> None:
        if not 1 <= size <= MOST:
            raise UsageError(f"a pool has 1 to {MOST} machines, not {size}")
        self._shape = shape
        self._ready: asyncio.Queue[_Ready] = asyncio.Queue()
        self._keepers: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._closed = False

    @classmethod
    @contextlib.asynccontextmanager
    async def create(cls, size: int, **shape: Any) -> AsyncIterator[AsyncPool]:
        """A pool of ``size`` machines; all of them are gone when the block ends.

        ``shape`` as for `AsyncMachine.create`. Returns at once: the first machines are started
        while the caller goes on. Raises `UsageError`.
        """
        pool = cls(size, shape)
        for _ in range(size):
            pool._start_one()
        try:
            yield pool
        finally:
            pool._closed = True
            for keeper in pool._keepers:
                keeper.cancel()
            await asyncio.gather(*pool._keepers, return_exceptions=True)
            for _ in range(pool._waiting):
                pool._ready.put_nowait(_Ready(None, _closed()))

    @property
    def ready(self) -> int:
        """How many machines could be taken without waiting."""
        return 0 if self._closed else self._ready.qsize()

    @contextlib.asynccontextmanager
    async def machine(self) -> AsyncIterator[AsyncMachine]:
        """A machine that nobody has used; gone when the block ends.

        Waits until one is ready. Raises what kept it from starting; the next call tries anew.
        Raises `WrongState` once the pool's block has ended.
        """
        found = await self._take()
        if found.machine is None:
            assert found.error is not None
            raise found.error
        try:
            yield found.machine
        finally:
            found.over.set()
            await asyncio.wait([found.keeper])

    async def _take(self) -> _Ready:
        """The next one that is not over; another one is started in its place."""
        while True:
            if self._closed:
                raise _closed()
            self._waiting += 1
            try:
                found = await self._ready.get()
            finally:
                self._waiting -= 1
            if not self._closed:
                self._start_one()
            if found.machine is None or not found.keeper.done():
                return found

    def _start_one(self) -> None:
        keeper = asyncio.ensure_future(self._keep_one())
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)

    async def _keep_one(self) -> None:
        """Own one machine from its start to its end."""
        found = None
        try:
            async with AsyncMachine.create(**self._shape) as machine:
                await machine.run(["true"])  # what a first command does is done
                found = _Ready(machine, None)
                self._ready.put_nowait(found)
                await _first(found.over.wait(), machine.ended())
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits to be told
            if found is None:
                self._ready.put_nowait(_Ready(None, error))


def _closed() -> WrongState:
    return WrongState("the pool is closed: its block has ended")


async def _first(*events: Coroutine[Any, Any, Any]) -> None:
    """Wait for the first of several."""
    waiting = [asyncio.ensure_future(event) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


class Pool:
    """`AsyncPool` for code without asyncio; its machines may be used from any thread."""

    def __init__(self, portal: BlockingPortal, pool: AsyncPool) -> None:
        self._portal = portal
        self._pool = pool

    @classmethod
    @contextlib.contextmanager
    def create(cls, size: int, **shape: Any) -> Iterator[Pool]:
        """See `AsyncPool.create`."""
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal("asyncio") as portal:
            making = portal.call(lambda: AsyncPool.create(size, **shape))
            with portal.wrap_async_context_manager(making) as pool:
                yield cls(portal, pool)

    @property
    def ready(self) -> int:
        """How many machines could be taken without waiting."""
        return self._pool.ready

    @contextlib.contextmanager
    def machine(self) -> Iterator[Machine]:
        """See `AsyncPool.machine`."""
        with self._portal.wrap_async_context_manager(self._pool.machine()) as machine:
            yield Machine(self._portal, machine)
