"""The VirtualBox driver with a real one: whatever is killed, hangs or is damaged.

A sector of code is a whole system here, where nothing is asked of a machine but that it runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import psutil
import pytest

from tests.conftest import eventually, open_descriptors
from tests.vm.test_foreign import LETTERS
from tests.vm.test_foreign import disk as letters_disk
from vmjob.errors import (
    DiskUnusable,
    HomeUnusable,
    HostMemoryLow,
    HypervisorSilent,
    PortTaken,
    ProgramMissing,
    VmjobError,
)
from vmjob.home import Home
from vmjob.host.facts import Memory
from vmjob.machine.contract import EndReason, Foreign, MachineSpec, Status
from vmjob.machine.virtualbox import driver as driver_module
from vmjob.machine.virtualbox import programs
from vmjob.machine.virtualbox.driver import VirtualBoxDriver, VirtualBoxMachine
from vmjob.machine.virtualbox.manage import Manage, service_pids
from vmjob.machine.virtualbox.service import ipc_directory, ipc_id_of

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

#: Seconds for whatever is waited for, on a loaded computer.
PATIENCE = 60.0
#: Prints "R" on the first serial port.
SAY_R = bytes.fromhex("31c0 8ed8 ba fd03 ec a820 74fb baf803 b052 ee")
STAND = SAY_R + bytes.fromhex("f4 ebfd")  # hlt; jmp
RESTART = SAY_R + bytes.fromhex("b0fe e664 f4 ebfd")  # by the keyboard's controller
#: ACPI's S5 of VirtualBox's PIIX4: 5 and the bit that means it.
SWITCH_OFF = SAY_R + bytes.fromhex("ba0440 b80034 ef f4 ebfd")
#: No table of interrupts, and an interrupt.
TRIPLE_FAULT = SAY_R + bytes.fromhex("0f011e007e cc")
#: Counts on in the floppy disk's second sector, not in the disk's.
LETTERS_OF_THE_FLOPPY = LETTERS.replace(bytes.fromhex("8a160070"), bytes.fromhex("b2009090"))


def disk(path: Path, code: bytes = STAND) -> Path:
    path.write_bytes((code.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    return path


@pytest.fixture
def spec(home: Home, tmp_path: Path, virtualbox: Path) -> MachineSpec:
    return small(home.machines / "m1", disk(tmp_path / "disk"))


def small(directory: Path, system: Path) -> MachineSpec:
    directory.mkdir(parents=True, exist_ok=True)
    return MachineSpec(id="m1", directory=directory, boot=None, memory_mb=32,
                       accelerator="interpreter", foreign=Foreign(system))


@asynccontextmanager
async def running(spec: MachineSpec) -> AsyncIterator[VirtualBoxMachine]:
    """A machine that has said its word; nothing of it is left afterwards."""
    spec.directory.mkdir(exist_ok=True)
    machine = await VirtualBoxDriver().create(spec)
    try:
        assert await machine.start() == {}
        await heard(machine, "R")
        yield machine
    finally:
        await machine.destroy()
        assert nothing_of(spec.directory) == []


async def heard(machine: VirtualBoxMachine, text: str) -> None:
    with anyio.fail_after(PATIENCE):
        while text not in machine.console():  # noqa: ASYNC110 - nobody announces that
            await anyio.sleep(0.01)


async def end(machine: VirtualBoxMachine) -> EndReason:
    with anyio.fail_after(PATIENCE):
        ended = await machine.ended()
    assert ended.detail
    assert machine.get_status() is Status.STOPPED
    return ended.reason


def nothing_of(directory: Path) -> list[object]:
    """What is left of a machine: its directory, its service, and what that has in /tmp."""
    registry = directory / "registry"
    meeting = ipc_directory(ipc_id_of(registry))
    return [*service_pids(registry), *(path for path in (directory, meeting) if path.exists())]


def watchers(pid: int) -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"])
            if "vmjob-watch" in (each.info["cmdline"] or [])
            and any(word.startswith(f"{pid}:") for word in each.info["cmdline"])]


@contextmanager
def impatient() -> Iterator[None]:
    """VBoxManage has little time; for calls that hang only, as others may well need more."""
    with pytest.MonkeyPatch.context() as patch:
        for call in (Manage.run, Manage.ask):
            assert call.__kwdefaults__ is not None
            patch.setitem(call.__kwdefaults__, "deadline", 3.0)
        yield


# -- how a machine ends ---------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "reason"), [
    pytest.param(SWITCH_OFF, EndReason.POWERED_OFF, id="switches itself off"),
    pytest.param(TRIPLE_FAULT, EndReason.CRASHED, id="triple fault")])
async def test_a_guest_that_ends_is_told_and_does_not_linger(
        spec: MachineSpec, tmp_path: Path, code: bytes, reason: EndReason) -> None:
    disk(tmp_path / "disk", code)
    async with running(spec) as machine:
        assert await end(machine) is reason
        assert machine.pid is not None
        assert not psutil.pid_exists(machine.pid)
        assert eventually(lambda: not watchers(machine.pid or 0))


async def test_a_users_system_may_restart_itself(spec: MachineSpec, tmp_path: Path) -> None:
    disk(tmp_path / "disk", RESTART)
    async with running(spec) as machine:
        await heard(machine, "RRR")
        assert machine.get_status() is Status.RUNNING


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_machine_whose_service_is_killed_ends_and_says_so(
        spec: MachineSpec, number: signal.Signals) -> None:
    async with running(spec) as machine:
        for pid in service_pids(spec.directory / "registry"):
            os.kill(pid, number)
        if number == signal.SIGKILL:
            assert await end(machine) is EndReason.CRASHED
            assert "VBoxSVC" in (await machine.ended()).detail
        else:  # it has a client, lives on for that, and takes nobody's call
            with pytest.raises(VmjobError):
                await machine.suspend()


async def test_of_a_machine_that_was_killed_nothing_is_left(spec: MachineSpec) -> None:
    async with running(spec) as machine:
        assert machine.pid is not None
        assert service_pids(spec.directory / "registry")
        os.kill(machine.pid, signal.SIGKILL)
        assert await end(machine) is EndReason.KILLED


OWNER = """
import anyio, json, sys
from pathlib import Path
from tests.vm.test_virtualbox import *

