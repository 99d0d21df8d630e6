"""A machine stands still for its user and for a checkpoint; neither lets go what one holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.errors import HypervisorSilent, VmjobError
from vmjob.machine.virtualbox.answers import Answer
from vmjob.machine.virtualbox.faults import Fault, Kind
from vmjob.machine.virtualbox.manage import Manage
from vmjob.machine.virtualbox.programs import Programs
from vmjob.machine.virtualbox.standing import Standing

pytestmark = pytest.mark.anyio


class Told(Manage):
    """A VirtualBox that refuses to pause what stands still, and to resume what runs."""

    def __init__(self, gate: anyio.Event | None = None) -> None:
        super().__init__(Programs("/nowhere", "/nowhere"), Path("/nowhere"))
        self.still = False
        self.words: list[str] = []
        self.gate = gate
        self.lost = False

    async def ask(self, *words: str, deadline: float = 0) -> Answer:
        self.words.append(words[-1])
        await anyio.lowlevel.checkpoint()
        if self.gate is not None and words[-1] == "resume":
            await self.gate.wait()
        wanted = words[-1] == "pause"
        if wanted == self.still:
            return Answer(1, "", "", Fault(Kind.WRONG_STATE, "is not paused", ""))
        self.still = wanted
        if self.lost:
            self.lost = False
            raise HypervisorSilent("no answer")
        return Answer(0, "", "", None)


@given(st.lists(st.sampled_from(("suspend", "resume", "hold", "let_go")), max_size=12))
def test_it_stands_still_as_long_as_anybody_wants_it(calls: list[str]) -> None:
    async def check() -> None:
        told = Told()
        standing = Standing(told)
        wanted = {"user": False, "checkpoint": False}
        for call in calls:
            await getattr(standing, call)()
            who = "user" if call in ("suspend", "resume") else "checkpoint"
            wanted[who] = call in ("suspend", "hold")
            assert told.still == any(wanted.values())
        assert all(one != other for one, other in itertools.pairwise(told.words))

    anyio.run(check)


async def test_a_suspension_while_a_checkpoint_lets_go_is_not_lost() -> None:
    gate = anyio.Event()
    gate.set()
    told = Told()
    standing = Standing(told)
    await standing.hold()
    told.gate = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(standing.let_go)
        await anyio.wait_all_tasks_blocked()  # VirtualBox is just letting it go
        group.start_soon(standing.suspend)
        await anyio.wait_all_tasks_blocked()
        told.gate.set()
    assert told.still
    assert told.words == ["pause", "resume", "pause"]


async def test_a_suspension_while_it_is_held_is_there_at_once_and_stays() -> None:
    told = Told()
    standing = Standing(told)
    await standing.hold()
    await standing.suspend()
    await standing.let_go()
    assert told.still
    assert told.words == ["pause"]


async def test_what_was_done_and_not_answered_is_done_once() -> None:
    told = Told()
    standing = Standing(told)
    told.lost = True
    with pytest.raises(HypervisorSilent):
        await standing.suspend()
    await standing.suspend()
    assert told.still
    await standing.resume()
    assert not told.still


async def test_one_that_may_stand_still_does_not_count_as_running() -> None:
    told = Told()
    standing = Standing(told)
    assert standing.runs
    told.lost = True
    with pytest.raises(HypervisorSilent):
        await standing.suspend()
    assert not standing.runs
    await standing.resume()
    assert standing.runs
    assert not told.still


async def test_a_refusal_that_nobody_expects_is_told() -> None:
    told = Told()
    told.still = True  # somebody else's doing
    with pytest.raises(VmjobError):
        await Standing(told).suspend()
