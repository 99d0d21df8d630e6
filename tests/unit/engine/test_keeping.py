"""A checkpoint that would fill the disk, or break its owner's limit, is not begun."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from vmjob.engine import keeping
from vmjob.engine.generations import Generations
from vmjob.engine.progress import Progress
from vmjob.errors import CheckpointFailed, HostDiskFull
from vmjob.machine.contract import BootParts, Checkpoint, Foreign, MachineSpec

MIB = 1 << 20
ROOT, SCRATCH, MEMORY = 30 * MIB, 2 * MIB, 16 * MIB


@pytest.fixture
def generations(tmp_path: Path) -> Generations:
    return Generations(tmp_path / "checkpoints")


@pytest.fixture
def spec(tmp_path: Path) -> MachineSpec:
    """A copy of a template, whose files are sparse."""
    template = tmp_path / "template"
    template.mkdir()
    for path, size in ((tmp_path / "root", ROOT), (tmp_path / "scratch", SCRATCH),
                       (template / "memory", MEMORY)):
        path.touch()
        os.truncate(path, size)
    boot = BootParts("", tmp_path / "kernel", tmp_path / "initrd", tmp_path / "root",
                     tmp_path / "scratch")
    return MachineSpec(id="", directory=tmp_path, boot=boot, memory_mb=16, template=template)


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(
        free=count + keeping.LEFT_FREE))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot is on another file system: nothing can be linked there."""

    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)


def test_what_can_be_linked_needs_no_room(generations: Generations, spec: MachineSpec,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 16 * MIB)
    keeping._check_room(generations, spec, 16 * MIB)
    assert list(generations.directory.iterdir()) == []


@pytest.mark.usefixtures("elsewhere")
def test_what_must_be_copied_needs_room_as_well(generations: Generations, spec: MachineSpec,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    most = 16 * MIB + ROOT + SCRATCH + MEMORY
    free(monkeypatch, most - 1)
    with pytest.raises(HostDiskFull, match="no room"):
        keeping._check_room(generations, spec, None)
    free(monkeypatch, most)
    keeping._check_room(generations, spec, most)
    with pytest.raises(HostDiskFull, match="left to the job"):
        keeping._check_room(generations, spec, most - 1)


@pytest.mark.usefixtures("elsewhere")
def test_what_was_copied_by_a_failed_attempt_is_not_counted_twice(
        generations: Generations, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    (generations.directory / "memory").write_bytes(b"x" * MEMORY)
    free(monkeypatch, 16 * MIB + ROOT + SCRATCH)
    keeping._check_room(generations, spec, None)


def test_what_its_user_brought_needs_room_where_it_is_copied(
        generations: Generations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, iso = tmp_path / "disk", tmp_path / "iso"
    disk.write_bytes(bytes(3 * MIB))
    iso.write_bytes(bytes(MIB))
    spec = MachineSpec(id="", directory=tmp_path, boot=None, memory_mb=16,
                       foreign=Foreign(disk, iso))
    free(monkeypatch, 16 * MIB)
    keeping._check_room(generations, spec, None)
    with pytest.raises(HostDiskFull):
        keeping._check_room(generations, spec, None, (disk,))
    free(monkeypatch, 19 * MIB)
    keeping._check_room(generations, spec, 19 * MIB, (disk,))


@pytest.mark.anyio
async def test_a_checkpoint_with_too_long_a_manifest_is_told_as_failed_and_its_number_is_used(
        generations: Generations, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    async def checkpoint(directory: Path, name: str, while_still: Callable[[], None]) -> Checkpoint:
        names.append(name)
        (directory / f"{name}.pages").write_bytes(b"x")
        while_still()
        return Checkpoint((f"{name}.pages",), {}, 0.0, 0)

    async def settle() -> None:
        pass

    kept = SimpleNamespace(machine=SimpleNamespace(spec=spec, checkpoint=checkpoint),
                           driver_name="fake", copied=())
    monkeypatch.setattr("vmjob.engine.generations.MAX_MANIFEST", 10)
    for _ in range(2):
        with pytest.raises(CheckpointFailed, match="manifest"):
            await keeping.keep(generations, kept,  # type: ignore[arg-type]
                               lambda: Progress([], 1, {}, {}, 0.0, 0), settle, None)
    assert names == ["000001", "000002"]
    assert generations.listed() == []
