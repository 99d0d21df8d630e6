"""Folders in step with a real machine."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

import vmjob
from vmjob.engine.folders import Mirror
from vmjob.guest.client import AgentClient
from vmjob.home import Home
from vmjob.job.files import Folder

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

#: Seconds in which something must have come; it takes half of one on a computer that is not busy.
DEADLINE = 30.0


def client(machine: vmjob.AsyncMachine) -> AgentClient:
    assert machine._session is not None
    return machine._session.client


def mirror(machine: vmjob.AsyncMachine, folder: Folder, tmp_path: Path,
           known: str | None = None) -> Mirror:
    return Mirror(folder, client(machine), redact=bytes, warn=print,
                  known=None if known is None else json.loads(known),
                  journal=tmp_path / "journal")


async def until(stepped: Mirror, condition: Callable[[], bool]) -> float:
    begun = time.monotonic()
    with anyio.fail_after(DEADLINE):
        while not condition():
            await stepped.step()
            if not condition():
                await anyio.sleep(stepped.pause)
    return time.monotonic() - begun


def text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


async def shell(machine: vmjob.AsyncMachine, line: str) -> str:
    result = await machine.run(["sh", "-c", line])
    assert result.exit_code == 0, result.stderr_text
    return result.stdout_text


async def test_changes_appear_on_the_other_side_at_once(
        vm_home: Home, tmp_path: Path) -> None:
    """The job answers what the host asks, a hundred other files beside; and is never heard half."""
    folder = Folder("shared", tmp_path / "shared", "shared")
    folder.source.mkdir()
    for number in range(100):
        (folder.source / f"other-{number}").write_text("x")
    async with vmjob.AsyncMachine.create(memory_mb=256, accel="tcg",
                                         home=vm_home.root) as machine:
        stepped = mirror(machine, folder, tmp_path)
        await stepped.fill()
        task = await machine.start(["sh", "-c", """
            for i in 1 2 3 4; do
                until [ -e shared/ask-$i ]; do sleep 0.02; done
                for piece in a b c d e f g h; do
                    echo $piece >> shared/answer-$i
                    sleep 0.02
                done
            done"""])
        took = []
        for number in (1, 2, 3, 4):
            (folder.source / f"ask-{number}").write_text("go on")
            answer = folder.source / f"answer-{number}"
            took.append(await until(stepped, lambda: text(answer) is not None))  # noqa: B023
            assert answer.read_text() == "a\nb\nc\nd\ne\nf\ng\nh\n"
        assert (await machine.result(task)).exit_code == 0
    # There and back, with the eight pieces' 0.2 s.
    sys.stdout.write(f"there and back in {statistics.median(took):.2f} s\n")


async def test_a_folder_goes_on_from_a_checkpoint(vm_home: Home, tmp_path: Path) -> None:
    """The guest has its older files, does what it did again, and what the host did stays."""
    folder = Folder("shared", tmp_path / "shared", "shared")
    slot = tmp_path / "slot"
    async with vmjob.AsyncMachine.create(memory_mb=256, accel="tcg", slot=slot,
                                         home=vm_home.root) as machine:
        stepped = mirror(machine, folder, tmp_path)
        await stepped.fill()
        await shell(machine, "echo 1 > shared/count; echo x > shared/gone")
        await until(stepped, lambda: text(folder.source / "gone") == "x\n"
                    and text(folder.source / "count") == "1\n")
        task = await machine.start(["sleep", "1000"])
        await machine.checkpoint()
        known = json.dumps(stepped.known())
        await shell(machine, "echo 2 > shared/count; echo later > shared/later; rm shared/gone")
        await until(stepped, lambda: not (folder.source / "gone").exists()
                    and text(folder.source / "later") == "later\n"
                    and text(folder.source / "count") == "2\n")
    (folder.source / "own").write_text("the host's")
    (folder.source / "later").write_text("the host's, too")
    async with vmjob.AsyncMachine.restore(slot, home=vm_home.root) as machine:
        stepped = mirror(machine, folder, tmp_path, known)
        for _ in range(10):
            await stepped.step()
            await anyio.sleep(stepped.pause)
        said = await shell(machine, "cd shared; cat count gone own later")
        assert said == "1\nx\nthe host'sthe host's, too"
        assert text(folder.source / "count") == "2\n"
        await shell(machine, "echo again > shared/count")
        await until(stepped, lambda: text(folder.source / "count") == "again\n")
        await machine.stop(task)
        await stepped.collect()
        assert text(folder.source / "own") == "the host's"
