"""One suite for every driver: what docs/reference/driver-contract.md promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anyio
import psutil
import pytest

from tests.conftest import awake, eventually, lend, open_descriptors
from vmjob.errors import (
    AgentLost,
    GuestRefused,
    NotSupported,
    TemplateUnusable,
    VmjobError,
    WrongState,
)
from vmjob.guest.client import AgentClient, Identity
from vmjob.home import Home
from vmjob.machine.contract import BootParts, Driver, EndReason, Machine, MachineSpec, Status
from vmjob.machine.fake import FakeDriver
from vmjob.machine.qemu.driver import QemuDriver
from vmjob.machine.virtualbox.driver import VirtualBoxDriver

pytestmark = pytest.mark.anyio

#: Seconds for a machine's agent to answer; TCG on a loaded computer.
BOOT = 120.0


DRIVERS: dict[str, Callable[[], Driver]] = {
    "fake": FakeDriver, "qemu": QemuDriver, "virtualbox": VirtualBoxDriver}


@pytest.fixture(params=["fake", pytest.param("qemu", marks=pytest.mark.vm),
                        pytest.param("virtualbox", marks=pytest.mark.vm)])
def driver(request: pytest.FixtureRequest) -> Driver:
    if request.param == "virtualbox":
        request.getfixturevalue("virtualbox")
    return DRIVERS[request.param]()


@pytest.fixture
def spec(driver: Driver, home: Home, request: pytest.FixtureRequest) -> MachineSpec:
    directory = home.machines / "m1"
    directory.mkdir()
    if driver.name == "fake":
        return MachineSpec(id="m1", directory=directory, boot=None)
    image = request.getfixturevalue("default_image")
    lend(image, home)
    if driver.name == "virtualbox":
        return replace(request.getfixturevalue("in_virtualbox"), id="m1", directory=directory)
    return MachineSpec(id="m1", directory=directory, boot=BootParts.of(image), memory_mb=256,
                       accelerator="tcg")


@asynccontextmanager
async def running(machine: Machine) -> AsyncIterator[AgentClient]:
    """The machine started, its agent answering."""
    client = AgentClient(await machine.start(), slowness=machine.spec.slowness)
    try:
        await awake(machine, client, BOOT)
        yield client
    finally:
        client.close()
        await machine.destroy()


def pid_of(machine: Machine) -> int:
    pid = machine.pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


async def test_the_life_of_a_machine(driver: Driver, spec: MachineSpec) -> None:
    """create, start, suspend, resume, stop, destroy; get_status at each step."""
    machine = await driver.create(spec)
    assert machine.get_status() is Status.CREATED
    client = AgentClient(await machine.start(), slowness=machine.spec.slowness)
    assert machine.get_status() is Status.RUNNING
    await awake(machine, client, BOOT)
    pid = pid_of(machine)

    await machine.suspend()
    await machine.suspend()
    assert machine.get_status() is Status.SUSPENDED
    before = psutil.Process(pid).cpu_times()
    with anyio.move_on_after(0.5) as waited:
        await client.ping(60)
    assert waited.cancelled_caught, "a suspended machine answers"
    after = psutil.Process(pid).cpu_times()
    assert after.user + after.system - before.user - before.system < 0.1

    await machine.resume()
    await machine.resume()
    assert machine.get_status() is Status.RUNNING
    await client.ping(60)

    await machine.stop()
    await machine.stop()
    assert machine.get_status() is Status.STOPPED
    assert not psutil.pid_exists(pid)
    assert (await machine.ended()).reason is EndReason.ASKED
    client.close()
    await machine.destroy()
    await machine.destroy()
    assert machine.get_status() is Status.DESTROYED
    assert not spec.directory.exists()


async def test_a_command_goes_on_over_suspend_and_resume(driver: Driver,
                                                         spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    got = b""

    async def take(stream: str, data: bytes) -> None:
        nonlocal got
        got += data

    async with running(machine) as client:
        task = await client.start(
            ["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.1; done"])
        async with anyio.create_task_group() as group:
            group.start_soon(client.follow, task, take)
            for _ in range(4):
                await machine.suspend()
                await machine.resume()
    assert got.split() == [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8"]


async def test_no_deadline_comes_nearer_while_a_machine_stands_still(driver: Driver,
                                                                    spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    async with running(machine) as client:
        client.stand_still()
        await machine.suspend()
        asked = anyio.Event()

        async def ask() -> None:
            asked.set()
            await client.ping(deadline=3.0)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await asked.wait()
            await anyio.sleep(3.5)  # longer than the deadline, on purpose
            await machine.resume()
            client.go_on()
        await client.set_clock()


async def test_copies_of_a_frozen_machine_answer_side_by_side(driver: Driver, spec: MachineSpec,
                                                             home: Home) -> None:
    """start, freeze; then create and start with the files as a template, twice at once."""
    assert driver.capabilities.templates
    machine = await driver.create(replace(spec, freezable=True))
    client = AgentClient(await machine.start(), slowness=machine.spec.slowness)
    try:
        await awake(machine, client, BOOT)
        await client.sleep()
        with pytest.raises(GuestRefused):
            await client.ping()
        files = await machine.freeze()
    finally:
        client.close()
    assert machine.get_status() is Status.STOPPED
    template = home.root / "frozen"
    template.mkdir()
    for name in files:
        (spec.directory / name).rename(template / name)
    kept = {name: (template / name).read_bytes()[:1 << 20] for name in files}
    await machine.destroy()
    copies, clients = [], []
    try:
        for number in range(2):
            directory = home.machines / f"c{number}"
            directory.mkdir()
            copies.append(await driver.create(
                replace(spec, id=f"c{number}", directory=directory, template=template)))
            clients.append(AgentClient(await copies[-1].start(), clean=True))
        for number, client in enumerate(clients):
            await client.introduce(Identity.fresh(f"copy{number}", network=False), BOOT)
            await client.mkdir("of-its-own")
            task = await client.start(["true"])
            assert (await client.follow(task, ignore)).exit_code == 0
            assert [entry.name for entry in await client.ls()] == ["of-its-own"]
    finally:
        for client in clients:
            client.close()
        for copy in copies:
            await copy.destroy()
    assert kept == {name: (template / name).read_bytes()[:1 << 20] for name in files}


async def ignore(stream: str, data: bytes) -> None: ...


async def test_only_a_machine_that_was_made_for_it_can_be_frozen(driver: Driver,
                                                                 spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    async with running(machine):
        with pytest.raises(WrongState):
            await machine.freeze()


async def test_a_template_that_is_not_there_is_unusable(driver: Driver, spec: MachineSpec) -> None:
    empty = spec.directory.with_name("empty")
    empty.mkdir()
    with pytest.raises(TemplateUnusable):
        await driver.create(replace(spec, template=empty))


async def test_create_starts_nothing_and_destroy_leaves_nothing(driver: Driver,
                                                                spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    assert psutil.Process().children(recursive=True) == []
    await machine.destroy()
    assert not spec.directory.exists()


async def test_load_takes_up_what_create_made(driver: Driver, spec: MachineSpec) -> None:
    await driver.create(spec)
    machine = await driver.load(spec)
    async with running(machine) as client:
        await client.ping()
    with pytest.raises(WrongState):
        await driver.load(spec)


async def test_calls_in_the_wrong_state_are_refused(driver: Driver, spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    for call in (machine.suspend, machine.ended):
        with pytest.raises(WrongState):
            await call()
    async with running(machine):
        with pytest.raises(WrongState):
            await machine.start()
    with pytest.raises(WrongState):
        await machine.start()


async def test_a_machine_stopped_before_its_start_is_stopped(driver: Driver,
                                                             spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    await machine.stop()
    assert machine.get_status() is Status.STOPPED
    await machine.destroy()


async def test_a_driver_without_checkpoints_says_so(driver: Driver, spec: MachineSpec) -> None:
    if driver.capabilities.checkpoint:
        pytest.skip("this driver makes checkpoints")
    machine = await driver.create(spec)
    with pytest.raises(NotSupported):
        await machine.checkpoint(spec.directory, "1", lambda: None)
    await machine.destroy()


async def test_a_hypervisor_that_somebody_kills_is_told_as_that(driver: Driver,
                                                               spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    async with running(machine) as client:
        os.kill(pid_of(machine), signal.SIGKILL)
        with anyio.fail_after(30):
            ended = await machine.ended()
        assert ended.reason is EndReason.KILLED
        assert "signal 9" in ended.detail
        assert machine.get_status() is Status.STOPPED
        await machine.stop()
        # What happened can be looked up: the engine keeps these, under their last names.
        assert [name for name in machine.logs if (spec.directory / name).is_file()] == list(
            machine.logs)
        assert len({name.rpartition("/")[2] for name in machine.logs}) == len(machine.logs)
        with pytest.raises(VmjobError):
            await client.ping()


async def test_a_machine_without_its_agent_ends_and_says_so(driver: Driver,
                                                            spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    async with running(machine) as client:
        # The agent is the parent of a job's first process; in a machine only root may end it.
        user = "root" if driver.capabilities.isolated else None
        with suppress(AgentLost):  # it may not live long enough to answer
            await client.start(["sh", "-c", "kill -9 $PPID; exec sleep 1000"], user=user)
        with anyio.fail_after(60):
            ended = await machine.ended()
        assert ended.reason is EndReason.RESET
        assert "agent ended" in ended.detail
        assert machine.get_status() is Status.STOPPED


async def test_a_request_that_a_suspension_cut_short_is_answered_after_it(
        driver: Driver, spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    async with running(machine) as client:
        await machine.suspend()
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await client.ping(60))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            assert answers == []
            await machine.resume()
        assert len(answers) == 1


async def test_a_suspended_machine_can_be_stopped(driver: Driver, spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    async with running(machine):
        await machine.suspend()
        pid = pid_of(machine)
        with anyio.fail_after(60):
            await machine.stop()
        assert not psutil.pid_exists(pid)
        assert (await machine.ended()).reason is EndReason.ASKED


async def test_a_machine_whose_start_failed_can_be_destroyed(
        driver: Driver, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = await driver.create(spec)
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")  # neither a hypervisor nor setpriv is found
        patch.setenv("VMJOB_VIRTUALBOX", "/nonexistent")
        with pytest.raises(VmjobError):
            await machine.start()
    await machine.destroy()
    await machine.destroy()
    assert not spec.directory.exists()
    assert machine.get_status() is Status.DESTROYED
    assert open_descriptors() <= before
    assert psutil.Process().children(recursive=True) == []


async def test_nothing_can_be_done_with_what_is_destroyed(driver: Driver,
                                                          spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    await machine.destroy()
    for call in (machine.start, machine.suspend, machine.resume, machine.ended):
        with pytest.raises(WrongState):
            await call()
    await machine.stop()
    assert machine.get_status() is Status.DESTROYED


async def test_everybody_who_waits_for_the_end_is_told(driver: Driver, spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    told: list[EndReason] = []

    async def wait() -> None:
        told.append((await machine.ended()).reason)

    async with running(machine):
        async with anyio.create_task_group() as impatient:
            impatient.start_soon(machine.ended)
            await anyio.wait_all_tasks_blocked()
            impatient.cancel_scope.cancel()  # who gives up waiting does not end the machine
        assert machine.get_status() is Status.RUNNING
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await machine.stop()
    assert told == [EndReason.ASKED] * 2


async def test_the_console_is_text_at_every_moment(driver: Driver, spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    assert machine.console() == ""
    async with running(machine):
        assert isinstance(machine.console(), str)
    assert isinstance(machine.console(), str)


async def test_the_facts_are_json(driver: Driver, spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    facts = json.loads(json.dumps(machine.facts()))
    assert facts["hypervisor"] == driver.name
    assert facts["memory_mb"] == spec.memory_mb
    await machine.destroy()


async def test_nothing_stays_open(driver: Driver, spec: MachineSpec) -> None:
    async with running(await driver.create(spec)):
        pass
    before = open_descriptors()
    again = replace(spec, directory=spec.directory.with_name("m2"))
    again.directory.mkdir()
    async with running(await driver.create(again)):
        pass
    assert open_descriptors() == before
    assert psutil.Process().children(recursive=True) == []


OWNER = """
import asyncio, sys
from pathlib import Path
from vmjob.machine.contract import BootParts, MachineSpec
from vmjob.machine.fake import FakeDriver
from vmjob.machine.qemu.driver import QemuDriver
from vmjob.machine.virtualbox.driver import VirtualBoxDriver

