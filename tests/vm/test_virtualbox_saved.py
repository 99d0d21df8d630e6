"""What a real VirtualBox has saved: damaged, struck while it is made, half of it lost."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.conftest import awake, eventually
from tests.vm.test_virtualbox import PATIENCE, alive, end, impatient, nothing_of
from vmjob.errors import (
    CheckpointFailed,
    CheckpointUnusable,
    HostDiskFull,
    HypervisorSilent,
    TemplateUnusable,
)
from vmjob.guest.client import AgentClient
from vmjob.home import Home
from vmjob.machine import links
from vmjob.machine.contract import EndReason, MachineSpec, Priority, Saved
from vmjob.machine.virtualbox.answers import Answer
from vmjob.machine.virtualbox.driver import VirtualBoxDriver, VirtualBoxMachine
from vmjob.machine.virtualbox.manage import Manage
from vmjob.machine.virtualbox.service import ipc_directory, ipc_id_of

pytestmark = [pytest.mark.anyio, pytest.mark.vm]


@pytest.fixture
def copied(home: Home, in_virtualbox: MachineSpec) -> MachineSpec:
    directory = home.machines / "m1"
    directory.mkdir()
    return replace(in_virtualbox, id="m1", directory=directory)


@pytest.fixture
def kept(home: Home) -> Path:
    directory = home.root / "checkpoints"
    directory.mkdir()
    return directory


def continued(copied: MachineSpec, kept: Path, state: dict[str, object]) -> MachineSpec:
    return replace(copied, boot=None, template=None,
                   saved=Saved(kept, json.loads(json.dumps(state))))


@asynccontextmanager
async def answering(spec: MachineSpec) -> AsyncIterator[tuple[VirtualBoxMachine, AgentClient]]:
    spec.directory.mkdir(exist_ok=True)
    machine = await VirtualBoxDriver().create(spec)
    try:
        client = AgentClient(await machine.start())
        try:
            await client.hello(PATIENCE) if spec.saved else await awake(machine, client, PATIENCE)
            yield machine, client
        finally:
            client.close()
    finally:
        await machine.destroy()
        assert nothing_of(spec.directory) == []


async def test_a_template_whose_memory_is_damaged_is_unusable(copied: MachineSpec,
                                                              home: Home) -> None:
    assert copied.template is not None
    bad = home.root / "bad"
    bad.mkdir()
    for path in copied.template.iterdir():
        os.link(path, bad / path.name)
    saved, = bad.glob("*.sav")
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 0x10
    saved.unlink()
    saved.write_bytes(content)
    machine = await VirtualBoxDriver().create(replace(copied, template=bad))
    try:
        with pytest.raises(TemplateUnusable):
            await machine.start()
    finally:
        await machine.destroy()
    assert nothing_of(copied.directory) == []


def fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(*names: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(links.os, "link", link)


async def test_a_copy_is_made_in_another_file_system_than_its_template(
        copied: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, errno.EXDEV)
    async with answering(copied) as (_, client):
        await client.ping()


async def test_without_room_for_a_copy_its_template_is_not_to_blame(
        copied: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*names: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fails(monkeypatch, errno.EXDEV)
    monkeypatch.setattr(links.shutil, "copyfile", full)
    with pytest.raises(HostDiskFull):
        await VirtualBoxDriver().create(copied)
    assert nothing_of(copied.directory) == []


async def test_a_machine_saves_itself_like_any_program_whatever_its_priority(
        copied: MachineSpec, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it stands still for long while others compute."""
    def policies() -> set[int]:
        return {os.sched_getscheduler(int(task.name))
                for task in Path(f"/proc/{machine.pid}/task").iterdir()
                if (task / "comm").read_text().startswith("EMT")}

    seen: dict[str, set[int]] = {}
    real = Manage.ask

    async def ask(self: Manage, *words: str, **more: float) -> Answer:
        seen[words[2] if words[0] == "controlvm" else words[0]] = policies()
        return await real(self, *words, **more)

    async with answering(copied) as (machine, _):
        assert policies() == {os.SCHED_IDLE}
        monkeypatch.setattr(Manage, "ask", ask)
        await machine.checkpoint(kept, "1", lambda: None)
        monkeypatch.undo()
        assert seen["pause"] == seen["snapshot"] == {os.SCHED_OTHER}
        assert policies() == {os.SCHED_IDLE}
        await machine.set_priority(Priority.NORMAL)
        await machine.checkpoint(kept, "2", lambda: None)
        assert policies() == {os.SCHED_OTHER}


async def test_a_virtualbox_that_is_silent_says_nothing_against_a_checkpoint(
        copied: MachineSpec, kept: Path, pretend: Callable[[str], Path]) -> None:
    """A busy computer must not cost a job what it has done."""
    async with answering(copied) as (machine, _):
        state = (await machine.checkpoint(kept, "1", lambda: None)).state
    spec = continued(copied, kept, state)
    spec.directory.mkdir()
    pretend('[ "$1" = createmedium ] && exec sleep 1000')
    with impatient(), pytest.raises(HypervisorSilent):
        await VirtualBoxDriver().create(spec)
    assert nothing_of(spec.directory) == []


STEPS = ("pause", "snapshot", "link", "resume")


