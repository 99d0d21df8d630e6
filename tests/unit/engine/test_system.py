"""Which jobs on a disk of their own run on our kernel, and as what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmjob.engine.request import Request, Survival
from vmjob.engine.slot import Slot
from vmjob.engine.system import NoSystem, find_system, hosted
from vmjob.errors import ImageOutdated
from vmjob.job.files import Folder
from vmjob.job.model import Hardware, Job, Network, Triggers
from vmjob.machine.contract import Attached, MachineSpec
from vmjob.machine.fake.driver import FakeDriver
from vmjob.machine.qemu.driver import QemuDriver

DISK = Path("/u/vm_image.vdi")
FOLDERS = (Folder("shared", Path("/s"), "/root/shared"),
           Folder("project", Path("/p"), "/root/project", writable=False),
           Folder("job", Path("/j"), ""))
JOB = Job((), hardware=Hardware(disk=DISK), folders=FOLDERS[:1])
SHAPE = MachineSpec(id="", directory=Path("/m"), boot=None)


def asked(job: Job) -> Request:
    return Request(job, QemuDriver(), SHAPE, {})


def test_what_is_on_the_disk_becomes_a_task() -> None:
    found = hosted(asked(replace(JOB, folders=FOLDERS, network=Network.NAT)))
    assert found is not None
    found.job.check()
    (task,) = found.job.tasks
    assert task.user == "root"
    assert task.argv[-5:] == ("run", "shared=/root/shared", "project=/root/project:ro", "job=/job",
                              "--network")
    assert (found.shape.attached, found.cold) == (Attached(DISK), True)
    assert found.job.hardware.disk is None


def test_a_cd_and_a_second_disk_are_there_besides() -> None:
    cd, cache = Path("/u/cd.iso"), Path("/u/vm_cache.vdi")
    found = hosted(asked(replace(JOB, hardware=Hardware(disk=DISK, iso=cd, cache_disk=cache))))
    assert found is not None
    found.job.check()
    assert found.job.tasks[0].argv[-2:] == ("--iso", "--cache-disk")
    assert found.shape.attached == Attached(DISK, cd, cache)
    assert found.job.hardware == Hardware()


@pytest.mark.parametrize("change", [
    {"folders": ()}, {"hardware": Hardware()}, {"hardware": Hardware(iso=DISK)},
    {"hardware": Hardware(disk=DISK, iso=DISK, iso_first=True)}])
def test_others_boot_by_their_bios(change: dict[str, Any]) -> None:
    assert hosted(asked(replace(JOB, **change))) is None


def test_a_mailbox_or_a_trigger_is_enough() -> None:
    for change in ({"hardware": Hardware(disk=DISK, mailbox=b"")},
                   {"triggers": Triggers(completion="shutdown")}):
        assert hosted(asked(replace(JOB, folders=(), **change))) is not None


class Keeping(QemuDriver):
    """One that keeps machines which boot these disks."""

    def __init__(self, *formats: str, checkpoint: bool = True) -> None:
        self.capabilities = replace(QemuDriver.capabilities, checkpoint=checkpoint,  # type: ignore[misc]
                                    kept_foreign=frozenset(formats))


def test_a_job_that_is_to_survive_is_started_so_where_it_would_not_be_kept(tmp_path: Path) -> None:
    vdi, raw = tmp_path / "a.vdi", tmp_path / "a.raw"
    vdi.write_bytes(bytes(64) + b"\x7f\x10\xda\xbe" + bytes(444))
    raw.write_bytes(bytes(512))
    with Slot.claim(tmp_path / "slot") as slot:
        for disk, driver, cache, expected in (
                (vdi, Keeping("raw"), None, True), (raw, Keeping("raw"), None, False),
                (raw, Keeping(), None, True), (raw, Keeping("raw"), raw, True),
                (raw, Keeping(checkpoint=False), raw, False),
                (tmp_path / "none", Keeping("raw"), None, False)):
            job = replace(JOB, folders=(), hardware=Hardware(disk=disk, cache_disk=cache))
            request = replace(asked(job), driver=driver)
            assert hosted(request) is None
            found = hosted(replace(request, survival=Survival(slot)))
            assert (found is not None) is expected


def test_a_driver_that_cannot_attach_a_disk_boots_it(tmp_path: Path) -> None:
    assert hosted(replace(asked(JOB), driver=FakeDriver())) is None


class Guest:
    """An agent whose command ends so; and the session and machine with it."""

    def __init__(self, code: int, said: bytes, attached: Attached) -> None:
        self.client = self.machine = self
        self.spec = replace(SHAPE, attached=attached)
        self.asked: list[str] = []
        self._end, self._said = SimpleNamespace(exit_code=code), said

    async def start(self, argv: list[str], *, user: str) -> int:
        self.asked = argv
        return 1

    async def follow(self, number: int, take: Callable[[str, bytes], Awaitable[None]]) -> object:
        await take("stderr", self._said)
        return self._end

    def forget(self, number: int) -> None: ...


@pytest.mark.anyio
async def test_an_image_that_knows_no_cd_is_told_of() -> None:
    """It was built before: it does not know the word, and says how it is called."""
    guest = Guest(2, b"usage: look | run\n", Attached(DISK, DISK))
    with pytest.raises(ImageOutdated):
        await find_system(guest)  # type: ignore[arg-type]
    assert guest.asked[-2:] == ["look", "--iso"]
    guest = Guest(3, b"no /sbin/init\n", Attached(DISK))
    with pytest.raises(NoSystem, match="no /sbin/init"):
        await find_system(guest)  # type: ignore[arg-type]
    assert guest.asked[-1] == "look"
