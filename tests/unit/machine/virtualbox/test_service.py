"""A registry's service is found by what it was started with, ended, and leaves nothing in /tmp."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmjob.machine.virtualbox import service
from vmjob.machine.virtualbox.service import (
    end_services,
    ipc_directory,
    service_pids,
    sweep_ipc,
)

pytestmark = pytest.mark.anyio

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Start]:
    """Starts a program with a service's name, that ignores some signals, and waits for it."""
    program = tmp_path / "VBoxSVC"
    shutil.copy(shutil.which("bash") or "/bin/bash", program)
    running = []

    def start(registry: Path, name: str = "VBoxSVC", ignored: str = "") -> subprocess.Popen[bytes]:
        path = program.with_name(name)
        if not path.exists():
            shutil.copy(program, path)
        trap = f"trap '' {ignored};" if ignored else ""
        process = subprocess.Popen([path, "-c", f"{trap} echo ready; while :; do read -r _; done"],
                                   env={"VBOX_USER_HOME": str(registry)}, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


async def test_the_services_of_a_registry_are_found_and_no_others(started: Start, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    mine = started(tmp_path / "mine")
    carrier = started(tmp_path / "mine", "VBoxXPCOMIPCD")
    started(tmp_path / "other")
    started(tmp_path / "mine", "VBoxManage")
    assert sorted(service_pids(tmp_path / "link")) == sorted([mine.pid, carrier.pid])


async def test_a_service_is_asked_to_end_and_then_made_to(started: Start, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "TERM_SECONDS", 20.0)
    willing = started(tmp_path / "a")
    await end_services(tmp_path / "a")
    assert willing.wait(10) == -signal.SIGTERM
    monkeypatch.setattr(service, "TERM_SECONDS", 0.3)
    unwilling, other = started(tmp_path / "b", ignored="TERM"), started(tmp_path / "c")
    await end_services(tmp_path / "b")
    assert unwilling.wait(10) == -signal.SIGKILL
    assert other.poll() is None


async def test_without_a_service_there_is_nothing_to_wait_for(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "TERM_SECONDS", 60.0)
    began = time.monotonic()
    await end_services(tmp_path)
    assert time.monotonic() - began < 30


# -- what it leaves -----------------------------------------------------------------------------


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a service leaves when it ends."""
    monkeypatch.setattr(service, "TEMPORARY", tmp_path)
    directory = ipc_directory("id")
    directory.mkdir()
    (directory / "lock").write_text("123\n")
    (directory / "ipcd").touch()
    return directory


async def test_what_an_ended_service_left_is_removed(left):
    assert sweep_ipc("id")
    assert not left.exists()
    assert sweep_ipc("id"), "and nothing is fine, too"


async def test_what_killed_owners_left_is_swept_and_nothing_else(left, tmp_path):
    old = time.time() - 2 * service.SETTLED
    directories = {name: ipc_directory(name) for name in ("vmjob-old", "vmjob-new", "root")}
    for name, directory in directories.items():
        shutil.copytree(left, directory)
        if name != "vmjob-new":
            os.utime(directory, (old, old))
    (tmp_path / ".vbox-vmjob-link-ipc").symlink_to(left)
    assert service.sweep_orphans() == [directories["vmjob-old"]]
    assert not directories["vmjob-old"].exists()
    assert (directories["vmjob-new"] / "lock").exists(), "it may be just starting"
    assert (directories["root"] / "lock").exists(), "not ours"
    assert (left / "lock").exists()


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


async def test_what_a_living_service_uses_stays(left):
    with subprocess.Popen([sys.executable, "-c", HOLDER, left / "lock"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        assert not sweep_ipc("id")
        assert sorted(path.name for path in left.iterdir()) == ["ipcd", "lock"]
        holder.communicate()
    assert sweep_ipc("id")


async def test_a_file_that_no_service_makes_is_not_removed(left):
    (left / "precious").write_text("x")
    assert not sweep_ipc("id")
    assert (left / "precious").exists()


async def test_no_link_is_followed(left, tmp_path):
    """Whoever may write to /tmp may lay one."""
    elsewhere = tmp_path / "elsewhere"
    left.rename(elsewhere)
    left.symlink_to(elsewhere)
    assert not sweep_ipc("id")
    assert sorted(path.name for path in elsewhere.iterdir()) == ["ipcd", "lock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
async def test_another_users_directory_is_left_alone(left):
    os.chown(left, 12345, 12345)
    assert not sweep_ipc("id")
    assert (left / "lock").exists()