def strike(machine: VirtualBoxMachine, step: str, kill: Callable[[], None],
           monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill when the next checkpoint has come to a step; in the middle of what VirtualBox does."""
    if step == "link":
        real = os.link

        def link(*paths: Path) -> None:
            kill()
            real(*paths)

        monkeypatch.setattr("vmjob.machine.links.os.link", link)
        return
    call = Manage._call

    async def asked(self: Manage, words: tuple[str, ...], until: float) -> tuple[int, str, str]:
        if step in words:
            asyncio.get_running_loop().call_later(0.1 if step == "snapshot" else 0.02, kill)
        return await call(self, words, until)

    monkeypatch.setattr(Manage, "_call", asked)


async def test_a_machine_killed_while_it_is_kept_leaves_the_checkpoint_before_good(
        copied: MachineSpec, kept: Path) -> None:
    async with answering(copied) as (machine, client):
        await client.mkdir("before")
        state = (await machine.checkpoint(kept, "1", lambda: None)).state
        await client.mkdir("after")
    files = {path.name: path.stat().st_size for path in kept.iterdir()}
    for step in STEPS:
        async with answering(continued(copied, kept, state)) as (machine, client):
            assert [each.name for each in await client.ls()] == ["before"]
            pid = machine.pid
            assert pid is not None
            with pytest.MonkeyPatch.context() as patch:
                strike(machine, step, lambda pid=pid: kill(pid), patch)  # type: ignore[misc]
                with anyio.fail_after(PATIENCE):
                    try:
                        made = await machine.checkpoint(kept, "2", lambda: None)
                    except CheckpointFailed:
                        left = [path.name for path in kept.iterdir() if path.name not in files]
                        assert left == [], step
                    else:
                        assert step in ("link", "resume", "pause"), "it was whole before"
                        assert made.state["layers"]
            assert await end(machine) is EndReason.KILLED
        for path in kept.glob("2*"):
            path.unlink()
    assert {path.name: path.stat().st_size for path in kept.iterdir()} == files
    async with answering(continued(copied, kept, state)) as (machine, client):
        assert [each.name for each in await client.ls()] == ["before"]


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


STRUCK = """
import anyio, json, sys
from tests.vm.test_virtualbox_saved import *
from vmjob.machine.virtualbox.manage import service_pids

async def main(directory, shape, kept, state, step):
    spec = MachineSpec("m1", Path(directory), None, **json.loads(shape),
                       saved=Saved(Path(kept), json.loads(state)))
    async with answering(spec) as (machine, client):
        assert [each.name for each in await client.ls()] == ["before"]
        print(json.dumps([machine.pid, *service_pids(spec.directory / "registry")]), flush=True)
        if step == "none":
            return
        strike(machine, step, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch())
        await machine.checkpoint(Path(kept), "2", lambda: None)
        print("not killed", flush=True)

anyio.run(main, *sys.argv[1:])
"""


async def test_an_owner_killed_while_it_keeps_leaves_the_checkpoint_before_good(
        copied: MachineSpec, kept: Path) -> None:
    async with answering(copied) as (machine, client):
        await client.mkdir("before")
        state = (await machine.checkpoint(kept, "1", lambda: None)).state
    shape = {name: getattr(copied, name) for name in (
        "memory_mb", "accelerator", "network", "display")}
    for step in (*STEPS, "none"):
        directory = copied.directory.with_name(step)
        directory.mkdir()
        done = await anyio.to_thread.run_sync(lambda words: subprocess.run(
            words, stdout=subprocess.PIPE, timeout=PATIENCE, cwd=Path(__file__).parents[2],
            check=False), [
                sys.executable, "-c", textwrap.dedent(STRUCK),
                str(directory), json.dumps(shape), str(kept), json.dumps(state),
                step])
        assert done.returncode == (0 if step == "none" else -signal.SIGKILL), step
        pids = json.loads(done.stdout)
        assert eventually(lambda pids=pids: not any(map(alive, pids)), 5.0), step  # type: ignore[misc]
        for path in kept.glob("2*"):
            path.unlink()
        shutil.rmtree(ipc_directory(ipc_id_of(directory / "registry")), ignore_errors=True)


async def test_after_a_snapshot_that_failed_half_way_the_next_one_is_whole(
        copied: MachineSpec, kept: Path, pretend: Callable[[str], Path]) -> None:
    """VirtualBox made it, and its answer was lost."""
    pretend("")
    async with answering(copied) as (machine, client):
        await client.mkdir("first")
        pretend('[ "$1" = snapshot ] && { "$real" "$@"; echo "VBoxManage: error: lost" >&2; '
                'exit 1; }')
        with pytest.raises(CheckpointFailed):
            await machine.checkpoint(kept, "1", lambda: None)
        assert list(kept.iterdir()) == []
        await client.mkdir("second")
        pretend("")
        made = await machine.checkpoint(kept, "2", lambda: None)
        await client.mkdir("third")
    async with answering(continued(copied, kept, made.state)) as (machine, client):
        assert sorted(each.name for each in await client.ls()) == ["first", "second"]
        with pytest.raises(CheckpointUnusable):
            await VirtualBoxDriver().create(continued(
                replace(copied, directory=copied.directory.with_name("other")), kept,
                {**made.state, "version": "7.2.0r1"}))
