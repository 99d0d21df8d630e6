"""The simulated machine is a machine, and continues from its checkpoints as a real one does."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.conftest import open_descriptors
from vmjob.errors import (
    AgentLost,
    CheckpointFailed,
    CheckpointUnusable,
    CommandNotFound,
    HostDiskFull,
    MachineStartFailed,
    NotSupported,
    VmjobError,
    WrongState,
)
from vmjob.guest.client import AgentClient, Identity
from vmjob.home import Home
from vmjob.machine.contract import Checkpoint, EndReason, MachineSpec, Saved, Status
from vmjob.machine.fake import SimulatedDriver, SimulatedFaults, SimulatedMachine
from vmjob.machine.fake.programs import hash_chain

pytestmark = pytest.mark.anyio


@pytest.fixture
def spec(home: Home) -> MachineSpec:
    directory = home.machines / "m1"
    directory.mkdir()
    return MachineSpec(id="m1", directory=directory, boot=None)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    return directory


@asynccontextmanager
async def running(spec: MachineSpec, faults: SimulatedFaults | None = None, *, tick: float = 0.001,
                  steps: int = 20) -> AsyncIterator[tuple[SimulatedMachine, AgentClient]]:
    spec.directory.mkdir(exist_ok=True)
    machine = await SimulatedDriver(faults, tick=tick, steps=steps).create(spec)
    client = AgentClient(await machine.start())
    try:
        yield machine, client
    finally:
        client.close()
        await machine.destroy()


def continuing(spec: MachineSpec, kept: Path, checkpoint: Checkpoint) -> MachineSpec:
    directory = spec.directory.with_name(f"{spec.directory.name}c")
    return replace(spec, directory=directory, saved=Saved(kept, checkpoint.state))


class Heard:
    """The output of one command."""

    def __init__(self) -> None:
        self.said = {"stdout": b"", "stderr": b""}
        self.came = anyio.Event()

    async def take(self, stream: str, data: bytes) -> None:
        self.said[stream] += data
        self.came.set()
        self.came = anyio.Event()

    async def bytes(self, count: int) -> None:
        with anyio.fail_after(30):
            while len(self.said["stdout"]) < count:
                await self.came.wait()


async def run(client: AgentClient, *argv: str) -> tuple[int | None, bytes, bytes]:
    heard = Heard()
    end = await client.follow(await client.start(list(argv)), heard.take)
    return end.exit_code, heard.said["stdout"], heard.said["stderr"]


async def test_programs_do_what_they_say(spec: MachineSpec) -> None:
    async with running(spec) as (_, client):
        assert (await client.hello(10)).workdir == str(spec.directory / "job")
        assert await run(client, "true") == (0, b"", b"")
        assert await run(client, "fail", "7") == (7, b"", b"")
        assert await run(client, "count", "3") == (0, b"1\n2\n3\n", b"")
        code, out, _ = await run(client, "hash-chain", "1000", "300", "hashes")
        assert (code, out) == (0, hash_chain(1000, 300))
        assert len(out.split()) == 4
        assert (spec.directory / "job" / "hashes").read_bytes() == out
        code, out, err = await run(client, "hash-chain", "many")
        assert (code, out, err[:11]) == (2, b"", b"hash-chain:")
        with pytest.raises(CommandNotFound):
            await client.start(["sh"])


async def test_a_program_waits_for_a_host_that_takes_no_output(spec: MachineSpec) -> None:
    async with running(spec, tick=0, steps=100_000) as (_, client):
        task = await client.start(["count", "400000"])
        heard = Heard()
        assert (await client.follow(task, heard.take)).exit_code == 0
        assert heard.said["stdout"] == b"".join(b"%d\n" % n for n in range(1, 400_001))


async def test_input_comes_back_from_cat(spec: MachineSpec) -> None:
    pieces = [os.urandom(100_000) for _ in range(20)]
    whole = b"".join(pieces)

    async def source() -> bytes:
        return pieces.pop(0) if pieces else b""

    async with running(spec) as (_, client):
        task = await client.start(["cat"], stdin=True)
        heard = Heard()
        async with anyio.create_task_group() as group:
            group.start_soon(client.feed, task, source)
            assert (await client.follow(task, heard.take)).exit_code == 0
        assert heard.said["stdout"] == whole


async def test_messages_come_before_the_end(spec: MachineSpec) -> None:
    heard: list[str] = []
    async with running(spec) as (_, client):
        client.on_message(heard.append)
        await run(client, "report", "50")
        assert heard == [f"fraction_done {n / 50}" for n in range(1, 51)]


async def test_a_signal_ends_what_waits(spec: MachineSpec) -> None:
    async with running(spec) as (_, client):
        task = await client.start(["wait"])
        await client.signal(task, 15, why="time-limit")
        end = await client.follow(task, Heard().take)
        assert (end.signal, end.ended_by) == (15, "time-limit")


async def test_while_it_is_suspended_nothing_happens(spec: MachineSpec) -> None:
    async with running(spec) as (machine, client):
        task = await client.start(["hash-chain", "100000000", "10"])
        heard = Heard()
        async with anyio.create_task_group() as group:
            group.start_soon(client.follow, task, heard.take)
            await heard.bytes(1000)
            await machine.suspend()
            await machine.suspend()
            assert machine.get_status() is Status.SUSPENDED
            ticks = machine.ticks
            with anyio.move_on_after(0.02) as waited:
                await client.ping()
            assert waited.cancelled_caught
            assert machine.ticks == ticks
            await machine.resume()
            await client.ping()
            await heard.bytes(len(heard.said["stdout"]) + 1000)
            assert machine.ticks > ticks
            group.cancel_scope.cancel()


async def test_files_go_in_and_out_and_with_a_checkpoint(spec: MachineSpec, kept: Path,
                                                         tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "file").write_bytes(os.urandom(300_000))
    (tree / "link").symlink_to("below/file")
    async with running(spec) as (machine, client):
        await client.put(tree, "tree")
        checkpoint = await machine.checkpoint(kept, "1", lambda: None)
        await client.delete("tree")
    async with running(continuing(spec, kept, checkpoint)) as (_, client):
        assert [entry.name for entry in await client.ls("tree")] == ["below", "link"]
        await client.get("tree", tmp_path / "again", limit=1 << 20)
    assert (tmp_path / "again" / "link").read_bytes() == (tree / "below" / "file").read_bytes()


async def test_a_transfer_stands_still_with_the_machine_and_goes_on(
        spec: MachineSpec, kept: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(8 << 20))
    moved = anyio.Event()

    def progress(done: int, total: int | None = None) -> None:
        moved.set()

    async with running(spec) as (machine, client):
        async with anyio.create_task_group() as group:
            group.start_soon(client.put, source, "target", progress)
            await moved.wait()
            for count in range(5):
                await machine.checkpoint(kept, str(count), lambda: None)
                await machine.suspend()
                await machine.resume()
        assert (spec.directory / "job" / "target").read_bytes() == source.read_bytes()


async def test_what_continues_knows_all_that_was_known(spec: MachineSpec, kept: Path) -> None:
    identity = Identity.fresh("one", network=False)
    async with running(spec, steps=1) as (machine, client):
        await client.hello(10)
        await client.introduce(identity)
        done = await client.start(["count", "5"])
        heard = Heard()
        await client.follow(done, heard.take)
        task = await client.start(["hash-chain", "1000", "10"])
        await client.message_to_guest("hello")
        checkpoint = await machine.checkpoint(kept, "1", lambda: None)
    async with running(continuing(spec, kept, checkpoint)) as (machine, client):
        hello = await client.hello(10)
        assert hello.generation == identity.machine_id
        assert (machine.spec.directory / "run" / "from-host").read_text() == "hello\n"
        heard = Heard()
        # What the host had was not acknowledged beyond the last question: all comes again.
        end = await client.follow(task, heard.take)
        assert (end.exit_code, heard.said["stdout"]) == (0, hash_chain(1000, 10))
        assert await client.start(["true"]) == task + 1


async def test_a_question_that_waited_is_not_answered_twice(spec: MachineSpec, kept: Path) -> None:
    """The guest remembers a long poll of a host that is gone; the new one resynchronises."""
    async with running(spec) as (machine, client):
        task = await client.start(["cat"], stdin=True)
        async with anyio.create_task_group() as group:
            group.start_soon(client.follow, task, Heard().take)
            with anyio.fail_after(10):
                while machine._guest is None or machine._guest._waiting is None:
                    await anyio.lowlevel.checkpoint()
            checkpoint = await machine.checkpoint(kept, "1", lambda: None)
            group.cancel_scope.cancel()
    async with running(continuing(spec, kept, checkpoint)) as (machine, client):
        heard = Heard()
        async with anyio.create_task_group() as group:
            group.start_soon(client.follow, task, heard.take)
            pieces = [b"more\n"]

            async def source() -> bytes:
                return pieces.pop(0) if pieces else b""

            await client.feed(task, source)
        assert heard.said["stdout"] == b"more\n"


async def test_unchanged_files_are_written_once(spec: MachineSpec, kept: Path) -> None:
    async with running(spec) as (machine, client):
        first = await machine.checkpoint(kept, "1", lambda: None)
        second = await machine.checkpoint(kept, "2", lambda: None)
        await client.mkdir("new")
        third = await machine.checkpoint(kept, "3", lambda: None)
    assert set(first.files) == {"base", "1.disk", "1.state"}
    assert set(second.files) == {"base", "1.disk", "2.state"}
    assert set(third.files) == {"base", "3.disk", "3.state"}
    assert second.written_bytes == (kept / "2.state").stat().st_size
    assert {path.name for path in kept.iterdir()} == {
        "base", "1.disk", "1.state", "2.state", "3.disk", "3.state"}


async def test_the_clock_is_set_and_the_seed_kept(spec: MachineSpec) -> None:
    async with running(spec) as (machine, client):
        for body, seeds in (({"time": 1.5}, 0), ({"time": 2, "seed": ""}, 0),
                            ({"time": 3, "seed": "ab" * 64}, 1)):
            await client._control.request("POST", "/v1/clock", body)
            assert len(machine.seeds) == seeds
        for bad in ({}, {"time": "soon"}, {"time": 1, "seed": "ab"}):
            with pytest.raises(VmjobError):
                await client._control.request("POST", "/v1/clock", bad)


# -- faults --------------------------------------------------------------------------------------


async def test_a_start_fails_as_it_is_told_to(spec: MachineSpec, kept: Path) -> None:
    driver = SimulatedDriver(SimulatedFaults(start="no room", restore="no good"))
    machine = await driver.create(spec)
    with pytest.raises(MachineStartFailed, match="no room"):
        await machine.start()
    machine.faults = replace(machine.faults, start=None)
    client = AgentClient(await machine.start())
    checkpoint = await machine.checkpoint(kept, "1", lambda: None)
    client.close()
    await machine.destroy()
    again = continuing(spec, kept, checkpoint)
    again.directory.mkdir()
    driver.faults = SimulatedFaults(restore="no good")
    machine = await driver.create(again)
    with pytest.raises(CheckpointUnusable, match="no good"):
        await machine.start()
    await machine.destroy()


@pytest.mark.parametrize(("faults", "error", "calls"), [
    (SimulatedFaults(before_still="before"), CheckpointFailed, 0),
    (SimulatedFaults(after_still="after"), CheckpointFailed, 1),
    (SimulatedFaults(disk_full="full"), HostDiskFull, 1)])
async def test_a_checkpoint_fails_as_it_is_told_to_and_the_guest_goes_on(
        spec: MachineSpec, kept: Path, faults: SimulatedFaults, error: type[VmjobError],
        calls: int) -> None:
    async with running(spec) as (machine, client):
        called: list[int] = []
        machine.faults = faults
        with pytest.raises(error, match=r"before|after|full"):
            await machine.checkpoint(kept, "1", lambda: called.append(1))
        assert len(called) == calls
        assert list(kept.iterdir()) == []
        await client.ping()
        machine.faults = SimulatedFaults()
        await machine.checkpoint(kept, "1", lambda: None)


async def test_it_dies_at_its_tick(spec: MachineSpec) -> None:
    async with running(spec, SimulatedFaults(dies_at_tick=5)) as (machine, client):
        task = await client.start(["wait"])
        with pytest.raises(AgentLost):
            await client.follow(task, Heard().take)
        ended = await machine.ended()
        assert ended.reason is EndReason.CRASHED
        assert "tick 5" in ended.detail
        assert machine.get_status() is Status.STOPPED


async def test_it_dies_in_the_midst_of_a_checkpoint(spec: MachineSpec, kept: Path) -> None:
    async with running(spec, SimulatedFaults(dies_while_still=True)) as (machine, client):
        with pytest.raises(CheckpointFailed):
            await machine.checkpoint(kept, "1", lambda: None)
        assert (await machine.ended()).reason is EndReason.CRASHED
        assert list(kept.iterdir()) == []
        with pytest.raises(WrongState):
            await machine.checkpoint(kept, "1", lambda: None)


async def test_what_the_agent_dies_of_ends_the_machine(spec: MachineSpec,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(spec) as (machine, client):
        assert machine._guest is not None
        monkeypatch.setattr(machine._guest.programs, "_run", None)
        task = await client.start(["wait"])
        with pytest.raises(AgentLost):
            await client.follow(task, Heard().take)
        ended = await machine.ended()
        assert ended.reason is EndReason.CRASHED
        assert "not callable" in ended.detail


# -- the contract ----------------------------------------------------------------------------------


async def test_the_life_of_a_simulated_machine(spec: MachineSpec) -> None:
    before, threads = open_descriptors(), threading.active_count()
    machine = await SimulatedDriver().create(spec)
    assert machine.get_status() is Status.CREATED
    for call in (machine.suspend, machine.resume, machine.ended):
        with pytest.raises(WrongState):
            await call()
    client = AgentClient(await machine.start())
    await client.ping()
    with pytest.raises(WrongState):
        await machine.start()
    with pytest.raises(NotSupported):
        await machine.freeze()
    assert machine.console() == ""
    assert machine.facts()["hypervisor"] == "simulated"
    await machine.suspend()
    await machine.stop()
    await machine.stop()
    assert machine.get_status() is Status.STOPPED
    assert (await machine.ended()).reason is EndReason.ASKED
    with pytest.raises(AgentLost):
        await client.ping()
    client.close()
    await machine.destroy()
    await machine.destroy()
    assert machine.get_status() is Status.DESTROYED
    assert not spec.directory.exists()
    assert open_descriptors() <= before
    assert len([each for each in threading.enumerate() if "simulated" in each.name]) == 0, threads


async def test_load_takes_up_what_was_made(spec: MachineSpec) -> None:
    driver = SimulatedDriver()
    with pytest.raises(WrongState):
        await driver.load(spec)
    await driver.create(spec)
    machine = await driver.load(spec)
    client = AgentClient(await machine.start())
    await client.ping()
    client.close()
    with anyio.fail_after(10):
        assert (await machine.ended()).reason is EndReason.RESET
    await machine.destroy()
