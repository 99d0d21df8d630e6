"""What a checkpoint's state must be, and which layers belong to a checkpoint."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmjob.errors import CheckpointFailed, CheckpointNewer, CheckpointUnusable
from vmjob.machine.contract import MachineSpec, Saved
from vmjob.machine.virtualbox import saving
from vmjob.machine.virtualbox.manage import Manage
from vmjob.machine.virtualbox.programs import Programs
from vmjob.machine.virtualbox.saving import Saver, opened
from vmjob.machine.virtualbox.standing import Standing
from vmjob.machine.virtualbox.vdi import BLOCK, LAYER, MAP_AT, Header, read_header, write_disk

VERSION = "7.2.22r1"
GOOD: dict[str, Any] = {"format": saving.FORMAT, "version": VERSION, "saved": "1.sav",
                        "layers": ["1.disk"], "root": "root", "cd": "cd"}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    directory = tmp_path / "kept"
    directory.mkdir()
    for name in ("1.sav", "1.disk", "root", "cd"):
        (directory / name).write_bytes(b"x")
    return directory


def test_a_state_that_is_whole_is_read(kept: Path) -> None:
    assert set(opened(Saved(kept, GOOD), VERSION).files()) == {"1.sav", "1.disk", "root", "cd"}
    # As those said that knew of one disk only.
    assert opened(Saved(kept, {**GOOD, "attached": None}), VERSION).attached is None


@pytest.mark.parametrize("change", [
    {"version": "7.2.23r1"}, {"version": 7}, {"layers": []}, {"layers": "1.disk"},
    {"layers": ["../1.disk"]}, {"saved": "/etc/passwd"}, {"root": "gone"}, {"cd": "."},
    {"format": 0}, {"format": None}, {"attached": {"disk": "../x"}},
    {"attached": {"disk": "gone"}}, {"attached": "gone"}])
def test_a_state_that_is_not_is_refused(kept: Path, change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointUnusable):
        opened(Saved(kept, {**GOOD, **change}), VERSION)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_nothing_of_a_state_may_be_missing(kept: Path, name: str) -> None:
    with pytest.raises(CheckpointUnusable):
        opened(Saved(kept, {key: each for key, each in GOOD.items() if key != name}), VERSION)


def test_what_a_newer_one_made_is_told(kept: Path) -> None:
    with pytest.raises(CheckpointNewer):
        opened(Saved(kept, {"format": saving.FORMAT + 1, "other": 1}), VERSION)


# -- layers -------------------------------------------------------------------------------------


class Snapshots(Manage):
    """A VirtualBox that lays layers, and whose answers may be lost."""

    def __init__(self, directory: Path, first: Path) -> None:
        super().__init__(Programs("/nowhere", "/nowhere"), directory)
        self.place = directory / "machine" / "Snapshots"
        self.place.mkdir(parents=True)
        self.top = first
        self.after: Callable[[], None] = lambda: None

    async def run(self, *words: str, deadline: float = 0) -> str:
        if words[0] == "snapshot":
            # In this order, which is not that of their names.
            self.top = above(self.place / f"{{{uuid.uuid4()}}}.vdi", self.top)
            (self.place / f"{words[-1]}.sav").write_bytes(words[-1].encode())
            self.after()
        return ""


class Still(Standing):
    """Nobody stands still here."""

    async def _switch(self) -> None:
        return


def above(path: Path, below: Path) -> Path:
    own, under = uuid.uuid4(), read_header(below.read_bytes()[:512]).own
    header = Header(LAYER, MAP_AT, 2 * MAP_AT, BLOCK, 1, 0, own, own, under, under)
    path.write_bytes(header.packed().ljust(MAP_AT, b"\0") + b"\xff" * 4)
    return path


def saver_of(tmp_path: Path) -> tuple[Saver, Snapshots]:
    """Of a machine with one layer."""
    directory = tmp_path / "m"
    directory.mkdir()
    first = directory / "layer-0.vdi"
    write_disk(first, BLOCK, uuid.uuid4(), {})
    (directory / "boot.iso").touch()
    manage = Snapshots(directory, first)
    return Saver(MachineSpec("m", directory, None), manage, [first], VERSION,
                 contextlib.nullcontext), manage


@pytest.mark.anyio
async def test_layers_of_snapshots_that_failed_are_part_of_the_next_checkpoint(
        tmp_path: Path) -> None:
    from vmjob.errors import MachineError

    kept = tmp_path / "kept"
    kept.mkdir()
    saver, manage = saver_of(tmp_path)

    def lost() -> None:
        raise MachineError("lost")

    manage.after = lost
    layers = [manage.top]
    for number in range(3):
        with pytest.raises(CheckpointFailed):
            await saver.take(kept, f"bad{number}", lambda: None, Still(manage))
        layers.append(manage.top)
    assert list(kept.iterdir()) == []
    manage.after = lambda: None
    for each in manage.place.glob("*.sav"):  # the clock was set back
        os.utime(each, (2e9, 2e9))
    made = await saver.take(kept, "good", lambda: None, Still(manage))
    assert (kept / made.state["saved"]).read_bytes() == b"good"
    assert list(manage.place.glob("*.sav")) == [], "as large as the machine's memory"
    names = made.state["layers"]
    assert [(kept / name).stat().st_ino for name in names] == [
        path.stat().st_ino for path in layers]
    later = await saver.take(kept, "later", lambda: None, Still(manage))
    assert later.state["layers"][:-1] == names
    assert manage.top.name not in later.state["layers"], "it is written to"


@pytest.mark.anyio
@pytest.mark.parametrize("lost", ["*.vdi", "*.sav", "*"])
async def test_a_snapshot_of_which_not_all_is_there_is_no_checkpoint(tmp_path: Path,
                                                                     lost: str) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    saver, manage = saver_of(tmp_path)
    manage.after = lambda: [path.unlink() for path in manage.place.glob(lost)]  # type: ignore[return-value]
    with pytest.raises(CheckpointFailed):
        await saver.take(kept, "1", lambda: None, Still(manage))
    assert list(kept.iterdir()) == []


@pytest.mark.anyio
async def test_a_process_is_worn_before_virtualbox_refuses_its_snapshots(
        tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MOST_SNAPSHOTS", 3)
    saver, manage = saver_of(tmp_path)
    for number in range(4):
        assert saver.worn is (number >= 3)
        await saver.take(kept, f"c{number}", lambda: None, Still(manage))


@pytest.mark.anyio
async def test_a_process_is_worn_when_it_keeps_much_that_no_checkpoint_needs(
        tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MOST_LEFT", BLOCK)
    saver, manage = saver_of(tmp_path)
    for number in range(3):
        await saver.take(kept, f"c{number}", lambda: None, Still(manage))
    below = manage.place / saver._layers[1].name
    with below.open("ab") as layer:
        layer.write(os.urandom(2 * BLOCK))
    assert not saver.worn, "a checkpoint needs it"
    for path in kept.glob("c*.disk"):
        path.unlink()
    assert saver.worn