async def main(directory, system):
    spec = small(Path(directory), Path(system))
    async with running(spec) as machine:
        registry = spec.directory / "registry"
        pids = [machine.pid, *service_pids(registry), *(each.pid for each in watchers(machine.pid))]
        print(json.dumps(pids), flush=True)
        await machine.ended()

anyio.run(main, *sys.argv[1:])
"""


async def test_of_two_at_once_nothing_lives_on_when_their_owners_are_killed(
        home: Home, spec: MachineSpec) -> None:
    assert spec.foreign is not None
    owners = [subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), home.machines / f"o{number}",
         str(spec.foreign.disk)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        for number in range(2)]
    pids: list[int] = []
    for owner in owners:
        assert owner.stdout is not None
        pids += json.loads(await anyio.to_thread.run_sync(owner.stdout.readline))
    assert len(set(pids)) == 6, "two machines, two services, two watchers"
    for owner in owners:
        owner.kill()
        owner.communicate()
    assert eventually(lambda: not any(map(alive, pids)), 5.0)
    for number in range(2):  # as a later start does, when they are old enough
        shutil.rmtree(ipc_directory(ipc_id_of(home.machines / f"o{number}" / "registry")),
                      ignore_errors=True)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- VBoxManage as it may be ----------------------------------------------------------------------


async def test_a_warning_before_each_answer_is_no_answer(
        spec: MachineSpec, pretend: Callable[[str], Path], tmp_path: Path) -> None:
    pretend('echo "WARNING: The vboxdrv kernel module is not loaded. Error: nothing works"; echo')
    async with running(replace(spec, network="nat")) as machine:
        await machine.suspend()
        await machine.resume()
        assert await machine.forward(0, 80) > 0
        assert machine.facts()["version"][0].isdigit()


@pytest.mark.parametrize("words", ["createvm machine", "createmedium disk"])
async def test_a_machine_whose_making_hangs_leaves_nothing(
        spec: MachineSpec, pretend: Callable[[str], Path], words: str) -> None:
    first = words.split()[0]
    pretend(f'[ "$1" = {first} ] && exec sleep 1000')
    before = open_descriptors()
    with impatient(), anyio.fail_after(PATIENCE), pytest.raises(HypervisorSilent):
        await VirtualBoxDriver().create(spec)
    assert nothing_of(spec.directory) == []
    assert open_descriptors() == before
    assert psutil.Process().children(recursive=True) == []


async def test_a_start_that_hangs_or_fails_leaves_nothing(
        spec: MachineSpec, pretend: Callable[[str], Path]) -> None:
    before = open_descriptors()
    for number, what in enumerate(("exec sleep 1000", "exit 1")):
        pretend("")
        own = replace(spec, directory=spec.directory.with_name(f"s{number}"), network="nat")
        own.directory.mkdir()
        machine = await VirtualBoxDriver().create(own)
        pretend(f'[ "$3" = --uart-mode1 ] && {what}')
        with impatient(), anyio.fail_after(PATIENCE), pytest.raises(VmjobError):
            await machine.start()
        assert open_descriptors() == before
        await machine.destroy()
        assert nothing_of(own.directory) == []
    assert psutil.Process().children(recursive=True) == []


async def test_a_call_that_hangs_while_it_runs_is_told_in_time_and_it_can_be_destroyed(
        spec: MachineSpec, pretend: Callable[[str], Path]) -> None:
    pretend('[ "$3" = pause ] && exec sleep 1000')
    async with running(spec) as machine:
        with impatient(), anyio.fail_after(PATIENCE), pytest.raises(HypervisorSilent):
            await machine.suspend()
        assert machine.get_status() is Status.RUNNING
        pretend("")
        await machine.suspend()
        assert machine.get_status() is Status.SUSPENDED


async def test_a_virtualbox_that_is_removed_meanwhile_is_missed(
        spec: MachineSpec, pretend: Callable[[str], Path]) -> None:
    place = pretend("")
    machine = await VirtualBoxDriver().create(spec)
    shutil.rmtree(place)
    with pytest.raises(ProgramMissing):
        await machine.start()
    await machine.destroy()
    assert nothing_of(spec.directory) == []


# -- what it is given -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b l a n k s", "ünï çödé 日本", "it's; $(x) & *", "l" * 150])
async def test_a_machines_directory_may_have_any_name(home: Home, spec: MachineSpec,
                                                      name: str) -> None:
    assert spec.foreign is not None
    assert spec.foreign.disk is not None
    place = home.machines / name
    place.mkdir()
    system = spec.foreign.disk.rename(place / "my disk")
    async with running(small(place / "machine", system)) as machine:
        assert machine.get_status() is Status.RUNNING


async def test_a_user_s_disks_are_never_written_and_a_floppy_disk_is(
        home: Home, spec: MachineSpec, tmp_path: Path) -> None:
    """Whatever the guest writes to a disk is lost with the machine; a floppy is the machine's."""
    spec.floppy.write_bytes(floppy_content("X"))
    first = letters_disk(tmp_path / "first", LETTERS_OF_THE_FLOPPY)
    spec = replace(spec, foreign=Foreign(first, floppy=True))
    before = first.read_bytes()
    machine = await VirtualBoxDriver().create(spec)
    try:
        await machine.start()
        await heard(machine, "YZ")
        assert eventually(lambda: spec.floppy.read_bytes() == floppy_content("Z"), PATIENCE)
        await machine.stop()
        assert spec.floppy.read_bytes() == floppy_content("Z")
    finally:
        await machine.destroy()
    assert first.read_bytes() == before
    for number, kind in enumerate(("raw", "vdi")):
        given = letters_disk(tmp_path / f"disk.{kind}", after="X", kind=kind)
        before = given.read_bytes()
        machine = await VirtualBoxDriver().create(small(home.machines / f"d{number}", given))
        try:
            await machine.start()
            await heard(machine, "YZ")
        finally:
            await machine.destroy()
        assert given.read_bytes() == before


