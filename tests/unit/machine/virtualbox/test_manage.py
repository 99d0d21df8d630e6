"""VBoxManage is asked one question at a time, judged, asked again if that is safe, and killed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from pathlib import Path

import anyio
import anyio.to_thread
import psutil
import pytest

from tests.conftest import eventually, open_descriptors
from tests.unit.machine.virtualbox.texts import TEXTS
from vmjob.errors import Busy, HypervisorRefused, HypervisorSilent, ProgramMissing, VmjobError
from vmjob.machine.virtualbox import manage as module
from vmjob.machine.virtualbox.faults import Kind, classify
from vmjob.machine.virtualbox.manage import Manage, environment_for, may_ask_again
from vmjob.machine.virtualbox.programs import Programs

pytestmark = pytest.mark.anyio


@pytest.fixture
def simulated(tmp_path: Path):
    """A `Manage` whose VBoxManage is this shell script, in a directory of its own."""

    def make(script: str) -> Manage:
        program = tmp_path / "VBoxManage"
        program.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        program.chmod(0o755)
        return Manage(Programs(str(program), "/nowhere"), tmp_path / "registry")

    return make


def said(name: str) -> str:
    text = next(text for text in TEXTS if text.name == name)
    return f"cat >&2 <<'END'\n{text.stderr}\nEND\nexit {text.exit}\n"


def test_the_environment_is_the_same_wherever_we_run():
    found = environment_for({"VBOX_LOG": "all", "VBOX_USER_HOME": "/other", "LC_MESSAGES": "de_DE",
                             "LANGUAGE": "de", "HOME": "/home/a", "PATH": "/bin"},
                            Path("/r"), "id")
    assert found == {"HOME": "/home/a", "PATH": "/bin", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8",
                     "VBOX_USER_HOME": "/r", "VBOX_IPC_SOCKETID": "id"}
    assert environment_for({}, Path("/r"), "id")["HOME"] == "/r"


async def test_the_answer_is_what_it_printed(simulated):
    manage = simulated('echo "$1-$2-$VBOX_USER_HOME"; cat; echo "0%...100%" >&2')
    assert await manage.run("list", "a b") == f"list-a b-{manage.registry}\n"
    assert manage.started == 1


async def test_a_refusal_is_an_error_that_says_what_it_means(simulated):
    manage = simulated(said("hdd-damaged"))
    with pytest.raises(VmjobError, match="VBoxManage startvm: VDI: invalid pre-header") as caught:
        await manage.run("startvm", "g")
    assert caught.value.code == "disk-unusable"
    assert caught.value.context["command"] == ["startvm", "g"]
    assert (await manage.ask("startvm", "g")).fault.kind == Kind.MEDIUM_DAMAGED


async def test_exit_code_0_with_an_error_is_an_error(simulated):
    with pytest.raises(HypervisorRefused, match="Cannot discard"):
        await simulated(said("discard-not-saved")).run("discardstate", "g")


async def test_a_call_that_hangs_is_killed_with_what_it_started(simulated, tmp_path):
    manage = simulated("sleep 1000 & echo $! > child; echo begun; wait")
    began = time.monotonic()
    with pytest.raises(HypervisorSilent, match=r"within 3 s") as caught:
        await manage.run("list", "vms", deadline=3.0)
    assert time.monotonic() - began < 20
    assert caught.value.retryable
    child = int((tmp_path / "child").read_text())
    assert eventually(lambda: not psutil.pid_exists(child)
                      or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    assert manage.transcript[-1].exit_code is None


async def test_a_call_that_is_given_up_is_killed(simulated, tmp_path):
    manage = simulated("echo $$ > begun; exec sleep 1000")
    os.mkfifo(tmp_path / "begun")
    task = asyncio.ensure_future(manage.run("list"))
    pid = int(await anyio.to_thread.run_sync((tmp_path / "begun").read_text))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.pid_exists(pid)


async def test_who_holds_the_output_open_does_not_hold_us(simulated, tmp_path):
    """A service that is started by the call may keep its pipe."""
    manage = simulated("setsid sleep 30 & echo $! > holder; echo done")
    assert await manage.run("list", deadline=10) == "done\n"
    os.kill(int((tmp_path / "holder").read_text()), signal.SIGKILL)


async def test_what_is_still_in_the_pipe_at_the_end_belongs_to_the_answer(simulated):
    assert await simulated("(sleep 0.2; echo late) & echo early").run("list") == "early\nlate\n"


async def test_a_call_that_waits_for_another_of_ours_gives_up_at_its_deadline(simulated, tmp_path):
    manage = simulated("read -r _ < end; echo done")
    os.mkfifo(tmp_path / "end")
    first = asyncio.ensure_future(manage.run("list"))
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await manage.run("list", deadline=0.2)
    await anyio.to_thread.run_sync((tmp_path / "end").write_text, "\n")
    assert await first == "done\n"
    assert manage.started == 1


async def test_calls_go_one_by_one(simulated, tmp_path):
    script = 'mkdir busy || echo overlap >> wrong; sleep 0.05; rmdir busy'
    first, second = simulated(script), simulated(script)
    await asyncio.gather(*(each.run("list") for each in (first, second, first, second)))
    assert not (tmp_path / "wrong").exists()
    assert first.started + second.started == 4


async def test_a_registry_that_another_process_holds_is_busy_at_the_deadline(simulated):
    manage = simulated("echo ok")
    await manage.run("list")
    with (manage.registry / "vmjob.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="does not end"):
            await manage.run("list", deadline=0.2)
        waiting = asyncio.ensure_future(manage.run("list"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        fcntl.flock(file, fcntl.LOCK_UN)
        assert await waiting == "ok\n"


@pytest.mark.parametrize(("name", "command"), [
    ("service-ending", "createvm"), ("modify-running", "modifyvm"), ("going-down", "showvminfo"),
    ("unregister-running", "unregistervm")])
async def test_what_is_refused_for_a_moment_is_asked_again(simulated, name, command):
    manage = simulated(f"if [ -e tried ]; then echo fine; exit; fi\n: > tried\n{said(name)}")
    assert await manage.run(command, "g") == "fine\n"
    assert manage.started == 2


@pytest.mark.parametrize(("name", "command"), [
    ("going-down", "snapshot"), ("hdd-damaged", "startvm"), ("createvm-twice", "createvm")])
async def test_what_may_have_been_done_in_part_is_never_asked_again(simulated, name, command):
    manage = simulated(said(name))
    with pytest.raises(VmjobError):
        await manage.run(command, "g")
    assert manage.started == 1


async def test_a_refusal_that_does_not_pass_is_told_in_the_end(simulated, monkeypatch):
    monkeypatch.setattr(module, "MOMENT", 0.4)
    manage = simulated(said("modify-running"))
    with pytest.raises(Busy, match="already locked"):
        await manage.run("modifyvm", "g")
    assert 2 <= manage.started <= 5


def test_only_questions_survive_a_service_that_died():
    died = classify("VBoxManage: error: Code NS_ERROR_CALL_FAILED (0x800706be)")
    assert may_ask_again(["showvminfo", "g"], died)
    assert not may_ask_again(["snapshot", "g", "take"], died)


async def test_output_without_end_is_cut_off_and_an_error(simulated):
    with pytest.raises(HypervisorRefused, match="more than"):
        await simulated("head -c 5000000 /dev/zero").run("list")


async def test_a_program_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(VmjobError):
        await Manage(Programs("/nowhere/VBoxManage", ""), tmp_path / "r").run("list")
    assert issubclass(ProgramMissing, VmjobError)


async def test_the_transcript_is_bounded_and_has_the_newest_calls(simulated, monkeypatch):
    manage = simulated("head -c 100000 /dev/zero | tr '\\0' x; echo $1")
    for number in range(3):
        await manage.run(f"list{number}")
    assert [call.words for call in manage.transcript] == [("list0",), ("list1",), ("list2",)]
    assert len(manage.transcript[0].stdout) <= module.TEXT_KEPT
    assert manage.transcript[2].as_dict()["exit_code"] == 0
    assert manage.transcript.maxlen == module.CALLS_KEPT


async def test_no_descriptor_and_no_zombie_is_left(simulated):
    manage = simulated("echo ok")
    await manage.run("list")
    before = open_descriptors()
    for _ in range(5):
        await manage.run("list")
    assert open_descriptors() == before
    assert not [child for child in psutil.Process().children()
                if child.status() == psutil.STATUS_ZOMBIE]


def test_the_id_of_a_service_follows_from_its_registry(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ids = {module.ipc_id_of(tmp_path / name) for name in ("real", "link", "link/../real")}
    assert len(ids) == 1
    assert ids != {module.ipc_id_of(tmp_path)}
    assert os.sep not in ids.pop()
