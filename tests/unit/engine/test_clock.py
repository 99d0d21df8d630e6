"""Limits go by a clock that stands still while the machine does."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from vmjob.engine import clock as clocks
from vmjob.engine.clock import RunClock

pytestmark = pytest.mark.anyio


class Time:
    """A monotonic clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(clocks.time, "monotonic", lambda: self.now)


def test_only_run_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    clock = RunClock(5.0)
    time.now += 10
    assert clock.seconds == 5
    clock.go()
    time.now += 2
    clock.stop()
    time.now += 50
    clock.stop()
    assert clock.seconds == 7
    clock.go()
    time.now += 1
    clock.go()
    assert clock.seconds == 8


async def test_a_limit_is_not_reached_while_the_machine_stands_still() -> None:
    clock = RunClock()
    with anyio.move_on_after(0.05) as waited:
        await clock.reach(0.01)
    assert waited.cancelled_caught
    clock.go()
    await clock.reach(0.01)
    assert clock.seconds >= 0.01


async def test_a_limit_that_is_being_waited_for_moves_with_the_clock() -> None:
    clock = RunClock()
    clock.go()
    reached = anyio.Event()

    async def wait() -> None:
        await clock.reach(0.2)
        reached.set()

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        clock.stop()
        with anyio.move_on_after(0.4):
            await reached.wait()
        assert not reached.is_set()
        clock.go()
        with anyio.fail_after(10):
            await reached.wait()