def floppy_content(letter: str) -> bytes:
    return (bytes(512) + letter.encode()).ljust(1440 << 10, b"\0")


async def test_a_list_of_this_computers_files_is_no_cd(spec: MachineSpec, tmp_path: Path) -> None:
    """VirtualBox takes it for one, with these files in it."""
    secret = tmp_path / "secret"
    secret.write_text("of this computer")
    listed = tmp_path / "listed.iso"
    listed.write_text(f"--iprt-iso-maker-file-marker-bourne-sh={uuid.uuid4()}\n/secret={secret}\n")
    manage = Manage(programs.find(), spec.directory / "registry")
    try:
        assert "VBoxIsoMaker" in await manage.run("showmediuminfo", "dvd", str(listed))
    finally:
        await manage.close()
    with pytest.raises(DiskUnusable, match="not an image of a CD"):
        await VirtualBoxDriver().create(replace(spec, foreign=Foreign(iso=listed)))
    assert nothing_of(spec.directory) == []


async def test_a_name_that_virtualbox_cannot_have_is_told(home: Home, spec: MachineSpec,
                                                          in_virtualbox: MachineSpec) -> None:
    assert spec.foreign is not None
    assert spec.foreign.disk is not None
    odd = spec.foreign.disk.rename(spec.foreign.disk.with_name('the "disk"'))
    with pytest.raises(DiskUnusable, match="quotation mark"):
        await VirtualBoxDriver().create(replace(spec, foreign=Foreign(odd)))
    directory = home.machines / 'the "machine"'
    directory.mkdir()
    with pytest.raises(HomeUnusable, match="quotation mark"):
        await VirtualBoxDriver().create(replace(in_virtualbox, directory=directory))
    assert nothing_of(directory) == []


