"""Machines that stay between commands, with fake machines in real keepers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from tests.conftest import eventually, session_processes
from vmjob.api import AsyncMachine
from vmjob.engine.slot import AskedMachine
from vmjob.errors import (
    Busy,
    CheckpointFailed,
    CommandNotFound,
    KeeperLost,
    MachineStartFailed,
    UnknownMachine,
    UsageError,
    VmjobError,
    WrongState,
)
from vmjob.home import Home
from vmjob.host.holding import held, holder
from vmjob.keeper import client, slots, wire

pytestmark = pytest.mark.anyio

SCRIPT = str(Path(__file__).with_name("fake_keeper.py"))


def keeper(kind: str = "plain") -> list[str]:
    """How a keeper of fake machines is started."""
    return [sys.executable, SCRIPT, kind]


@pytest.fixture
async def lab(home: Home, anyio_backend: str) -> AsyncIterator[str]:
    """A machine that was created; at the end nothing of it may be left."""
    name = slots.create(home, "lab", AskedMachine())
    yield name
    with contextlib.suppress(UnknownMachine):
        await client.destroy(home, name)
    assert list(home.slots.iterdir()) == []
    assert eventually(lambda: not session_processes(home.root))


async def state(home: Home, name: str) -> str:
    return (await client.look(home, name)).state


async def run(home: Home, name: str, script: str, **more: Any) -> tuple[int, bytes]:
    """A command's exit code and stdout."""
    out = b""
    async with client.talk(home, name) as talk:
        await talk.request("exec", {"argv": ["sh", "-c", script], **more})
        while "done" not in (said := await talk.hear()):
            out += wire.unpacked(said["data"]) if said.get("out") == "stdout" else b""
    return said["done"]["exit_code"], out


async def refused(home: Home, name: str, **asked: int) -> VmjobError:
    """Why a command cannot be gone on with."""
    async with client.talk(home, name) as talk:
        await talk.request("attach", asked)
        try:
            while "done" not in await talk.hear():
                pass
        except VmjobError as error:
            return error
    raise AssertionError("it went on to its end")


async def test_a_machine_stays_between_commands_until_it_is_destroyed(home: Home,
                                                                      lab: str) -> None:
    assert await state(home, lab) == "created"
    assert await client.start(home, lab, command=keeper()) == []
    assert await state(home, lab) == "running"
    assert await run(home, lab, "echo one > file; exit 7") == (7, b"")
    assert await run(home, lab, "cat file") == (0, b"one\n")
    await client.ask(home, lab, "suspend")
    assert await state(home, lab) == "suspended"
    with pytest.raises(WrongState, match="suspended"):
        await run(home, lab, "true")
    assert await client.resume(home, lab) == []
    assert await run(home, lab, "cat file") == (0, b"one\n")
    await client.stop(home, lab)
    assert await state(home, lab) == "stopped"
    await client.destroy(home, lab)
    with pytest.raises(UnknownMachine):
        await state(home, lab)


