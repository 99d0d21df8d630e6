"""The fake machine ends with everything in it, and goes wrong exactly as it is told to."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import anyio
import psutil
import pytest

from tests.conftest import eventually, open_descriptors
from vmjob.errors import AgentLost, AgentProtocol, AgentSilent, AgentVersion, MachineStartFailed
from vmjob.guest.client import AgentClient
from vmjob.home import Home
from vmjob.machine.contract import EndReason, MachineSpec, Status
from vmjob.machine.fake import FakeDriver, FakeMachine, Faults

pytestmark = pytest.mark.anyio

#: Leaves the machine as far as a job can: its parent gone; a session, a directory and an
#: environment of its own.
DAEMON = ("mkfifo f; (setsid env -i /bin/sh -c 'cd /; echo $$ > \"$0\"; exec sleep 1000' "
          "\"$PWD/f\" &); cat f; exec sleep 1000")


@pytest.fixture
def spec(home: Home) -> MachineSpec:
    directory = home.machines / "m1"
    directory.mkdir()
    return MachineSpec(id="m1", directory=directory, boot=None)


@asynccontextmanager
async def started(spec: MachineSpec,
                  faults: Faults | None = None) -> AsyncIterator[tuple[FakeMachine, AgentClient]]:
    machine = await FakeDriver(faults).create(spec)
    client = AgentClient(await machine.start())
    try:
        yield machine, client
    finally:
        client.close()
        await machine.destroy()


async def daemon_of(client: AgentClient, script: str = DAEMON) -> psutil.Process:
    """A process that a job of the machine left behind."""
    found: list[bytes] = []
    heard = anyio.Event()

    async def take(stream: str, data: bytes) -> None:
        found.append(data)
        heard.set()

    await client.hello(30)
    task = await client.start(["sh", "-c", script])
    async with anyio.create_task_group() as group:
        group.start_soon(client.follow, task, take)
        await heard.wait()
        group.cancel_scope.cancel()
    return psutil.Process(int(b"".join(found)))


def gone(process: psutil.Process) -> bool:
    return eventually(lambda: not process.is_running()
                      or process.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("suspended", [False, True])
async def test_a_job_that_hides_ends_with_its_machine(spec: MachineSpec, suspended: bool) -> None:
    async with started(spec) as (machine, client):
        daemon = await daemon_of(client)
        if suspended:
            await machine.suspend()
            assert eventually(lambda: daemon.status() == psutil.STATUS_STOPPED)
        await machine.stop()
        assert not daemon.is_running()


async def test_a_suspended_machine_runs_none_of_its_jobs(spec: MachineSpec) -> None:
    async with started(spec) as (machine, client):
        daemon = await daemon_of(client)
        await machine.suspend()
        below = psutil.Process(machine.pid).children(recursive=True)
        assert daemon in below
        assert all(eventually(lambda one=one: one.status() == psutil.STATUS_STOPPED)
                   for one in below)
        await machine.resume()
        assert all(eventually(lambda one=one: one.status() != psutil.STATUS_STOPPED)
                   for one in below)


async def test_jobs_end_with_their_agent(spec: MachineSpec) -> None:
    async with started(spec) as (machine, client):
        daemon = await daemon_of(client)
        assert machine.agent_pid is not None
        os.kill(machine.agent_pid, signal.SIGKILL)
        with anyio.fail_after(20):
            ended = await machine.ended()
        assert (ended.reason, ended.detail) == (
            EndReason.RESET, "the machine ended: agent ended by signal 9")
        assert not daemon.is_running()


async def test_jobs_end_when_the_keeper_is_killed(spec: MachineSpec) -> None:
    async with started(spec) as (machine, client):
        daemon = await daemon_of(client, "echo $$; exec sleep 1000")
        agent = psutil.Process(machine.agent_pid)
        assert machine.pid is not None
        os.kill(machine.pid, signal.SIGKILL)
        with anyio.fail_after(20):
            assert (await machine.ended()).reason is EndReason.KILLED
        assert gone(agent)
        assert gone(daemon)


OWNER = """
import asyncio, sys
from pathlib import Path
from tests.unit.machine.test_fake import daemon_of, started
from vmjob.machine.contract import MachineSpec

async def main():
    async with started(MachineSpec("m1", Path(sys.argv[1]), None)) as (machine, client):
        daemon = await daemon_of(client)
        if sys.argv[2] == "suspended":
            await machine.suspend()
        print(machine.pid, machine.agent_pid, daemon.pid, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["running", "suspended"])