async def test_memory_that_is_not_there_is_missed_before_anything_starts(
        spec: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = await VirtualBoxDriver().create(spec)
    asked = machine._manage.started
    monkeypatch.setattr(driver_module, "memory", lambda: Memory(1 << 30, 64 << 20))
    with pytest.raises(HostMemoryLow):
        await machine.start()
    assert machine._manage.started == asked
    assert machine.pid is None
    await machine.destroy()


async def test_a_port_that_another_has_is_refused_and_others_are_given(spec: MachineSpec) -> None:
    async with running(replace(spec, network="nat")) as machine:
        first = await machine.forward(0, 80)
        with pytest.raises(PortTaken):
            await machine.forward(first, 81)
        await machine.unforward(first)
        assert await machine.forward(first, 81) == first


# -- cancelled, and left alone --------------------------------------------------------------------


async def test_a_start_that_is_cancelled_at_any_time_leaves_nothing(spec: MachineSpec) -> None:
    async with running(spec):
        pass
    before = open_descriptors()
    for number, seconds in enumerate((0.0, 0.1, 0.25, 0.4, 0.55, 0.7)):
        own = replace(spec, directory=spec.directory.with_name(f"c{number}"), network="nat")
        own.directory.mkdir()
        machine = await VirtualBoxDriver().create(own)
        starting = asyncio.ensure_future(machine.start())
        await asyncio.wait([starting], timeout=seconds)
        starting.cancel()
        await asyncio.wait([starting])
        await machine.destroy()
        assert nothing_of(own.directory) == []
        assert open_descriptors() == before
        assert psutil.Process().children(recursive=True) == []


async def test_a_machine_that_is_left_alone_asks_nothing_of_vboxmanage(
        spec: MachineSpec, record_property: Callable[[str, object], None]) -> None:
    machine = await VirtualBoxDriver().create(spec)
    began = time.monotonic()
    try:
        await machine.start()
        record_property("start_to_running_seconds", round(time.monotonic() - began, 3))
        asked = machine._manage.started
        record_property("questions_until_it_runs", asked)
        await anyio.sleep(3.0)  # nothing to be waited for: that nothing happens
        assert machine._manage.started == asked
    finally:
        await machine.destroy()
