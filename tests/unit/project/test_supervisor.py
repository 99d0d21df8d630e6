"""Nothing that a supervised program starts outlives who asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import eventually
from vmjob.project import supervisor

#: One child that stays, and one that leaves its session, its parent and its terminal.
PROGRAM = ("sleep 300 & (setsid sleep 300 > /dev/null 2>&1 & echo $! > away.new; "
           "mv away.new away); wait")


def supervised(folder: Path, program: str = PROGRAM) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", supervisor.__file__, str(folder), "log", "/bin/sh", "-c",
         program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder)


def order(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n".encode())
    process.stdin.flush()


def started(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    order(process, "start")
    word, pid = process.stdout.readline().split()
    assert word == b"started"
    return int(pid)


def finish(process: subprocess.Popen[bytes]) -> list[str]:
    """The rest of its output, once it has ended."""
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return out.decode().splitlines()


def test_all_descendants_end_with_the_input_and_are_told(tmp_path: Path) -> None:
    process = supervised(tmp_path)
    pid = started(process)
    assert eventually((tmp_path / "away").exists)
    away = int((tmp_path / "away").read_text())
    said = finish(process)
    assert not psutil.pid_exists(pid)
    assert not psutil.pid_exists(away)
    assert f"left {away} sleep 300" in said


def test_a_program_is_told_when_it_ends_and_can_be_started_again(tmp_path: Path) -> None:
    process = supervised(tmp_path, "echo ran >> ran; exit 3")
    assert process.stdout is not None
    for _ in range(2):
        started(process)
        assert process.stdout.readline() == b"exited 3\n"
    assert finish(process) == []
    assert (tmp_path / "ran").read_text() == "ran\n" * 2


def test_a_killed_program_leaves_its_children_until_the_end(tmp_path: Path) -> None:
    process = supervised(tmp_path)
    assert process.stdout is not None
    started(process)
    assert eventually((tmp_path / "away").exists)
    order(process, "signal 9")
    assert process.stdout.readline() == b"exited -9\n"
    assert psutil.pid_exists(int((tmp_path / "away").read_text()))
    order(process, "end 0")
    assert len([line for line in finish(process) if line.endswith("sleep 300")]) == 2


def test_who_leaves_in_time_is_not_killed(tmp_path: Path) -> None:
    process = supervised(tmp_path, "trap 'exit 0' TERM; read forever < pipe")
    os.mkfifo(tmp_path / "pipe")
    started(process)
    order(process, "end 20")
    with (tmp_path / "pipe").open("wb"):
        pass  # the program's wait is over
    assert [line for line in finish(process) if line.startswith("left")] == []


@pytest.mark.parametrize("line", ["nonsense", "signal", "end", "x" * 10, ""])
def test_an_order_that_is_none_changes_nothing(tmp_path: Path, line: str) -> None:
    process = supervised(tmp_path, "exit 0")
    order(process, line)
    started(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"exited 0\n"
    assert finish(process) == []


def test_when_its_owner_is_killed_nothing_remains(tmp_path: Path) -> None:
    """The owner holds the pipe's only other end; the kernel closes it."""
    owner = subprocess.Popen([sys.executable, "-c", f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-I", "-S", {supervisor.__file__!r}, ".", "log",
                          "/bin/sh", "-c", {PROGRAM!r}], stdin=subprocess.PIPE)
child.stdin.write(b"start\\n")
child.stdin.flush()
child.wait()
"""], cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert eventually((tmp_path / "away").exists)
    left = psutil.Process(owner.pid).children(recursive=True)
    left.append(psutil.Process(int((tmp_path / "away").read_text())))
    assert len(left) >= 3
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    assert psutil.wait_procs(left, timeout=20)[1] == []


def test_when_it_is_killed_itself_the_program_ends(tmp_path: Path) -> None:
    process = supervised(tmp_path, "exec sleep 300")
    program = psutil.Process(started(process))
    process.kill()
    assert psutil.wait_procs([program], timeout=20)[1] == []
    process.communicate(timeout=10)
