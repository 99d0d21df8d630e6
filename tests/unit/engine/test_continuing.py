"""A fault of this computer costs no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmjob
from vmjob.engine.generations import Generation, Generations
from vmjob.errors import MachineStartFailed, SlotUnusable
from vmjob.home import Home
from vmjob.machine.fake import SimulatedDriver, SimulatedFaults

pytestmark = pytest.mark.anyio


@pytest.fixture
async def slot(home: Home, tmp_path: Path) -> Path:
    """A slot with two checkpoints of a machine whose command has not ended."""
    root = tmp_path / "slot"
    async with vmjob.AsyncMachine.create(slot=root, home=home.root,
                                         driver=SimulatedDriver()) as machine:
        await machine.start(["wait"])
        await machine.checkpoint()
        await machine.checkpoint()
    return root


def numbers(slot: Path) -> list[int]:
    return [each.number for each in Generations(slot / "checkpoints").newest_first()
            if isinstance(each, Generation)]


async def restored(slot: Path, home: Home, **faults: str) -> list[str]:
    driver = SimulatedDriver(SimulatedFaults(**faults))  # type: ignore[arg-type]
    async with vmjob.AsyncMachine.restore(slot, home=home.root, driver=driver) as machine:
        await machine.ping()
        return machine.warnings


async def test_a_machine_that_does_not_start_here_today(slot: Path, home: Home) -> None:
    with pytest.raises(MachineStartFailed):
        await restored(slot, home, start="no memory to be had")
    assert numbers(slot) == [2, 1]
    assert await restored(slot, home) == []


async def test_checkpoints_that_no_machine_takes_are_kept_for_another_time(slot: Path,
                                                                           home: Home) -> None:
    with pytest.raises(SlotUnusable, match=r"2 is given up.*1 is given up"):
        await restored(slot, home, restore="not today")
    assert numbers(slot) == [2, 1]
    assert await restored(slot, home) == []
