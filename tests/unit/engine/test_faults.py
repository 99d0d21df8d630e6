"""Whatever a machine or its guest does wrong, a job ends with a record that says so."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import anyio
import msgspec
import psutil
import pytest

from tests.conftest import eventually, open_descriptors
from vmjob.engine import ownership
from vmjob.engine import starting as starting_module
from vmjob.engine.ownership import claim, sweep
from vmjob.engine.record import Record, describe_output
from vmjob.engine.request import Request
from vmjob.engine.run import run_job
from vmjob.errors import HomeUnusable, HostDiskFull
from vmjob.grid.contract import Quiet
from vmjob.guest.client import AgentClient
from vmjob.guest.lane import Lane
from vmjob.home import Home
from vmjob.job.files import parse_output
from vmjob.job.model import Job, OnFlood, Task
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver, Faults

pytestmark = pytest.mark.anyio


class Heard(Quiet):
    """A grid that remembers what the job wrote."""

    def __init__(self) -> None:
        self.out = b""
        self.wrote = asyncio.Event()

    async def output(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        self.out += data
        self.wrote.set()


class Runner:
    """Runs scripts as jobs, each on a new fake machine; nothing may be left of any."""

    def __init__(self, home: Home, shape: MachineSpec) -> None:
        self.home = home
        self.shape = shape
        self.grid = Heard()

    async def __call__(self, *scripts: str, faults: Faults | None = None,
                       **more: Any) -> Record:
        job = Job(tasks=tuple(Task(("sh", "-c", script)) for script in scripts), **more)
        before = open_descriptors()
        try:
            with anyio.fail_after(60):
                return await run_job(self.home, Request(job, FakeDriver(faults), self.shape, {}),
                                     self.grid)
        finally:
            assert list(self.home.machines.iterdir()) == [], "a machine was left"
            assert psutil.Process().children(recursive=True) == [], "a process was left"
            assert open_descriptors() <= before, "a descriptor was left"


@pytest.fixture
def run(home: Home, fake_shape: MachineSpec) -> Runner:
    return Runner(home, fake_shape)


def code(record: Record) -> str | None:
    return record.error["code"] if record.error else None


@pytest.mark.parametrize(("faults", "expected", "retryable"), [
    (Faults(start="no"), "machine-start-failed", True),
    (Faults(answers=b"\xff\r\n\r\n"), "agent-protocol", True),
    (Faults(endless_head=True), "agent-protocol", True),
    (Faults(protocol=99), "agent-version", False),
    (Faults(dies_after=0), "agent-lost", True),
    (Faults(dies_after=1), "agent-lost", True),
    (Faults(dies_after=0, console="[ 1.0] Kernel panic - not syncing: oom"), "guest-panic", True),
])
async def test_a_machine_that_goes_wrong_is_named_in_the_record(
        run: Runner, faults: Faults, expected: str, retryable: bool) -> None:
    record = await run("true", faults=faults)
    assert (code(record), record.exit_code, record.status) == (expected, 125, "failed")
    assert record.error is not None
    assert record.error["retryable"] is retryable
    assert record.error["advice"]
    json.dumps(record.error)


@pytest.mark.parametrize("said", [b"", b"x" * 60_000])
async def test_a_machine_that_never_answers_is_a_boot_timeout(
        run: Runner, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(starting_module, "BOOT_DEADLINE", 0.3)
    assert code(await run("true", faults=Faults(says=said))) == "boot-timeout"


@pytest.mark.parametrize("lie", [
    {"exit_code": 300}, {"exit_code": None}, {"signal": 9}, {"exit_code": None, "signal": 0},
    {"ended_by": "time-limit"}, {"ended_by": "output-limit"}, {"rusage": {"x": "y"}},
    {"wall_seconds": float("nan")}])
async def test_a_result_that_cannot_be_is_no_result(run: Runner, lie: Mapping[str, Any]) -> None:
    record = await run("true", faults=Faults(result=lie))
    assert (code(record), record.exit_code) == ("agent-protocol", 125)


async def test_a_lie_cannot_turn_a_record_into_something_else_than_json(run: Runner) -> None:
    record = await run("true", faults=Faults(result={"ended_by": "\x1b[31m", "oom_kills": 1 << 60}))
    assert json.loads(msgspec.json.encode(record))["tasks"][0]["oom_kills"] == 1 << 60


@pytest.mark.parametrize(("lie", "kept"), [
    ({"ended_by": "a\ud800"}, "a\ufffd"), ({"ended_by": "\udcff"}, "\ufffd"),
    ({"ended_by": "\U0001f600"}, "\U0001f600"), ({"rusage": {"\udfff": 1.0}}, None)])
async def test_a_text_that_is_none_does_not_keep_a_record_from_being_written(
        run: Runner, lie: Mapping[str, Any], kept: str | None) -> None:
    record = await run("true", faults=Faults(result=lie))
    assert json.loads(msgspec.json.encode(record))["tasks"][0]["ended_by"] == kept


async def test_a_refusal_in_words_that_are_none_is_told(run: Runner) -> None:
    body = rb'{"error": "x\ud800", "message": "no \uDCff"}'
    record = await run("true", faults=Faults(
        answers=b"HTTP/1.1 500 x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)))
    said = json.loads(msgspec.json.encode(record))["error"]
    assert (said["code"], said["context"]["reason"]) == ("guest-refused", "x\ufffd")
    assert said["message"].endswith("no \ufffd")


async def test_the_machine_killed_in_the_middle_is_told_as_that(run: Runner) -> None:
    async def kill_machine() -> None:
        await run.grid.wrote.wait()
        (keeper,) = psutil.Process().children()
        keeper.kill()

    async with anyio.create_task_group() as group:
        group.start_soon(kill_machine)
        record = await run("echo started; exec sleep 1000")
    assert code(record) == "machine-died"
    assert record.error is not None
    assert "signal 9" in record.error["message"]
    assert run.grid.out == b"started\n"


async def test_an_agent_that_hangs_is_silent_and_the_job_ends(
        run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AgentClient._poll, "__defaults__", (0.1,))
    monkeypatch.setattr("vmjob.guest.client.DEADLINE", 0.3)
    monkeypatch.setattr(Lane.request, "__kwdefaults__", {"deadline": 0.3})
    record = await run("echo x; kill -STOP $PPID; exec sleep 1000")
    assert (code(record), record.exit_code) == ("agent-silent", 125)


@pytest.mark.parametrize("how", ["asyncio", "anyio"])
@pytest.mark.parametrize("hides", [False, True])
async def test_a_cancellation_ends_everything(run: Runner, how: str, hides: bool) -> None:
    script = "setsid sh -c 'echo $$; exec sleep 1000' & sleep 1000" if hides else \
        "echo $$; exec sleep 1000"
    if how == "asyncio":
        task = asyncio.ensure_future(run(script))
        await run.grid.wrote.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(run, script)
            await run.grid.wrote.wait()
            group.cancel_scope.cancel()
    pid = int(run.grid.out)
    assert eventually(lambda: not psutil.pid_exists(pid))


@pytest.mark.parametrize("after", [0.0, 0.005, 0.02, 0.05, 0.1])
async def test_a_cancellation_at_any_moment_leaves_nothing(run: Runner, after: float) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run("exec sleep 1000"), after)


async def test_the_first_task_that_fails_is_the_last(run: Runner) -> None:
    record = await run("echo one", "echo two; exit 3", "echo three")
    assert (record.exit_code, run.grid.out) == (3, b"one\ntwo\n")
    assert [task.exit_code for task in record.tasks] == [0, 3]


async def test_the_time_limit_is_of_all_tasks_together(run: Runner) -> None:
    record = await run("sleep 3", "sleep 1000", time_limit=5.5)
    assert (code(record), record.exit_code, len(record.tasks)) == ("time-limit", 143, 2)
    assert record.tasks[1].ended_by == "time-limit"
    assert record.tasks[1].wall_seconds < 5, "it had a limit of its own"


async def test_the_stream_limit_is_of_all_tasks_together(run: Runner) -> None:
    record = await run("printf 12345", "printf 67890", stream_limit=7)
    assert (run.grid.out, record.discarded_bytes, record.exit_code) == (b"1234567", 3, 0)


async def test_output_of_exactly_the_limit_is_no_flood(run: Runner) -> None:
    record = await run("printf 12345", stream_limit=5, on_flood=OnFlood.STOP)
    assert (run.grid.out, record.discarded_bytes, record.error) == (b"12345", 0, None)


async def test_one_bad_output_does_not_keep_the_others_from_coming(run: Runner,
                                                                   tmp_path: Path) -> None:
    names = ("bad", "missing", "good")
    outputs = tuple(parse_output(f"{name}:{tmp_path / name}") for name in names)
    record = await run("mkfifo bad; echo fine > good", outputs=outputs)
    assert code(record) == "output-unsafe"
    assert (tmp_path / "good").read_text() == "fine\n"
    assert not (tmp_path / "bad").exists()


async def test_links_that_lead_out_by_way_of_others_are_refused(run: Runner,
                                                                tmp_path: Path) -> None:
    record = await run("mkdir -p o/d; ln -s .. o/d/up; ln -s d/up/d/up/../../../../etc/passwd o/x",
                       outputs=(parse_output(f"o:{tmp_path / 'o'}"),))
    assert code(record) == "output-unsafe"
    assert not (tmp_path / "o").exists()


async def test_an_output_that_cannot_be_put_in_its_place_is_an_error(run: Runner,
                                                                     tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    record = await run("echo x > good", outputs=(parse_output(f"good:{tmp_path}/file/below"),))
    assert (code(record), record.exit_code) == ("bad-path", 125)


async def test_a_home_that_is_no_directory_is_an_error_in_the_record(
        fake_shape: MachineSpec, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    job = Job(tasks=(Task(("true",)),))
    record = await run_job(Home(tmp_path / "file"), Request(job, FakeDriver(), fake_shape, {}),
                           Quiet())
    assert (code(record), record.exit_code) == ("home-unusable", 125)


# -- ownership -----------------------------------------------------------------------------------


OWNER = """
import asyncio, sys
from vmjob.engine.session import open_session
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver

