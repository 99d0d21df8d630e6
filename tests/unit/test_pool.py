"""Pools: ready before they are asked, used once, gone at the end."""

from __future__ import annotations

import anyio
import psutil
import pytest

import vmjob
from vmjob.errors import MachineStartFailed, UsageError, WrongState
from vmjob.home import Home
from vmjob.machine.fake import FakeDriver, Faults
from vmjob.pool import AsyncPool

pytestmark = pytest.mark.anyio


async def filled(pool: AsyncPool, count: int) -> None:
    with anyio.fail_after(30):
        while pool.ready < count:  # noqa: ASYNC110 - a pool announces it to nobody
            await anyio.sleep(0.01)


async def test_machines_are_ready_before_they_are_asked_for(home: Home) -> None:
    async with AsyncPool.create(2, driver=FakeDriver(), home=home.root, cold=True) as pool:
        await filled(pool, 2)
        async with pool.machine() as machine:
            assert (await machine.run(["echo", "hello"])).stdout == b"hello\n"
            await filled(pool, 2)
    assert list(home.machines.iterdir()) == []


async def test_no_machine_is_used_twice(home: Home) -> None:
    async with AsyncPool.create(1, driver=FakeDriver(), home=home.root, cold=True) as pool:
        for _ in range(3):
            async with pool.machine() as machine:
                assert await machine.ls() == []
                await machine.mkdir("used")
            with pytest.raises(UsageError):
                await machine.ls()


async def test_what_keeps_a_machine_from_starting_is_told_to_who_asks(home: Home) -> None:
    driver = FakeDriver(Faults(start="no"))
    async with AsyncPool.create(1, driver=driver, home=home.root, cold=True) as pool:
        for _ in range(2):
            with pytest.raises(MachineStartFailed):
                async with pool.machine():
                    pass


@pytest.mark.parametrize(("shape", "kind"), [
    ({"memory": 256}, TypeError), ({"network": "bogus"}, UsageError)])
async def test_a_shape_that_cannot_be_is_told_and_nobody_waits_for_ever(
        home: Home, shape: dict[str, object], kind: type[Exception]) -> None:
    async with AsyncPool.create(1, driver=FakeDriver(), home=home.root, **shape) as pool:
        with anyio.fail_after(30), pytest.raises(kind):
            async with pool.machine():
                pass


async def test_a_machine_that_died_while_it_waited_is_not_handed_out(home: Home) -> None:
    async with AsyncPool.create(1, driver=FakeDriver(), home=home.root, cold=True) as pool:
        await filled(pool, 1)
        for process in psutil.Process().children():
            process.kill()
            process.wait()
        with anyio.fail_after(30):
            while any(home.machines.iterdir()):  # noqa: ASYNC110 - it is announced to nobody
                await anyio.sleep(0.01)
        async with pool.machine() as machine:
            assert (await machine.run(["echo", "alive"])).stdout == b"alive\n"


async def test_a_closed_pool_gives_and_starts_nothing(home: Home) -> None:
    async with AsyncPool.create(1, driver=FakeDriver(), home=home.root, cold=True) as pool:
        await filled(pool, 1)
    with pytest.raises(WrongState):
        async with pool.machine():
            pass
    assert pool.ready == 0


async def test_a_pool_that_is_left_at_once_leaves_nothing(home: Home) -> None:
    async with AsyncPool.create(3, driver=FakeDriver(), home=home.root, cold=True):
        pass
    assert list(home.machines.iterdir()) == []


@pytest.mark.parametrize("size", [0, -1, 1001])
async def test_a_pool_has_a_size_that_can_be(size: int) -> None:
    with pytest.raises(UsageError):
        async with AsyncPool.create(size):
            pass


def test_the_synchronous_pool_does_the_same(home: Home) -> None:
    with vmjob.Pool.create(1, driver=FakeDriver(), home=home.root, cold=True) as pool:
        with pool.machine() as machine:
            assert machine.run(["echo", "hello"]).stdout == b"hello\n"
        assert 0 <= pool.ready <= 1
