"""Who suspends a job, and lets it go on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from vmjob.engine import session as session_module
from vmjob.engine.clock import Pace, RunClock
from vmjob.engine.control import Control
from vmjob.engine.life import Life, State
from vmjob.engine.record import Record
from vmjob.engine.session import Session
from vmjob.errors import AgentLost, MachineDied, MachineError, WrongState
from vmjob.grid.contract import Quiet
from vmjob.machine.contract import Ended, EndReason

pytestmark = pytest.mark.anyio


class Machine:
    """Goes on when it may."""

    def __init__(self, network: str = "none") -> None:
        self.spec = SimpleNamespace(network=network)
        self.pid = 42
        self.did: list[str] = []
        self.may = asyncio.Event()
        self.asked = asyncio.Event()

    async def suspend(self) -> None:
        self.did.append("suspend")

    async def set_network(self, available: bool) -> None:
        self.did.append("plug" if available else "pull")

    async def resume(self) -> None:
        self.asked.set()
        await self.may.wait()


class Client:
    """Takes so many seconds to hear what time it is."""

    def __init__(self, *late: float) -> None:
        self._late = list(late)
        self.told = 0

    def stand_still(self) -> None: ...

    def go_on(self) -> None: ...

    async def set_clock(self) -> None:
        self.told += 1
        await anyio.sleep(self._late.pop(0) if self._late else 0)


def session_of(machine: Any, client: Any) -> Session:
    return Session(machine, client, SimpleNamespace(), 0.0, "fake")  # type: ignore[arg-type]


async def test_no_run_time_is_counted_until_the_machine_runs() -> None:
    """It waits for a checkpoint to be finished: that may take seconds."""
    machine, clock, control = Machine(), RunClock(), Control()
    life = Life(Record(), Quiet())
    life.state = State.RUN
    clock.go()
    async with control.attached(session_of(machine, Client()), clock, life, None):
        await control.suspend()
        going = asyncio.ensure_future(control.resume())
        await machine.asked.wait()
        before = clock.seconds
        await anyio.sleep(0.05)  # this is what the test is about
        after, state = clock.seconds, life.state
        machine.may.set()
        await going
        assert (after, state) == (before, State.SUSPENDED)
        assert life.state is State.RUN
        await clock.reach(before + 0.001)


async def test_a_wish_that_came_too_early_is_obeyed_when_the_tasks_begin() -> None:
    machine, control, life = Machine("nat"), Control(), Life(Record(), Quiet())
    life.state = State.RUN
    machine.may.set()
    assert not await control.suspend()
    await control.set_network(False)
    async with control.attached(session_of(machine, Client()), RunClock(), life, None):
        assert machine.did == ["pull", "suspend"]
        assert life.state is State.SUSPENDED
        await control.resume()
        assert control.pid == 42
    assert not await control.suspend()
    await control.resume()
    async with control.attached(session_of(machine, Client()), RunClock(), life, None):
        assert machine.did == ["pull", "suspend", "pull"]
        assert life.state is State.RUN


async def test_a_machine_that_ended_while_it_stood_still_does_not_hide_what_ended_it() -> None:
    machine, control, life = Machine(), Control(), Life(Record(), Quiet())
    life.state = State.RUN

    async def gone() -> None:
        raise WrongState("the machine is stopped, not running")

    async def carried() -> None:
        async with control.attached(session_of(machine, Client()), RunClock(), life, None):
            await control.suspend()
            raise AgentLost("the lane is broken")

    machine.resume = gone  # type: ignore[method-assign]
    with pytest.raises(AgentLost):
        await carried()
    assert life.state is State.RUN


async def test_what_is_asked_of_a_machine_that_has_ended_tells_how_it_ended() -> None:
    machine: Any = Machine()

    async def ended() -> Ended:
        return Ended(EndReason.KILLED, "somebody killed it")

    machine.ended, machine.console = ended, str
    with pytest.raises(MachineDied, match="somebody killed it"):
        async with session_of(machine, Client()).explaining():
            raise WrongState("the machine is stopped, not running")


async def test_a_pace_that_changes_counts_for_the_wait_under_way() -> None:
    clock, pace = RunClock(), Pace()
    clock.go()
    waiting = asyncio.ensure_future(pace.passed(clock))
    await asyncio.sleep(0)
    pace.change(3600)
    await asyncio.sleep(0)
    assert not waiting.done()
    pace.change(0.001)
    with anyio.fail_after(10):
        await waiting


@pytest.mark.parametrize(("late", "told"), [((), 1), ((1, 1), 3), ((1,) * 9, 5)])
async def test_a_time_that_came_late_is_told_again(
        monkeypatch: pytest.MonkeyPatch, late: tuple[float, ...], told: int) -> None:
    monkeypatch.setattr(session_module, "CLOCK_LATE", 0.05)
    client, machine = Client(*(0.06 * each for each in late)), Machine()
    machine.may.set()
    await session_of(machine, client).resume()
    assert client.told == told


async def test_a_machine_that_did_not_answer_the_order_to_stand_goes_on_when_it_is_to() -> None:
    class Slow(Machine):
        async def suspend(self) -> None:
            raise MachineError("QEMU did not answer stop")

        async def resume(self) -> None:
            self.did.append("resume")

    machine, clock, control = Slow(), RunClock(), Control()
    life = Life(Record(), Quiet())
    life.state = State.RUN
    clock.go()
    async with control.attached(session_of(machine, Client()), clock, life, None):
        with pytest.raises(MachineError):
            await control.suspend()
        await control.resume()
    assert set(machine.did) == {"resume"}
