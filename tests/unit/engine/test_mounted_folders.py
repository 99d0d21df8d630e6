"""A job on a disk of its own, whose guest mounts folders of this computer by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest

from tests.unit.deep_tree import deepen
from vmjob.engine.foreign import run_foreign
from vmjob.engine.record import Record
from vmjob.engine.request import Request, Survival
from vmjob.engine.slot import Asked, Slot
from vmjob.errors import NotSupported
from vmjob.grid.contract import Quiet
from vmjob.home import Home
from vmjob.job.files import Folder
from vmjob.job.model import Hardware, Job, Triggers
from vmjob.machine.contract import Capabilities, Ended, EndReason, MachineSpec

pytestmark = pytest.mark.anyio

Guest = Callable[[Path], Awaitable[None]]


class Mounting:
    """Driver and machine at once; its guest is a function that works in the shared folder.

    It switches itself off when the function returns.
    """

    name = "mounting"
    pid = None
    logs = ()
    capabilities = Capabilities(suspend=False, checkpoint=False, networks=frozenset(),
                                console=False, templates=False, isolated=True, foreign=True,
                                folders=True, floppy=True)

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    async def create(self, spec: MachineSpec) -> Mounting:
        self.spec = spec
        assert spec.foreign is not None
        for name in spec.foreign.folders:
            assert list(spec.folder(name).iterdir()) == []
        return self

    async def start(self) -> Mapping[str, Any]:
        self._running = asyncio.ensure_future(self._guest(self.spec.folder("shared")))
        return {}

    async def ended(self) -> Ended:
        await asyncio.shield(self._running)
        return Ended(EndReason.POWERED_OFF, "it switched itself off")

    def facts(self) -> dict[str, Any]:
        return {}

    def console(self) -> str:
        return ""

    async def checkpoint(self, *asked: object) -> None:
        raise NotSupported("no checkpoints")

    async def suspend(self) -> None:
        self._running.cancel()

    async def stop(self) -> None:
        self._running.cancel()

    async def destroy(self) -> None: ...


class Heard(Quiet):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.messages: list[str] = []
        self.fractions: list[float] = []
        self.trickles: list[tuple[str, str]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def fraction_done(self, fraction: float) -> None:
        self.fractions.append(fraction)

    async def trickle(self, variety: str, text: str) -> bool:
        self.trickles.append((variety, text))
        return True


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "slot" / "shared"
    path.mkdir(parents=True)
    return path


async def carry(home: Home, shape: MachineSpec, shared: Path, guest: Guest, grid: Quiet, *,
                slot: Slot | None = None, **more: Any) -> Record:
    folder = Folder("shared", shared, "/root/shared")
    job = Job((), **{"hardware": Hardware(disk=shared / "disk"), "folders": (folder,), **more})
    asked = Request(job, Mounting(guest), shape, {},  # type: ignore[arg-type]
                    survival=Survival(slot) if slot else None)
    with anyio.fail_after(60):
        return await run_foreign(home, asked, grid)


async def gone(path: Path) -> None:
    while path.exists():  # noqa: ASYNC110 - a file, no event
        await anyio.sleep(0.01)


async def test_what_is_in_the_folder_is_there_at_the_start_and_what_comes_is_there_at_the_end(
        home: Home, fake_shape: MachineSpec, shared: Path) -> None:
    (shared / "in").write_text("the input\n")

    async def guest(folder: Path) -> None:
        (folder / "out").write_text((folder / "in").read_text().upper())

    grid = Heard()
    record = await carry(home, fake_shape, shared, guest, grid)
    assert (record.status, record.exit_code, grid.warnings) == ("succeeded", 0, [])
    assert (shared / "out").read_text() == "THE INPUT\n"
    assert psutil.Process().children(recursive=True) == []


async def test_its_files_say_how_far_it_is_and_how_it_ended(
        home: Home, fake_shape: MachineSpec, shared: Path) -> None:
    async def guest(folder: Path) -> None:
        (folder / "progress").write_text("0.5\n")
        (folder / "said").write_text("a trickle")
        await gone(folder / "said")
        (folder / "shutdown").write_text("7\n1\nthe end\n")
        await anyio.sleep_forever()

    grid = Heard()
    record = await carry(home, fake_shape, shared, guest, grid, triggers=Triggers(
        completion="shutdown", fraction_done="progress", trickles=("said",)))
    assert (record.status, record.exit_code) == ("failed", 7)
    assert (record.message, record.notice) == ("the end", True)
    assert 0.5 in grid.fractions
    assert grid.trickles == [("said", "a trickle")]


async def test_its_last_word_counts_when_it_switches_itself_off_at_once(
        home: Home, fake_shape: MachineSpec, shared: Path) -> None:
    async def guest(folder: Path) -> None:
        (folder / "shutdown").write_text("3\n")

    record = await carry(home, fake_shape, shared, guest, Heard(),
                         triggers=Triggers(completion="shutdown"))
    assert record.exit_code == 3


async def test_one_that_wants_to_wait_is_begun_again_later(
        home: Home, fake_shape: MachineSpec, shared: Path, tmp_path: Path) -> None:
    async def guest(folder: Path) -> None:
        (folder / "wait").write_text("60\n")
        await anyio.sleep_forever()

    async def done(folder: Path) -> None: ...

    with Slot.claim(tmp_path / "kept") as slot:
        slot.begin(Asked(Job((), hardware=Hardware(disk=tmp_path / "disk"))))
        triggers = Triggers(temporary_exit="wait")
        record = await carry(home, fake_shape, shared, guest, Heard(), slot=slot,
                             triggers=triggers)
        assert record.error is not None
        assert record.error["code"] == "postponed"
        assert slot.result() is None
        again = await carry(home, fake_shape, shared, done, Heard(), slot=slot, triggers=triggers)
        assert again.exit_code == 0
        assert slot.result() == again


async def test_a_guest_that_makes_links_gets_nothing_of_this_computer(
        home: Home, fake_shape: MachineSpec, shared: Path, tmp_path: Path) -> None:
    """No hypervisor lets it; if one did all the same, it would be no way out."""
    secret = tmp_path / "secret"
    secret.write_text("secret")

    async def guest(folder: Path) -> None:
        (folder / "file").symlink_to(secret)
        (folder / "directory").symlink_to(tmp_path)
        (folder / "out").write_text("done")

    record = await carry(home, fake_shape, shared, guest, Heard())
    assert record.exit_code == 0
    assert sorted(each.name for each in shared.iterdir()) == ["out"]
    assert secret.read_text() == "secret"


async def test_the_account_s_secrets_stay_outside(
        home: Home, fake_shape: MachineSpec, shared: Path) -> None:
    (shared / "init_data.xml").write_text(
        "<app_init_data><authenticator>secret</authenticator></app_init_data>")
    seen = []

    async def guest(folder: Path) -> None:
        seen.append((folder / "init_data.xml").read_text())

    await carry(home, fake_shape, shared, guest, Heard())
    assert "secret" not in seen[0]
    assert "secret" in (shared / "init_data.xml").read_text()


async def test_a_note_goes_to_its_floppy_disk_and_one_comes_from_there(
        home: Home, fake_shape: MachineSpec, shared: Path) -> None:
    seen = []

    async def guest(folder: Path) -> None:
        floppy = folder.parents[1] / "floppy.img"
        content = bytearray(floppy.read_bytes())
        seen.append((len(content), bytes(content[:9]), content[28670]))
        content[14335:14343] = b"for you\0"
        content[28671] = 1
        floppy.write_bytes(content)

    grid = Heard()
    record = await carry(home, fake_shape, shared, guest, grid,
                         hardware=Hardware(disk=shared / "disk", mailbox=b"for guest"))
    assert record.exit_code == 0
    assert seen == [(1440 << 10, b"for guest", 1)]
    assert grid.messages == ["mailbox: for you"]


async def test_a_result_that_does_not_fit_is_no_success(
        home: Home, fake_shape: MachineSpec, shared: Path, tmp_path: Path) -> None:
    """Whatever the job says of itself."""
    async def guest(folder: Path) -> None:
        (folder.parent / "results" / "large").write_bytes(bytes(5000))
        (folder / "shutdown").write_text("0\n")
        await anyio.sleep_forever()

    folders = (Folder("shared", shared, "/root/shared"),
               Folder("results", tmp_path / "results", "/r", live=False, max_bytes=1000))
    record = await carry(home, fake_shape, shared, guest, Heard(), folders=folders,
                         triggers=Triggers(completion="shutdown"))
    assert (record.status, record.error and record.error["code"]) == ("failed", "folder-full")


async def test_a_file_that_is_written_to_the_last_moment_comes(
        home: Home, fake_shape: MachineSpec, shared: Path) -> None:
    async def guest(folder: Path) -> None:
        with (folder / "log").open("a") as log:
            while True:
                log.write("a line\n")
                log.flush()
                await anyio.sleep(0.01)

    record = await carry(home, fake_shape, shared, guest, Heard(), duration=1.0)
    assert record.status == "succeeded"
    assert (shared / "log").read_text().startswith("a line\n")


@pytest.mark.parametrize("name", [".vmjob-x", "changing"])
async def test_what_no_folder_would_take_does_not_fill_this_computers_disk_either(
        home: Home, fake_shape: MachineSpec, shared: Path, name: str) -> None:
    async def guest(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
                await anyio.sleep(0.001)

    folder = replace(Folder("shared", shared, "/root/shared"), max_bytes=50_000)
    record = await carry(home, fake_shape, shared, guest, Heard(), folders=(folder,))
    assert record.error is not None
    assert record.error["code"] == "folder-full"


async def test_of_a_tree_of_any_depth_nothing_is_left(
        home: Home, fake_shape: MachineSpec, shared: Path) -> None:
    async def guest(folder: Path) -> None:
        await anyio.to_thread.run_sync(deepen, folder, 1200)

    record = await carry(home, fake_shape, shared, guest, Heard())
    assert record.exit_code is not None
    assert list(home.machines.iterdir()) == []


async def test_a_folder_that_grows_over_its_limit_ends_the_job(
        home: Home, fake_shape: MachineSpec, shared: Path) -> None:
    async def guest(folder: Path) -> None:
        (folder / "large").write_bytes(bytes(100_000))
        await anyio.sleep_forever()

    folder = replace(Folder("shared", shared, "/root/shared"), max_bytes=50_000)
    record = await carry(home, fake_shape, shared, guest, Heard(), folders=(folder,))
    assert record.error is not None
    assert record.error["code"] == "folder-full"
