"""A job that has to leave is kept first, whatever else the client says meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmjob.engine.control import Control
from vmjob.engine.record import Record
from vmjob.engine.session import beside
from vmjob.engine.slot import Asked, Slot
from vmjob.errors import CheckpointFailed, OutputMissing
from vmjob.grid.boinc import Event, Quit, Resume, Runtime, Suspend
from vmjob.job.model import Job
from vmjob.wrapper import start
from vmjob.wrapper.carrying import Carrier, Options
from vmjob.wrapper.log import Log
from vmjob.wrapper.orders import Orders
from vmjob.wrapper.outcome import Finish

pytestmark = pytest.mark.anyio

#: Seconds; nothing here waits for anything but the loop's next turn.
DEADLINE = 10.0


class Standing(Control):
    """A machine that stands still, or does not; what is kept while it stands is never finished."""

    def __init__(self) -> None:
        super().__init__()
        self.stands = self.kept = False

    async def suspend(self) -> bool:
        await asyncio.sleep(0)
        self.stands = True
        return True

    async def resume(self) -> None:
        await asyncio.sleep(0)
        self.stands = False

    async def checkpoint(self, deadline: float) -> None:
        for _ in range(5):  # as many turns as others may need to say their word
            await asyncio.sleep(0)
        self.kept = not self.stands


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with Runtime.open(tmp_path) as runtime:
        yield runtime


@pytest.mark.parametrize("said", [
    [Quit()], [Suspend(), Quit()], [Suspend(), Resume(), Quit()], [Quit(), Suspend()],
    [Resume(), Suspend(), Quit(), Suspend()]])
@pytest.mark.parametrize("obeyed_at_once", [True, False])
async def test_a_machine_is_kept_before_it_ends(runtime: Runtime, tmp_path: Path,
                                                said: list[Event], obeyed_at_once: bool) -> None:
    carrier = Carrier(runtime, tmp_path, Options(), Log(), lambda why: None)
    carrier._control = control = Standing()
    carrier._orders = Orders(control, None)
    carrier._work = work = asyncio.ensure_future(asyncio.sleep(DEADLINE))  # type: ignore[assignment]
    async with beside(carrier._orders.obey()):
        await asyncio.sleep(0)
        for each in said:
            carrier._hear(each)
            for _ in range(3 * obeyed_at_once):
                await asyncio.sleep(0)
        await asyncio.wait([work])
    assert work.cancelled()
    assert control.kept


class Worn(Control):
    """A machine that is to be followed by another, or not."""

    def __init__(self, worn: bool) -> None:
        super().__init__()
        self._worn = worn

    @property
    def worn(self) -> bool:
        return self._worn


@pytest.mark.parametrize("worn", [True, False])
@pytest.mark.parametrize("quits", [True, False])
async def test_a_job_goes_on_from_a_checkpoint_in_a_new_machine_when_this_one_is_worn(
        runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worn: bool,
        quits: bool) -> None:
    carrier = Carrier(runtime, tmp_path, Options(), Log(), lambda why: None)
    carrier._control = Worn(worn)
    machines = 0

    async def machine() -> Finish:
        nonlocal machines
        machines += 1
        if machines == 1:
            if quits:
                carrier._hear(Quit())
            carrier.grid.checkpoint(1, 0.01, 1000)
            for _ in range(5):  # for a word to be obeyed
                await asyncio.sleep(0)
        return Finish(0)

    monkeypatch.setattr(carrier, "_whole", machine)
    left = carrier.carry()
    async with asyncio.timeout(DEADLINE):
        assert await left == (None if quits else Finish(0))
    assert machines == (2 if worn and not quits else 1)


class Over(Control):
    """A job whose tasks have ended: there is nothing to keep."""

    async def checkpoint(self, deadline: float) -> None:
        raise CheckpointFailed("the job ended while it was being kept")


@pytest.mark.parametrize(("phase", "ends"), [("outputs", True), ("end", True), ("boot", False)])
async def test_a_job_whose_outputs_are_being_fetched_may_end(
        runtime: Runtime, tmp_path: Path, phase: str, ends: bool) -> None:
    carrier = Carrier(runtime, tmp_path, Options(), Log(), lambda why: None)
    carrier._control = Over()
    carrier.grid.current = phase
    carrier._work = work = asyncio.ensure_future(asyncio.sleep(0.1))  # type: ignore[assignment]
    carrier._hear(Quit())
    await asyncio.wait([work])
    assert work.cancelled() is not ends


async def test_a_job_that_ended_before_the_client_heard_of_it_still_tells_its_cause(
        runtime: Runtime, tmp_path: Path) -> None:
    carrier = Carrier(runtime, tmp_path, Options(), Log(), lambda why: None)
    error = OutputMissing("the job made no 'out'").as_dict()
    with Slot.claim(carrier.slot) as slot:
        slot.begin(Asked(Job(tasks=())))
        slot.end(Record(exit_code=125, error=error))
    assert await carrier.carry() == Finish(195)
    assert carrier.error == error


async def test_a_report_that_cannot_be_made_does_not_cost_the_result(
        runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> None:
        raise KeyError("advice")

    monkeypatch.setattr(start.report, "sections", unexpected)
    log = Log()
    carrier = Carrier(runtime, tmp_path, Options(), log, lambda why: None)
    assert start._Process(runtime, tmp_path, Options(), log)._end(carrier, Finish(0)) == 0
    assert (tmp_path / "boinc_finish_called").exists()
