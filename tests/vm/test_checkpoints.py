"""Checkpoints of guests that never rest, and of many in a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anyio
import pytest
from qemu.qmp import QMPClient

import vmjob
from vmjob.errors import CheckpointFailed, MachineError
from vmjob.guest.client import Stream
from vmjob.home import Home
from vmjob.machine.qemu import monitor, taking
from vmjob.machine.qemu.pages import PageWriter

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

#: Writes all the time, to places that it compares: a page of a checkpoint that is older than
#: another one shows at once. It changes to no other process, which would hide a fault of QEMU's
#: (docs/decisions/009-checkpoints.md).
RESTLESS = """
import sys
first, second, value, count = [0] * 4000, [0] * 4000, 1, 0
while True:
    for _ in range(5000):
        value = (value * 1103515245 + 12345) & 0x7fffffff
        place = value % 4000
        if first[place] != second[place]:
            sys.exit("a page is older than another")
        count += 1
        first[place] = second[place] = count
    print(count, flush=True)
"""
LINES = 3


async def go_on(machine: vmjob.AsyncMachine, task: int,
                offsets: dict[Stream, int]) -> None:
    """Let the job print some lines; raises when it has ended."""
    got = b""
    enough = anyio.Event()

    async def take(stream: Stream, data: bytes) -> None:
        nonlocal got
        offsets[stream] += len(data)
        got += data
        if got.count(b"\n") >= LINES:
            enough.set()

    session = machine._session
    assert session is not None

    async def follow() -> None:
        end = await session.client.follow(task, take, dict(offsets))
        raise AssertionError(f"the job ended: {end}, {got[-300:]!r}")

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        with anyio.fail_after(60):
            await enough.wait()
        group.cancel_scope.cancel()


async def kept_and_continued(slot: Path, home: Home, times: int) -> list[vmjob.Kept]:
    """Checkpoints of the restless job, each continued."""
    offsets: dict[Stream, int] = {"stdout": 0, "stderr": 0}
    kept = []
    async with vmjob.AsyncMachine.create(memory_mb=256, accel="tcg", slot=slot,
                                         home=home.root) as machine:
        task = await machine.start(["python3", "-c", RESTLESS])
        await go_on(machine, task, offsets)
        kept.append(await machine.checkpoint())
    for _ in range(times):
        async with vmjob.AsyncMachine.restore(slot, home=home.root) as machine:
            assert machine.warnings == []
            await go_on(machine, task, offsets)
            kept.append(await machine.checkpoint())
    return kept


async def test_a_guest_that_writes_all_the_time_is_whole_after_each_restore(
        vm_home: Home, tmp_path: Path) -> None:
    kept = await kept_and_continued(tmp_path / "slot", vm_home, 6)
    assert all(each.written_bytes < 20e6 for each in kept)


async def test_what_qemu_found_while_the_guest_ran_is_never_used(
        vm_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives: list[bool] = []
    real = taking.Taking.catch_up

    async def noted(self: taking.Taking, *, live: bool) -> None:
        lives.append(live)
        await real(self, live=live)

    monkeypatch.setattr(taking.Taking, "catch_up", noted)
    # The reader never waits for the guest to be stopped, so QEMU looks while it runs.
    monkeypatch.setattr(PageWriter, "late_page", lambda *args: 1 << 40)
    monkeypatch.setattr(taking.Taking, "_is_late", lambda self: False)
    await kept_and_continued(tmp_path / "slot", vm_home, 1)
    assert lives == [True, False, True, False]


async def test_layers_of_the_disk_do_not_pile_up(vm_home: Home, tmp_path: Path) -> None:
    async with vmjob.AsyncMachine.create(memory_mb=256, accel="tcg", slot=tmp_path / "slot",
                                         home=vm_home.root) as machine:
        for number in range(12):
            await machine.run(["sh", "-c", f"echo {number} >> written; sync"])
            await machine.checkpoint()
            session = machine._session
            assert session is not None
            if merging := session.machine._merging:  # type: ignore[attr-defined]
                await merging
    disks = layers(tmp_path / "slot")
    assert 1 <= len(disks) <= 6
    async with vmjob.AsyncMachine.restore(tmp_path / "slot", home=vm_home.root) as machine:
        said = await machine.run(["cat", "written"])
        assert said.stdout_text.split() == [str(number) for number in range(12)]


@pytest.mark.parametrize("done", [True, False], ids=["done", "not done"])
async def test_a_disk_snapshot_without_an_answer_holds_up_no_job(
        vm_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    """Whether QEMU has made it or not is looked up."""
    offsets: dict[Stream, int] = {"stdout": 0, "stderr": 0}
    unanswered = 1

    async def execute(self: QMPClient, command: str, arguments: object = None,
                      oob: bool = False) -> object:
        nonlocal unanswered
        if command != "blockdev-snapshot" or not unanswered:
            return await real(self, command, arguments, oob)
        unanswered -= 1
        if done:
            await real(self, command, arguments, oob)
        return await anyio.sleep_forever()

    real = QMPClient.execute
    monkeypatch.setattr(QMPClient, "execute", execute)
    monkeypatch.setattr(monitor, "DEADLINE", 5.0)
    async with vmjob.AsyncMachine.create(memory_mb=256, accel="tcg", slot=tmp_path / "slot",
                                         priority="normal", home=vm_home.root) as machine:
        task = await machine.start(["python3", "-c", RESTLESS])
        await go_on(machine, task, offsets)
        with anyio.fail_after(60):
            if done:
                assert (await machine.checkpoint()).number == 1
            else:
                with pytest.raises(CheckpointFailed, match="did not answer blockdev-snapshot"):
                    await machine.checkpoint()
        assert unanswered == 0
        await go_on(machine, task, offsets)
        await machine.checkpoint()
    async with vmjob.AsyncMachine.restore(tmp_path / "slot", home=vm_home.root) as machine:
        await go_on(machine, task, offsets)


async def test_a_guest_that_cannot_be_let_go_on_is_ended_and_continued_from_before(
        vm_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU never ends its clearing up behind a checkpoint that has failed."""
    offsets: dict[Stream, int] = {"stdout": 0, "stderr": 0}

    async def execute(self: monitor.Monitor, command: str, **arguments: object) -> object:
        stuck = stuck_from and stuck_from.issubset({*done, command})
        done.append(command)
        if stuck and command == "migrate-continue":
            raise MachineError("QEMU refused migrate-continue")
        if stuck and command == "cont":
            raise MachineError("QEMU refused cont: the block device is not finalized")
        return await real(self, command, **arguments)

    done: list[str] = []
    stuck_from: set[str] = set()
    real = monitor.Monitor.execute
    monkeypatch.setattr(monitor.Monitor, "execute", execute)
    async with vmjob.AsyncMachine.create(memory_mb=256, accel="tcg", slot=tmp_path / "slot",
                                         priority="normal", home=vm_home.root) as machine:
        task = await machine.start(["python3", "-c", RESTLESS])
        await go_on(machine, task, offsets)
        await machine.checkpoint()
        before = dict(offsets)
        await go_on(machine, task, offsets)
        monkeypatch.setattr(taking, "FINISH", 3.0)
        done.clear()
        stuck_from.add("migrate-continue")
        with anyio.fail_after(60), pytest.raises(CheckpointFailed):
            await machine.checkpoint()
        assert "killed" in await machine.ended()
    stuck_from.clear()
    async with vmjob.AsyncMachine.restore(tmp_path / "slot", home=vm_home.root) as machine:
        assert machine.warnings == []
        await go_on(machine, task, before)


def layers(slot: Path) -> Mapping[str, int]:
    return {path.name: path.stat().st_size for path in (slot / "checkpoints").iterdir()
            if path.suffix in (".disk", ".merged")}
