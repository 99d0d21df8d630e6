"""Jobs that are a whole disk, with a machine that only ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vmjob.engine.foreign import run_foreign
from vmjob.engine.request import Request, Survival
from vmjob.engine.slot import Asked, Slot
from vmjob.grid.contract import Quiet
from vmjob.home import Home
from vmjob.job.files import Folder
from vmjob.job.model import Hardware, Job
from vmjob.machine.contract import Capabilities, Ended, EndReason, MachineSpec

pytestmark = pytest.mark.anyio


class Ending:
    """Driver and machine at once: it ends as soon as it has begun."""

    name = "ending"
    pid = None
    capabilities = Capabilities(suspend=False, checkpoint=False, networks=frozenset(),
                                console=False, templates=False, isolated=True, foreign=True)
    spec = MachineSpec(id="m1", directory=Path("/"), boot=None)

    def __init__(self, reason: EndReason) -> None:
        self._reason = reason

    async def create(self, spec: MachineSpec) -> Ending:
        return self

    async def start(self) -> Mapping[str, Any]:
        return {}

    async def ended(self) -> Ended:
        return Ended(self._reason, "it ended")

    def facts(self) -> dict[str, Any]:
        return {}

    def console(self) -> str:
        return ""

    async def stop(self) -> None: ...

    async def destroy(self) -> None: ...


class Heard(Quiet):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def request(tmp_path: Path, shape: MachineSpec, slot: Slot | None, reason: EndReason,
            **more: Any) -> Request:
    job = Job((), hardware=Hardware(disk=tmp_path / "disk"), **more)
    return Request(job, Ending(reason), shape, {},  # type: ignore[arg-type]
                   survival=Survival(slot) if slot else None)


async def test_a_slot_remembers_how_its_disk_has_ended(
        home: Home, fake_shape: MachineSpec, tmp_path: Path) -> None:
    """Else whoever continues it runs all of it once more."""
    with Slot.claim(tmp_path / "slot") as slot:
        slot.begin(Asked(Job((), hardware=Hardware(disk=tmp_path / "disk"))))
        lost = request(tmp_path, fake_shape, slot, EndReason.KILLED)
        assert (await run_foreign(home, lost, Quiet())).exit_code == 125
        assert slot.result() is None
        done = request(tmp_path, fake_shape, slot, EndReason.POWERED_OFF)
        record = await run_foreign(home, done, Quiet())
        assert record.exit_code == 0
        assert slot.result() == record


async def test_folders_that_a_disk_cannot_have_are_told(
        home: Home, fake_shape: MachineSpec, tmp_path: Path) -> None:
    grid = Heard()
    folders = (Folder("shared", tmp_path / "shared", "/root/shared"),)
    await run_foreign(home, request(tmp_path, fake_shape, None, EndReason.POWERED_OFF,
                                    folders=folders), grid)
    assert ["folders" in text for text in grid.warnings] == [True]
