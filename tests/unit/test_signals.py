"""What signals do to `vmjob run`, with simulated machines in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import eventually
from vmjob.engine.generations import Generation, Generations
from vmjob.host import standstill

VMJOB = [sys.executable, str(Path(__file__).with_name("simulated_vmjob.py"))]
#: Seconds: of a deadline and of its margin, and what this computer may add.
DEADLINE, MARGIN, BUSY = 0.5, 0.5, 30.0
#: Seconds for which something waits, and for which it is stopped.
PATIENCE = 2.75


@contextmanager
def vmjob(*words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone when the block ends, whatever is asked of it."""
    process = subprocess.Popen([*VMJOB, *words], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            process.kill()


def good(slot: Path) -> list[int]:
    return [each.number for each in Generations(slot / "checkpoints").newest_first()
            if isinstance(each, Generation)]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("number", "at"), [
    pytest.param(signal.SIGTERM, "first", id="the last checkpoint"),
    pytest.param(signal.SIGTERM, "stuck", id="one that was under way"),
    pytest.param(signal.SIGINT, "stuck", id="Ctrl-C")])
def test_a_disk_that_does_not_answer_keeps_no_stopped_job_from_ending_in_time(
        tmp_path: Path, number: int, at: str) -> None:
    slot = tmp_path / "slot"
    first = slot / "checkpoints" / "000001.json"
    with vmjob("stuck", f"margin={MARGIN}", "--", "run", "--slot", slot, "--checkpoint-every", "1",
               "--stop-deadline", f"{DEADLINE}", "--", "wait") as process:
        assert eventually((slot / "reached" if at == "stuck" else first).exists, 30)
        began = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - began < DEADLINE + MARGIN + BUSY
        assert process.returncode == 128 + number, said
        assert f"--resume {slot}".encode() in said
    assert first.exists()
    assert good(slot) == [1]
    with vmjob("plain", "--", "run", "--resume", slot) as process:
        assert eventually(lambda: good(slot)[:1] == [2], 30)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert good(slot) == [2, 1]


# -- Ctrl-Z ------------------------------------------------------------------------------------

#: Stops at SIGTSTP as a job whose tasks do not run yet, while three of its parts have deadlines.
WAITING = f"""
import asyncio, signal, sys, threading
import anyio
from vmjob.cli.signals import Signals
from vmjob.engine.control import Control
from vmjob.host import standstill

standstill.PIECE = 0.1

async def main():
    Signals(Control(), None, 0)
    loop, here, there = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    loop.add_signal_handler(signal.SIGUSR1, lambda: (here.set(), there.set()))
    in_thread = asyncio.ensure_future(
        anyio.to_thread.run_sync(standstill.happens, there, {PATIENCE}))
    tool = asyncio.ensure_future(anyio.to_thread.run_sync(
        standstill.run_tool, ["sh", "-c", 'read line < "$1"; echo $line', "sh", sys.argv[1]],
        {PATIENCE}))
    with anyio.fail_after({PATIENCE}):
        print("waiting", flush=True)
        await here.wait()
    assert await in_thread
    assert (await tool).stdout == b"went on\\n"
    print("done", flush=True)

asyncio.run(main())
"""


def test_no_deadline_comes_nearer_while_a_job_is_stopped_that_does_not_run_yet(
        tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen([sys.executable, "-c", WAITING, pipe],
                          stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"waiting\n"
            for _ in range(2):
                process.send_signal(signal.SIGTSTP)
                _, status = os.waitpid(process.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(status)
                time.sleep(PATIENCE)  # this is what the test is about
                process.send_signal(signal.SIGCONT)
            pipe.write_bytes(b"went on\n")
            process.send_signal(signal.SIGUSR1)
            assert process.stdout.readline() == b"done\n"
        finally:
            process.kill()


def test_a_tool_that_does_not_end_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        standstill.run_tool(["sh", "-c", "echo half; exec sleep 1000"], 0.2)
    assert caught.value.stdout == b"half\n"
