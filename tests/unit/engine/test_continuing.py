"""A fault of this computer costs no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmjob
from vmjob.engine import generations as generations_module
from vmjob.engine.generations import Generation, Generations
from vmjob.engine.slot import Slot
from vmjob.errors import CheckpointNewer, MachineStartFailed, SlotUnusable
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec, Priority
from vmjob.machine.fake import SimulatedDriver, SimulatedFaults, SimulatedMachine, simulated

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


# -- checkpoints of a newer vmjob --------------------------------------------------------------


def everything(slot: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in slot.rglob("*")
            if path.is_file() and path.name != "verified"}  # which anybody may write who looks


@pytest.mark.parametrize("module", [generations_module, simulated], ids=["engine", "driver"])
async def test_what_a_newer_vmjob_made_is_refused_and_left_as_it_is(
        slot: Path, home: Home, monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    async with vmjob.AsyncMachine.restore(slot, home=home.root,
                                          driver=SimulatedDriver()) as machine:
        with monkeypatch.context() as newer:
            newer.setattr(module, "FORMAT", 2)
            await machine.checkpoint()
    before = everything(slot)
    with pytest.raises(CheckpointNewer, match="made by a newer vmjob"):
        await restored(slot, home)
    assert everything(slot) == before
    monkeypatch.setattr(module, "FORMAT", 2)
    assert await restored(slot, home) == []


async def test_a_newer_manifest_with_other_fields_is_refused_not_taken_for_damage(
        slot: Path, home: Home) -> None:
    generations_of(slot, b'{"format":7,"number":"three","what":[]}')
    (slot / "machine").mkdir()
    (slot / "machine" / "disk").write_bytes(b"left")
    before = everything(slot)
    for _ in range(2):
        with pytest.raises(CheckpointNewer), Slot.claim(slot):
            pass
    assert everything(slot) == before
    with pytest.raises(CheckpointNewer):
        async with vmjob.AsyncMachine.create(slot=slot, home=home.root, driver=SimulatedDriver()):
            pass  # which would begin anew
    assert everything(slot) == before


def generations_of(slot: Path, content: bytes) -> None:
    """A newest generation whose manifest says this, under a seal that is whole."""
    checksum = generations_module._checksum(content).encode()
    (slot / "checkpoints" / "000003.json").write_bytes(
        b'{"sha256":"%s","generation":%s}' % (checksum, content))


# -- priority ----------------------------------------------------------------------------------


async def test_a_changed_priority_is_kept_for_whoever_restores_the_machine(
        slot: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Priority] = []

    def noted(self: SimulatedMachine, spec: MachineSpec, *more: object) -> None:
        given.append(spec.priority)
        made(self, spec, *more)  # type: ignore[arg-type]

    made = SimulatedMachine.__init__
    monkeypatch.setattr(SimulatedMachine, "__init__", noted)
    async with vmjob.AsyncMachine.restore(slot, home=home.root,
                                          driver=SimulatedDriver()) as machine:
        await machine.set_priority("normal")
    await restored(slot, home)
    async with vmjob.AsyncMachine.restore(slot, home=home.root, priority="low",
                                          driver=SimulatedDriver()):
        pass
    await restored(slot, home)
    assert given == ["low", "normal", "low", "low"]