async def main(name, directory, accelerator, parts):
    boot = BootParts("", *map(Path, parts)) if parts else None
    driver = {"fake": FakeDriver, "qemu": QemuDriver, "virtualbox": VirtualBoxDriver}[name]()
    machine = await driver.create(MachineSpec("m1", Path(directory), boot, memory_mb=256,
                                              accelerator=accelerator))
    lanes = await machine.start()
    print(machine.pid, flush=True)
    await machine.ended()

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
"""


async def test_a_machine_dies_with_its_owner_even_when_that_is_killed(
        driver: Driver, spec: MachineSpec) -> None:
    parts = [] if spec.boot is None else [spec.boot.kernel, spec.boot.initrd, spec.boot.root,
                                          spec.boot.scratch, spec.boot.loader]
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), driver.name, spec.directory,
         spec.accelerator, *parts],
        stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        machine = psutil.Process(pid)
        assert machine.is_running()
        owner.kill()
    assert eventually(lambda: not psutil.pid_exists(pid)
                      or machine.status() == psutil.STATUS_ZOMBIE)


async def test_everything_a_machine_writes_is_in_its_directory(driver: Driver, spec: MachineSpec,
                                                               tmp_path: Path) -> None:
    machine = await driver.create(spec)
    async with running(machine) as client:
        await client.start(["true"])
        used = {path for path in tmp_path.rglob("*") if path.is_file()}
        outside = {path for path in used if spec.directory not in path.parents
                   and "images" not in path.parts}
        assert outside == set()