def test_everything_ends_when_the_owner_is_killed(spec: MachineSpec, state: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(spec.directory), state],
                             stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        all_of_it = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        assert len(all_of_it) == 3
        owner.kill()
    assert all(gone(one) for one in all_of_it)


async def test_a_keeper_that_somebody_ends_is_no_end_that_was_asked_for(spec: MachineSpec) -> None:
    async with started(spec) as (machine, client):
        await client.hello(30)
        assert machine.pid is not None
        os.kill(machine.pid, signal.SIGTERM)
        with anyio.fail_after(20):
            assert (await machine.ended()).reason is EndReason.CRASHED


async def test_a_start_that_fails_says_why_and_leaves_nothing(spec: MachineSpec) -> None:
    machine = await FakeDriver(Faults(start="out of luck")).create(spec)
    with pytest.raises(MachineStartFailed, match="out of luck"):
        await machine.start()
    await machine.destroy()
    assert not spec.directory.exists()
    assert machine.get_status() is Status.DESTROYED


@pytest.mark.parametrize(("faults", "error", "match"), [
    (Faults(says=b""), AgentSilent, "no answer"),
    (Faults(says=b"\xff" * 60_000), AgentSilent, "no answer"),
    (Faults(answers=b"\xff\r\n\r\n"), AgentProtocol, "status line"),
    (Faults(answers=b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]"), AgentProtocol, "object"),
    (Faults(endless_head=True), AgentProtocol, "head without end"),
    (Faults(protocol=99), AgentVersion, "speaks protocol 99 to 99"),
    (Faults(dies_after=0), AgentLost, "closed")])
async def test_an_agent_goes_wrong_as_told(spec: MachineSpec, faults: Faults,
                                           error: type[Exception], match: str) -> None:
    async with started(spec, faults) as (_, client):
        silent = error is AgentSilent
        with pytest.raises(error, match=match):
            await client.hello(0.5 if silent else 30)


async def test_an_agent_dies_after_the_number_of_requests_that_was_asked(
        spec: MachineSpec) -> None:
    async with started(spec, Faults(dies_after=3)) as (machine, client):
        await client.hello(30)
        await client.ping()
        await client.ping()
        with pytest.raises(AgentLost):
            await client.ping()
        assert (await machine.ended()).detail == "the machine ended: agent ended with status 70"


async def test_a_panic_is_read_from_the_console(spec: MachineSpec) -> None:
    faults = Faults(dies_after=0, console="Kernel panic - not syncing: out of luck\n")
    async with started(spec, faults) as (machine, client):
        with pytest.raises(AgentLost):
            await client.hello(30)
        assert (await machine.ended()).reason is EndReason.PANIC
        assert "out of luck" in machine.console()


async def test_a_start_that_is_cancelled_at_once_leaves_nothing(spec: MachineSpec) -> None:
    for _ in range(3):
        machine = await FakeDriver().create(spec)
        before = open_descriptors()
        lanes: Mapping[str, socket.socket] = {}
        with anyio.CancelScope() as scope:
            scope.cancel()
            lanes = await machine.start()  # on a busy computer it may be there before we look
            await anyio.lowlevel.checkpoint()
        for lane in lanes.values():
            lane.close()
        assert scope.cancelled_caught
        await machine.destroy()
        assert psutil.Process().children(recursive=True) == []
        assert open_descriptors() <= before
        spec.directory.mkdir()


@pytest.mark.parametrize("after", [0.0, 0.002, 0.01, 0.03])
async def test_a_start_that_is_cancelled_in_the_middle_leaves_nothing(spec: MachineSpec,
                                                                      after: float) -> None:
    machine = await FakeDriver().create(spec)
    before = open_descriptors()

    async def start_and_stay() -> None:
        lanes = await machine.start()
        for sock in lanes.values():
            sock.close()
        await anyio.sleep_forever()

    with pytest.raises(TimeoutError):  # a native cancellation, which no anyio shield stops
        await asyncio.wait_for(start_and_stay(), after)
    await machine.destroy()
    assert psutil.Process().children(recursive=True) == []
    assert open_descriptors() <= before


def test_faults_survive_their_way_to_the_impostor() -> None:
    faults = Faults(says=b"\0\xff", answers=b"", protocol=3, result={"exit_code": 300})
    assert Faults.decoded(faults.encoded()) == faults
    assert faults.needs_impostor
    assert not Faults(start="x", console="y").needs_impostor


def test_the_fake_needs_no_hypervisors_code() -> None:
    code = "import sys, vmjob.machine.fake; print([m for m in sys.modules if 'qemu' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
