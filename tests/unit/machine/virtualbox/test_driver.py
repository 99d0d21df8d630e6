"""What a version of VirtualBox is trusted with, and what is refused before anything is made."""

from __future__ import annotations

import os
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.unit.machine.virtualbox.test_programs import install
from vmjob.errors import CheckpointUnusable, NotSupported, ProgramMissing, VmjobError
from vmjob.machine.contract import Foreign, MachineSpec, Saved
from vmjob.machine.virtualbox import programs, service
from vmjob.machine.virtualbox.driver import VirtualBoxDriver, able, check_able

LAYERS, STATES = "vdi-overlay", "saved-state"
PLAIN = MachineSpec(id="m", directory=Path("/m"), boot=None)
TEMPLATE = replace(PLAIN, template=Path("/t"))
FREEZABLE = replace(PLAIN, freezable=True)
FOREIGN = replace(PLAIN, foreign=Foreign(Path("/d")))
SAVED = replace(PLAIN, saved=Saved(Path("/s"), {}))


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A VirtualBox of some version, which answers nothing else."""

    def put(version: str) -> None:
        directory = Path(install(tmp_path / version, says=version))
        monkeypatch.setattr(programs, "find", lambda: programs.Programs(
            str(directory / "VBoxManage"), str(directory / "VBoxHeadless")))

    return put


#: What is of no use without disks of users.
FOREIGN_ONLY = ("foreign", "folders", "floppy")


@pytest.mark.parametrize(("bad", "missing"), [
    (set(), set()), ({LAYERS}, {"checkpoint", "templates", *FOREIGN_ONLY}),
    ({STATES}, {"checkpoint", "templates"}),
    ({LAYERS, STATES}, {"checkpoint", "templates", *FOREIGN_ONLY})])
def test_a_version_with_a_fault_can_do_less(bad: set[str], missing: set[str]) -> None:
    whole, less = able(frozenset()), able(bad)
    differ = {each.name for each in fields(whole)
              if getattr(whole, each.name) != getattr(less, each.name)}
    assert differ == missing
    assert whole.checkpoint
    assert not any(getattr(less, name) for name in missing)


@pytest.mark.parametrize(("version", "checkpoint", "foreign"), [
    ("7.2.22r1", True, True), ("7.2.18r1", True, True), ("7.2.16r1", False, False),
    ("7.1.12r1", False, False), ("7.0.0r1", False, False)])
def test_the_driver_can_do_what_the_version_here_can(says, version: str, checkpoint: bool,  # type: ignore[no-untyped-def]
                                                     foreign: bool) -> None:
    says(version)
    found = VirtualBoxDriver().capabilities
    assert (found.checkpoint, found.templates, found.foreign) == (checkpoint, checkpoint, foreign)
    assert found.suspend
    assert found.isolated


def test_without_virtualbox_its_absence_is_told_by_who_makes_a_machine(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ProgramMissing("no VirtualBox")

    monkeypatch.setattr(programs, "find", missing)
    assert VirtualBoxDriver().capabilities == able(())


@pytest.mark.parametrize(("bad", "spec", "error"), [
    (LAYERS, TEMPLATE, NotSupported), (LAYERS, FREEZABLE, NotSupported),
    (LAYERS, FOREIGN, NotSupported), (LAYERS, SAVED, CheckpointUnusable),
    (STATES, TEMPLATE, NotSupported), (STATES, FREEZABLE, NotSupported),
    (STATES, SAVED, CheckpointUnusable), (STATES, FOREIGN, None), (STATES, PLAIN, None),
    (LAYERS, PLAIN, None), ("", SAVED, None), ("", FOREIGN, None), ("", TEMPLATE, None)])
def test_what_would_be_done_wrong_is_refused(bad: str, spec: MachineSpec,
                                             error: type[VmjobError] | None) -> None:
    if error is None:
        check_able(spec, {bad})
        return
    with pytest.raises(error, match="not trusted"):
        check_able(spec, {bad})


@pytest.mark.anyio
async def test_the_driver_refuses_before_anything_is_made(says, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    says("7.2.16r1")
    directory = tmp_path / "machine"
    directory.mkdir()
    for spec in (TEMPLATE, FREEZABLE, FOREIGN):
        with pytest.raises(NotSupported):
            await VirtualBoxDriver().create(replace(spec, directory=directory))
    assert list(directory.iterdir()) == []


@pytest.mark.anyio
async def test_who_makes_a_machine_sweeps_what_killed_owners_left(
        says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    says("7.2.22r1")
    monkeypatch.setattr(service, "TEMPORARY", tmp_path)
    left = service.ipc_directory("vmjob-dead")
    left.mkdir()
    (left / "lock").touch()
    old = time.time() - 2 * service.SETTLED
    os.utime(left, (old, old))
    with pytest.raises(VmjobError):  # this VirtualBox can do nothing
        await VirtualBoxDriver().create(replace(PLAIN, directory=tmp_path / "machine"))
    assert not left.exists()