async def test_what_was_kept_goes_on_and_what_was_not_is_lost(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    await run(home, lab, "echo one > file")
    assert (await client.checkpoint_now(home, lab))["number"] == 1
    await run(home, lab, "echo two > file")
    await client.restore(home, lab, command=keeper())
    assert await run(home, lab, "cat file; echo three > file") == (0, b"one\n")
    kept = await client.suspend_to_disk(home, lab)
    assert (kept["number"], kept["disk_bytes"] > 0) == (2, True)
    found = await client.look(home, lab)
    assert (found.state, found.pid) == ("kept", None)
    assert [each["number"] for each in found.checkpoints] == [2, 1]
    await client.resume(home, lab, command=keeper())
    assert await run(home, lab, "cat file") == (0, b"three\n")
    assert (await client.stop(home, lab, checkpoint=True) or {})["number"] == 3
    assert await state(home, lab) == "kept"


async def test_a_checkpoint_is_given_up_only_when_that_is_asked_for(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    await client.suspend_to_disk(home, lab)
    with pytest.raises(WrongState, match="has a checkpoint"):
        await client.start(home, lab, command=keeper())
    await client.start(home, lab, anew=True, command=keeper())
    await client.stop(home, lab)
    assert await state(home, lab) == "stopped"


@pytest.mark.parametrize(("kind", "deadline"), [("no-checkpoint", 60), ("slow-checkpoint", 0.1)])
async def test_a_stop_without_its_checkpoint_says_so_and_stops(home: Home, lab: str, kind: str,
                                                               deadline: float) -> None:
    await client.start(home, lab, command=keeper(kind))
    with pytest.raises(CheckpointFailed, match="is stopped"):
        await client.stop(home, lab, checkpoint=True, deadline=deadline)
    assert await state(home, lab) == "stopped"


async def test_a_machine_that_cannot_be_kept_on_disk_goes_on(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper("no-checkpoint"))
    with pytest.raises(CheckpointFailed, match="the disk said no"):
        await client.suspend_to_disk(home, lab)
    assert await run(home, lab, "echo on") == (0, b"on\n")


async def test_what_keeps_a_machine_from_starting_reaches_the_user(home: Home, lab: str) -> None:
    with pytest.raises(MachineStartFailed, match="out of luck"):
        await client.start(home, lab, command=keeper("broken"))
    assert await state(home, lab) == "stopped"
    assert "out of luck" in (slots.place_of(home, lab) / slots.LOG).read_text()
    await client.start(home, lab, command=keeper())
    assert await run(home, lab, "echo on") == (0, b"on\n")


async def test_a_running_machine_is_not_started_twice(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    with pytest.raises(WrongState, match="running already"):
        await client.start(home, lab, command=keeper())
    with pytest.raises(Busy):  # who did not look first
        await client.spawn(home, lab, again=False, command=keeper())
    assert await run(home, lab, "echo on") == (0, b"on\n")


async def test_two_that_start_a_machine_at_once_get_one_machine(home: Home, lab: str) -> None:
    results = await asyncio.gather(*(client.start(home, lab, command=keeper()) for _ in range(2)),
                                   return_exceptions=True)
    assert [isinstance(each, list) for each in results].count(True) == 1
    assert any(isinstance(each, Busy | WrongState) for each in results)
    assert await run(home, lab, "echo on") == (0, b"on\n")


async def test_who_gives_up_a_start_leaves_nothing_half_started(home: Home, lab: str) -> None:
    starting = asyncio.ensure_future(client.start(home, lab, command=keeper("slow-start")))
    root = slots.place_of(home, lab)
    assert await anyio.to_thread.run_sync(eventually, (root / "reached").exists)
    assert await state(home, lab) == "starting"
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert await anyio.to_thread.run_sync(eventually, lambda: slots.keeper_of(root) is None)
    (root / "reached").unlink()


@pytest.mark.parametrize("point", ["starting", "running", "in a command", "in a checkpoint",
                                   "suspended"])
async def test_a_killed_keeper_leaves_no_process_and_a_usable_slot(home: Home, lab: str,
                                                                   point: str) -> None:
    root = slots.place_of(home, lab)
    kind = {"starting": "slow-start", "in a checkpoint": "slow-checkpoint"}.get(point, "plain")
    work: list[asyncio.Future[Any]] = []
    if point == "starting":
        work.append(asyncio.ensure_future(client.start(home, lab, command=keeper(kind))))
    else:
        await client.start(home, lab, command=keeper(kind))
    if point == "in a command":
        work.append(asyncio.ensure_future(run(home, lab, f"touch {root}/reached; sleep 1000")))
    elif point == "in a checkpoint":
        work.append(asyncio.ensure_future(client.checkpoint_now(home, lab)))
    elif point == "suspended":
        await client.ask(home, lab, "suspend")
    if work:
        assert await anyio.to_thread.run_sync(eventually, (root / "reached").exists)
        (root / "reached").unlink()
    pid = slots.keeper_of(root)
    assert pid
    os.kill(pid, signal.SIGKILL)
    for result in await asyncio.gather(*work, return_exceptions=True):
        assert isinstance(result, KeeperLost)
    assert await anyio.to_thread.run_sync(eventually, lambda: not session_processes(home.root))
    assert await state(home, lab) == "stopped"
    assert {path.name for path in slots.leftovers(home)} == {"keeper.sock", "machine"}
    assert len(slots.sweep(home)) >= 1
    assert list(slots.leftovers(home)) == []
    await client.start(home, lab, command=keeper())
    assert await run(home, lab, "echo on") == (0, b"on\n")


async def test_a_sweep_leaves_what_lives_and_what_is_kept(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    assert slots.sweep(home) == []
    await client.checkpoint_now(home, lab)
    pid = slots.keeper_of(slots.place_of(home, lab))
    assert pid
    process = psutil.Process(pid)
    process.kill()
    await anyio.to_thread.run_sync(psutil.wait_procs, [process])
    assert slots.sweep(home) != []
    assert await state(home, lab) == "kept"
    await client.resume(home, lab, command=keeper())
    assert await state(home, lab) == "running"


async def test_a_keeper_that_does_not_answer_can_be_stopped(
        home: Home, lab: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await client.start(home, lab, command=keeper())
    monkeypatch.setattr(client, "GREETING_DEADLINE", 0.5)  # from here on it only expires
    monkeypatch.setattr(client, "END_DEADLINE", 2.0)
    pid = slots.keeper_of(slots.place_of(home, lab))
    assert pid
    os.kill(pid, signal.SIGSTOP)
    assert await state(home, lab) == "unknown"
    with pytest.raises(KeeperLost, match="does not answer"):
        await client.ask(home, lab, "console")
    await client.stop(home, lab)
    assert await state(home, lab) == "stopped"


async def test_a_machine_that_ends_by_itself_is_stopped_and_says_why(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    with pytest.raises(VmjobError):
        await run(home, lab, "kill -9 $(ps -o ppid= -p $$)")
    root = slots.place_of(home, lab)
    assert await anyio.to_thread.run_sync(eventually, lambda: slots.keeper_of(root) is None)
    assert await state(home, lab) == "stopped"
    assert "machine ended" in (root / slots.LOG).read_text()


# -- commands ------------------------------------------------------------------------------------


async def test_input_signals_and_environment_reach_a_command(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    async with client.talk(home, lab) as talk:
        script = "trap 'exit 5' INT; cat; echo $A; while :; do sleep 0.01; done"
        await talk.request("exec", {"argv": ["sh", "-c", script], "stdin": True,
                                    "env": {"A": "b"}})
        given = [b"x" * 60000, b"end\n", b""]
        heard = b""
        while not heard.endswith(b"b\n"):
            said = await talk.hear()
            if "want" in said:
                await talk.say({"stdin": wire.packed(given.pop(0))})
            elif "out" in said:
                heard += wire.unpacked(said["data"])
        assert heard == b"x" * 60000 + b"end\nb\n"
        await talk.say({"signal": signal.SIGINT})
        said = await talk.hear()
    assert said["done"]["exit_code"] == 5


async def test_a_command_ends_with_who_asked_for_it(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    mark = "31415926"
    async with client.talk(home, lab) as talk:
        await talk.request("exec", {"argv": ["sh", "-c", f"echo on; sleep {mark}"]})
        while "out" not in await talk.hear():
            pass
    assert await anyio.to_thread.run_sync(eventually, lambda: not sleeping(mark))
    assert await run(home, lab, "echo on") == (0, b"on\n")


async def test_who_goes_away_takes_no_other_command_along(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    script = "until test -e go; do echo on; sleep 0.01; done; echo whole; exit 3"
    other = asyncio.ensure_future(run(home, lab, script))
    for _ in range(3):
        async with client.talk(home, lab) as talk:
            await talk.request("exec", {
                "argv": ["sh", "-c", "while :; do echo off; sleep 0.02; done"]})
            for _ in range(10):  # so many that the machine no longer has the first of it
                await talk.hear()
    assert await run(home, lab, "sleep 0.3; touch go") == (0, b"")
    code, out = await other
    assert (code, set(out.split())) == (3, {b"on", b"whole"})


async def test_who_neither_reads_nor_listens_is_not_waited_for(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    async with client.talk(home, lab) as talk:
        await talk.request("exec", {"argv": ["cat", "/dev/zero"]})
        task = (await talk.hear())["task"]
        await anyio.sleep(0.5)  # until nothing more fits
        talk._writer.write_eof()
        with anyio.fail_after(10):
            while isinstance(await refused(home, lab, task=task), WrongState):
                pass


async def test_a_detached_command_goes_on_and_its_end_is_in_the_log(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    await client.ask(home, lab, "exec", {
        "argv": ["sh", "-c", "until test -e go; do sleep 0.01; done; exit 9"], "detach": True})
    assert await run(home, lab, "touch go") == (0, b"")
    log = slots.place_of(home, lab) / slots.LOG
    assert await anyio.to_thread.run_sync(
        eventually, lambda: "command sh ended with 9" in log.read_text())


async def test_a_command_that_is_not_there_is_that_error(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    with pytest.raises(CommandNotFound):
        await client.ask(home, lab, "exec", {"argv": ["no-such-program"]})


@pytest.mark.parametrize(("do", "arguments"), [
    ("exec", {"argv": "ls"}), ("exec", {"argv": ["ls"], "more": 1}), ("put", {"source": 3}),
    ("exec", {"argv": ["echo", *["x" * 120_000] * 10]}), ("fly", {}),
    ("priority", {"priority": "high"})])
async def test_a_request_that_cannot_be_is_refused_and_the_machine_goes_on(
        home: Home, lab: str, do: str, arguments: dict[str, Any]) -> None:
    await client.start(home, lab, command=keeper())
    with pytest.raises(UsageError):
        await client.ask(home, lab, do, arguments)
    assert await run(home, lab, "echo on") == (0, b"on\n")


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[" * 99999 + b"\n",
                                  b"x" * (wire.MAX_LINE + 9), b'{"vmjob": 2, "do": "stop"}\n'])
async def test_nonsense_on_the_socket_ends_its_connection_only(home: Home, lab: str,
                                                               said: bytes) -> None:
    await client.start(home, lab, command=keeper())
    reader, writer = await client._connect(slots.place_of(home, lab))
    writer.write(said)
    if not said:
        writer.write_eof()
    with contextlib.suppress(ConnectionError):
        assert (await reader.read()).count(b"\n") == 1  # the greeting
    writer.close()
    assert await run(home, lab, "echo on") == (0, b"on\n")


async def test_files_go_in_and_out(home: Home, lab: str, tmp_path: Path) -> None:
    await client.start(home, lab, command=keeper())
    (tmp_path / "in").write_text("hello")
    await client.ask(home, lab, "mkdir", {"path": "sub/deep"})
    await client.ask(home, lab, "put", {"source": str(tmp_path / "in"), "destination": "sub/f"})
    for number in range(450):
        (tmp_path / "many" / f"ü{number}").mkdir(parents=True)
    await client.ask(home, lab, "put", {"source": str(tmp_path / "many"), "destination": "many"})
    listed = await client.ask(home, lab, "ls", {"path": "many"})
    assert len(listed["entries"]) == 450
    await client.ask(home, lab, "get", {"source": "sub/f", "destination": str(tmp_path / "out")})
    assert (tmp_path / "out").read_text() == "hello"
    await client.ask(home, lab, "delete", {"path": "sub"})
    assert [each["name"] for each in
            (await client.ask(home, lab, "ls", {"path": ""}))["entries"]] == ["many"]


async def test_what_commands_say_is_in_the_log(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper())
    await run(home, lab, "printf 'half way\\033[31m\\n' > $VMJOB_TO_HOST; sleep 0.1")
    await client.ask(home, lab, "listen")
    assert "job half way?[31m\n" in (slots.place_of(home, lab) / slots.LOG).read_text()
    await client.ask(home, lab, "message", {"text": "go on"})
    assert await run(home, lab, "cat $VMJOB_FROM_HOST") == (0, b"go on\n")


# -- names, places and locks -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "-a", ".a", "a b", "a\n", "a\x1b",
                                  "ü", "a" * 64, "a\0"])
def test_a_name_that_is_none_is_refused(home: Home, name: str) -> None:
    with pytest.raises(UsageError):
        slots.create(home, name, AskedMachine())
    with pytest.raises(UsageError):
        slots.place_of(home, name)
    assert list(home.slots.iterdir()) == []


def test_names_are_found_and_never_taken_twice(home: Home) -> None:
    assert slots.create(home, "m2", AskedMachine()) == "m2"
    assert [slots.create(home, slots.AUTO, AskedMachine()) for _ in range(2)] == ["m1", "m3"]
    with pytest.raises(WrongState):
        slots.create(home, "m1", AskedMachine())
    with pytest.raises(UsageError):
        slots.create(home, "m9", AskedMachine(memory_mb=1))
    assert slots.names(home) == ["m1", "m2", "m3"]


async def test_a_path_of_any_length_will_do(tmp_path: Path) -> None:
    home = Home(tmp_path / ("long" * 40))
    name = slots.create(home, "n" * 63, AskedMachine())
    await client.start(home, name, command=keeper())
    try:
        mode = (slots.place_of(home, name) / slots.SOCKET).stat().st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
        assert await run(home, name, "echo on") == (0, b"on\n")
    finally:
        await client.destroy(home, name)


async def test_a_slot_that_a_program_has_is_not_taken_from_it(home: Home, lab: str) -> None:
    from vmjob.machine.fake import FakeDriver

    root = slots.place_of(home, lab)
    async with AsyncMachine.create(slot=root, home=home.root, driver=FakeDriver()) as machine:
        with pytest.raises(Busy):
            slots.destroy(home, lab)
        assert slots.sweep(home) == []
        with pytest.raises(Busy):
            await client.start(home, lab, command=keeper())
        assert (await machine.run(["true"])).exit_code == 0


def test_a_damaged_slot_is_named_in_the_list_and_can_be_destroyed(home: Home) -> None:
    slots.create(home, "good", AskedMachine())
    slots.create(home, "bad", AskedMachine())
    (home.slots / "bad" / "machine.json").write_text("{")
    found, broken = asyncio.run(client.look_at_all(home))
    assert [each.name for each in found] == ["good"]
    assert "bad" in broken[0].message
    asyncio.run(client.destroy(home, "bad"))
    assert slots.names(home) == ["good"]


async def test_who_asks_for_a_lock_does_not_disturb_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert holder(path) is None
    script = ("import sys; from pathlib import Path; from vmjob.host.holding import held\n"
              f"with held(Path({str(path)!r}), 0): print('held', flush=True); sys.stdin.read()")
    async with await anyio.open_process([sys.executable, "-c", script]) as process:
        assert process.stdout
        assert (await process.stdout.receive()).strip() == b"held"
        assert holder(path) == process.pid
        with pytest.raises(BlockingIOError), held(path, 0):
            pass
        process.kill()
        await process.wait()
    assert holder(path) is None
    with held(path, 0):
        pass


def sleeping(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline() == ["sleep", mark]:
                found.append(process)
    return found
