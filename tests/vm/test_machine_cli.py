"""Machines that stay between commands, with real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import eventually, session_processes
from vmjob.home import Home
from vmjob.keeper import slots

pytestmark = pytest.mark.vm


@pytest.fixture(autouse=True)
def destroyed_at_last(vm_home: Home) -> Iterator[None]:
    """A keeper outlives the test that fails; not this one."""
    yield
    for name in slots.names(vm_home):
        vmjob("destroy", name)


def vmjob(*arguments: str, code: int = 0, stdin: bytes | None = None) -> bytes:
    """What `vmjob machine` prints."""
    done = subprocess.run([sys.executable, "-m", "vmjob", "machine", *arguments],
                          capture_output=True, timeout=200, check=False, input=stdin or b"")
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr
    return done.stdout + done.stderr if code == 125 else done.stdout


def status() -> dict[str, object]:
    found = json.loads(vmjob("status", "lab", "--json"))
    assert isinstance(found, dict)
    return found


def test_a_machines_life_between_commands(vm_home: Home, tmp_path: Path) -> None:
    """What runs in a machine and its files go through the disk, a new process and a crash."""
    (tmp_path / "in").write_text("hello\n")
    assert vmjob("create", "lab", "--memory", "256", "--accel", "tcg") == b"lab\n"
    vmjob("start", "lab")
    assert status()["state"] == "running"
    assert b"wrong-state" in vmjob("start", "lab", code=125)
    vmjob("put", "lab", str(tmp_path / "in"))
    assert vmjob("exec", "lab", "--", "sh", "-c", "cat in -; exit 7", code=7,
                 stdin=b"more\n") == b"hello\nmore\n"
    assert vmjob("exec", "lab", "--user", "root", "--cwd", "/", "--env", "A=b", "--", "sh", "-c",
                 "id -u; pwd; echo $A") == b"0\n/\nb\n"
    vmjob("exec", "lab", "--", "no-such-program", code=127)
    vmjob("exec", "lab", "--detach", "--", "sh", "-c",
          "echo $$ > pid; i=0; while :; do i=$((i+1)); echo $i >> count; sleep 0.05; done")
    assert vmjob("checkpoint", "lab").startswith(b"checkpoint 1, ")
    vmjob("suspend", "lab")
    assert status()["state"] == "suspended"
    vmjob("resume", "lab")

    vmjob("suspend", "lab", "--to-disk")
    found = status()
    assert (found["state"], found["pid"]) == ("kept", None)
    assert not session_processes(vm_home.root)
    vmjob("resume", "lab")
    same = ("kill -0 $(cat pid) && n=$(wc -l < count) && "
            "while [ $(wc -l < count) -le $n ]; do sleep 0.05; done && "
            "m=$(wc -l < count) && [ $m -eq $(head -n $m count | tail -n 1) ] && cat in")
    assert vmjob("exec", "lab", "--", "sh", "-c", same) == b"hello\n"

    vmjob("exec", "lab", "--", "sh", "-c", "echo changed > in")
    assert vmjob("stop", "lab", "--checkpoint").startswith(b"checkpoint 3, ")
    assert status()["state"] == "kept"
    vmjob("restore", "lab")
    vmjob("exec", "lab", "--", "sh", "-c", "echo lost > in")
    vmjob("restore", "lab")
    vmjob("get", "lab", "in", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "changed\n"
    vmjob("console", "lab")
    assert b"the machine runs" in vmjob("logs", "lab")

    pid = status()["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not session_processes(vm_home.root))
    assert status()["state"] == "kept"
    vmjob("destroy", "lab")
    assert list(vm_home.slots.iterdir()) == []


def test_ctrl_c_ends_the_command_in_the_machine_and_not_the_machine(vm_home: Home) -> None:
    vmjob("create", "lab", "--memory", "256", "--accel", "tcg")
    vmjob("start", "lab")
    process = subprocess.Popen(
        [sys.executable, "-m", "vmjob", "machine", "exec", "lab", "--", "python3", "-c",
         # No shell: while one starts its next program, it holds a SIGINT back from both.
         "import time; print('on', flush=True); time.sleep(1000)"],
        stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert vmjob("exec", "lab", "--", "sh", "-c",
                 "grep -l 'time.slee[p]' /proc/[0-9]*/cmdline || echo none") == b"none\n"
    pid = status()["pid"]
    assert isinstance(pid, int)
    assert psutil.Process(pid).ppid() != os.getpid()
    vmjob("destroy", "lab")
    assert not session_processes(vm_home.root)