async def main():
    home = Home()
    async with open_session(home, FakeDriver(), MachineSpec("", home.root, None)) as session:
        await session.client.start(["sleep", "1000"])
        print(session.machine.spec.id, session.machine.pid, session.machine.agent_pid, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_the_next_job_sweeps_what_a_killed_owner_left(home: Home,
                                                      fake_shape: MachineSpec) -> None:
    job = Job(tasks=(Task(("true",)),))

    def next_job() -> int:
        request = Request(job, FakeDriver(), fake_shape, {})
        return asyncio.run(run_job(home, request, Quiet())).exit_code

    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        name, *pids = owner.stdout.readline().split()
        assert next_job() == 0
        assert (home.machines / name / "job").is_dir()
        owner.kill()
    assert all(eventually(lambda pid=pid: not psutil.pid_exists(int(pid))) for pid in pids)
    assert (home.machines / name).exists()
    assert next_job() == 0
    assert list(home.machines.iterdir()) == []


def test_a_directory_that_is_just_being_made_is_no_leftover(home: Home) -> None:
    young = home.machines / "young"
    young.mkdir()
    old = home.machines / "old"
    old.mkdir()
    os.utime(old, (0, 0))
    assert [each.id for each in sweep(home)] == ["old"]
    assert young.exists()


def test_an_owner_is_written_down_and_its_directory_is_its_own(home: Home) -> None:
    with claim(home) as (name, directory):
        assert directory == home.machines / name
        assert directory.stat().st_mode & 0o777 == 0o700
        assert json.loads((directory / "owner.json").read_text())["pid"] == os.getpid()
    assert not directory.exists()


@pytest.mark.parametrize(("number", "error"), [
    (errno.ENOSPC, HostDiskFull), (errno.EROFS, HomeUnusable)])
def test_a_claim_that_fails_leaves_nothing(home: Home, monkeypatch: pytest.MonkeyPatch,
                                           number: int, error: type[Exception]) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ownership.fcntl, "flock", refuse)
    before = open_descriptors()
    with pytest.raises(error), claim(home):
        raise AssertionError("not reached")
    assert list(home.machines.iterdir()) == []
    assert open_descriptors() == before


def test_an_owner_that_is_stopped_is_no_dead_one(home: Home) -> None:
    code = ("from vmjob.engine.ownership import claim\nfrom vmjob.home import Home\n"
            "with claim(Home()) as (name, _):\n print(name, flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        owner.send_signal(signal.SIGSTOP)
        assert sweep(home) == []
        assert (home.machines / name).exists()
        owner.kill()


def test_outputs_are_described_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "b").write_text("b")
    (tmp_path / "out" / "a").write_text("")
    (tmp_path / "out" / "link").symlink_to("/etc/passwd")
    found = describe_output(tmp_path / "out")
    assert [(Path(each.path).name, each.size) for each in found] == [("a", 0), ("b", 1)]
    assert found[0].sha256.startswith("e3b0c442")
    assert describe_output(tmp_path / "out" / "link") == []
