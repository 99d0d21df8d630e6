"""A whole job on the fake driver: outcomes, limits, bad input and bad luck."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import anyio
import psutil
import pytest

from tests.conftest import eventually
from vmjob.engine import starting as starting_module
from vmjob.engine.control import Control
from vmjob.engine.ownership import claim, leftovers, sweep
from vmjob.engine.record import Record
from vmjob.engine.request import Request, Survival
from vmjob.engine.run import run_job
from vmjob.engine.slot import Asked, Slot
from vmjob.errors import UsageError
from vmjob.grid.contract import Quiet
from vmjob.guest import transfer
from vmjob.home import Home
from vmjob.host import durable
from vmjob.job.files import check_guest_path, parse_input, parse_output
from vmjob.job.model import Job, OnFlood, Task
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver, Faults

pytestmark = pytest.mark.anyio


class Heard(Quiet):
    """A grid that remembers."""

    def __init__(self) -> None:
        self.out = b""
        self.err = b""
        self.phases: list[str] = []
        self.warnings: list[str] = []
        self.messages: list[str] = []
        self.fractions: list[float] = []
        self.wrote = asyncio.Event()

    async def output(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        if stream == "stdout":
            self.out += data
        else:
            self.err += data
        self.wrote.set()

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def fraction_done(self, fraction: float) -> None:
        self.fractions.append(fraction)


class Runner:
    def __init__(self, home: Home, shape: MachineSpec, tmp_path: Path) -> None:
        self.home = home
        self.shape = shape
        self.tmp_path = tmp_path
        self.grid = Heard()

    async def __call__(self, script: str, *, faults: Faults | None = None, keep: Path | None = None,
                       out: tuple[str, ...] = (), into: tuple[str, ...] = (),
                       **limits: object) -> Record:
        job = Job(tasks=(Task(("sh", "-c", script)),), inputs=tuple(map(parse_input, into)),
                  outputs=tuple(parse_output(f"{name}:{self.tmp_path / 'out'}") for name in out),
                  **limits)  # type: ignore[arg-type]
        request = Request(job, FakeDriver(faults), self.shape, {}, hashes=True, keep=keep)
        record = await run_job(self.home, request, self.grid)
        assert list(self.home.machines.iterdir()) == [], "a machine was left"
        return record


@pytest.fixture
def run(home: Home, fake_shape: MachineSpec, tmp_path: Path) -> Runner:
    return Runner(home, fake_shape, tmp_path)


def code(record: Record) -> str | None:
    return record.error["code"] if record.error else None


@pytest.mark.parametrize(("script", "expected"), [
    ("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -15 $$", 143)])
async def test_the_exit_code_is_the_jobs_own(run: Runner, script: str, expected: int) -> None:
    record = await run(script)
    assert (record.exit_code, record.error) == (expected, None)
    assert record.status == ("succeeded" if expected == 0 else "failed")


async def test_inputs_go_in_and_outputs_come_out(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("hello")
    record = await run("tr a-z A-Z < sub/in > result", into=(f"{tmp_path / 'data'}:sub/in",),
                       out=("result",))
    assert (tmp_path / "out").read_text() == "HELLO"
    assert record.outputs[0].size == 5
    assert record.outputs[0].sha256.startswith("3733cd977ff8eb18")
    phases = ["template", "machine", "thaw", "inputs", "run", "outputs", "end"]
    assert run.grid.phases == phases
    assert set(record.phases) == {*phases, "total"}


async def test_outputs_are_safe_before_the_job_counts_as_ended(
        home: Home, fake_shape: MachineSpec, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    sync, end = durable.sync, Slot.end

    def syncing(path: Path) -> None:
        done.append(path)
        sync(path)

    def ending(slot: Slot, record: Record) -> None:
        done.append("end")
        end(slot, record)

    monkeypatch.setattr(durable, "sync", syncing)
    monkeypatch.setattr(Slot, "end", ending)
    out = tmp_path / "out"
    job = Job(tasks=(Task(("sh", "-c", "mkdir -p r/s; echo x > r/s/t")),),
              outputs=(parse_output(f"r:{out}"),))
    with Slot.claim(tmp_path / "slot") as slot:
        slot.begin(Asked(job))
        record = await run_job(home, Request(job, FakeDriver(None), fake_shape, {},
                                             survival=Survival(slot)), Heard())
    assert record.exit_code == 0
    assert {tmp_path, out, out / "s", out / "s" / "t"} <= set(done[:done.index("end")])


async def test_a_missing_input_is_found_before_anything_starts(run: Runner,
                                                               tmp_path: Path) -> None:
    record = await run("true", into=(str(tmp_path / "nothing"),))
    assert (code(record), record.exit_code) == ("input-missing", 125)
    assert run.grid.phases == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_an_unreadable_input_is_named(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "secret").touch(mode=0)
    assert code(await run("true", into=(str(tmp_path / "secret"),))) == "input-unreadable"


async def test_a_disk_that_is_full_at_the_end_is_no_fault_of_the_path(
        run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def full(source: str, target: str, **where: int) -> None:
        if target == "out":
            raise OSError(errno.ENOSPC, "no space left")
        rename(source, target, **where)

    monkeypatch.setattr(transfer.os, "rename", full)
    assert code(await run("echo x > r", out=("r",))) == "host-disk-full"


async def test_an_output_that_the_job_did_not_make_is_an_error(run: Runner) -> None:
    record = await run("true", out=("result",))
    assert (code(record), record.exit_code) == ("output-missing", 125)


async def test_a_failing_jobs_own_code_comes_before_its_missing_output(run: Runner) -> None:
    record = await run("exit 3", out=("result",))
    assert (record.exit_code, record.error) == (3, None)
    assert record.warnings == ["the job made no 'result'"]


@pytest.mark.parametrize("script", [
    "mkfifo result", "ln -s /etc/passwd result", "mkdir result; ln -s ../../etc/passwd result/x",
    "mkdir result; mkfifo result/x", "mkdir result; touch \"$(printf 'result/a\\nb')\"",
    "mkdir result; touch \"$(printf 'result/a\\200b')\"",
    "mkdir result; ln -s /etc result/etc"])
async def test_an_output_that_could_fool_the_host_is_refused_whole(
        run: Runner, tmp_path: Path, script: str) -> None:
    record = await run(script, out=("result",))
    assert (code(record), record.exit_code) == ("output-unsafe", 125)
    assert not (tmp_path / "out").exists()
    assert record.error is not None
    assert record.error["advice"]


async def test_an_output_over_its_limit_is_refused_whole(run: Runner, tmp_path: Path) -> None:
    record = await run("head -c 2000 /dev/zero > result", out=("result",), output_limit=1999)
    assert code(record) == "output-too-large"
    assert not (tmp_path / "out").exists()
    record = await run("head -c 2000 /dev/zero > result", out=("result",), output_limit=2000)
    assert code(record) is None


async def test_the_time_limit_ends_the_whole_job(run: Runner) -> None:
    record = await run("trap '' TERM; sleep 1000 & sleep 1000", time_limit=0.3)
    assert (code(record), record.exit_code) == ("time-limit", 137)
    record = await run("sleep 1000", time_limit=0.3)
    assert (code(record), record.exit_code) == ("time-limit", 143)


async def test_a_flood_of_output_is_cut_and_the_job_goes_on(run: Runner) -> None:
    record = await run("yes | head -c 5000000; exit 4", stream_limit=1000)
    assert (record.exit_code, len(run.grid.out)) == (4, 1000)
    assert (record.stdout_bytes, record.discarded_bytes) == (5_000_000, 4_999_000)
    assert len(run.grid.warnings) == 1


async def test_a_flood_of_output_ends_the_job_when_that_was_asked(run: Runner) -> None:
    with anyio.fail_after(30):
        record = await run("yes", stream_limit=100_000, on_flood=OnFlood.STOP)
    assert code(record) == "job"
    assert len(run.grid.out) == 100_000


async def test_progress_and_messages_are_told_apart(run: Runner) -> None:
    await run('for x in "fraction_done 0.25" "fraction_done 7" "fraction_done x" hi; do '
              'echo "$x" > "$VMJOB_TO_HOST"; done; sleep 0.3')
    assert run.grid.fractions == [0.25]
    assert run.grid.messages == ["fraction_done 7", "fraction_done x", "hi"]


async def test_a_machine_that_does_not_start_says_why(run: Runner) -> None:
    record = await run("true", faults=Faults(start="no such machine"))
    assert (code(record), record.exit_code) == ("machine-start-failed", 125)


@pytest.mark.parametrize("said", [b"\xff" * 1000, b"HTTP/1.1 200 OK\r\n\r\n" * 100, b""])
async def test_something_that_is_no_agent_is_found_out(
        run: Runner, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting_module, "BOOT_DEADLINE", 0.3)
    record = await run("true", faults=Faults(says=said))
    assert (code(record), record.exit_code) == ("boot-timeout", 125)


async def test_an_agent_that_dies_ends_the_job_with_a_clear_error(run: Runner) -> None:
    # Without isolation the job can reach its agent: its parent is the agent.
    record = await run("kill -9 $PPID; sleep 1000")
    assert (code(record), record.exit_code) == ("agent-lost", 125)
    assert record.error is not None
    assert record.error["retryable"] is True


async def test_a_machine_that_is_killed_while_it_stands_still_is_no_wrong_request(
        home: Home, fake_shape: MachineSpec, tmp_path: Path) -> None:
    control, grid = Control(), Heard()
    job = Job(tasks=(Task(("sh", "-c", "echo runs; sleep 60")),))
    running = asyncio.ensure_future(run_job(home, Request(job, FakeDriver(None), fake_shape, {},
                                                          control=control), grid))
    async with asyncio.timeout(30):
        await grid.wrote.wait()
        assert await control.suspend()
        assert control.pid is not None
        keeper = psutil.Process(control.pid)
        below = keeper.children(recursive=True)
        keeper.kill()
        record = await running
        for each in below:  # stopped ones, which no real machine has
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    assert code(record) == "machine-died"


async def test_a_failed_jobs_logs_are_kept_when_asked(run: Runner, tmp_path: Path) -> None:
    record = await run("exit 1", keep=tmp_path / "kept")
    assert record.kept is not None
    assert (Path(record.kept) / "owner.json").exists()


@pytest.mark.parametrize("faults", [None, Faults(start="no such luck")])
async def test_logs_that_cannot_be_kept_hide_no_failure(run: Runner, tmp_path: Path,
                                                        faults: Faults | None) -> None:
    (tmp_path / "kept").touch()
    record = await run("exit 1", faults=faults, keep=tmp_path / "kept" / "there")
    assert (record.exit_code, code(record)) == (
        (125, "machine-start-failed") if faults else (1, None))
    assert record.kept is None


async def test_a_cancelled_job_leaves_nothing(run: Runner, home: Home) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(run, "echo started; sleep 1000")
            await run.grid.wrote.wait()
            scope.cancel()
    assert list(home.machines.iterdir()) == []


async def test_two_jobs_at_once_do_not_meet(home: Home, fake_shape: MachineSpec,
                                            tmp_path: Path) -> None:
    runners = [Runner(home, fake_shape, tmp_path) for _ in range(3)]

    async def one(number: int) -> None:
        job = Job(tasks=(Task(("sh", "-c", f"echo {number} > f; sleep 0.2; cat f")),))
        request = Request(job, FakeDriver(), fake_shape, {})
        assert (await run_job(home, request, runners[number].grid)).exit_code == 0
        assert runners[number].grid.out == f"{number}\n".encode()

    async with anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(one, number)


OWNER = """
import os, sys
from vmjob.engine.ownership import claim
from vmjob.home import Home
with claim(Home()) as (name, directory):
    (directory / "file").write_text("x")
    print(name, flush=True)
    sys.stdin.read()
"""


def test_the_sweep_takes_what_dead_owners_left_and_nothing_else(home: Home) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    with owner, claim(home) as (mine, _):
        assert owner.stdout is not None
        theirs = owner.stdout.readline().strip()
        (home.machines / "a file").touch()
        assert sweep(home) == []
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert [each.id for each in leftovers(home)] == [theirs]
        assert [each.id for each in sweep(home)] == [theirs]
        assert (home.machines / mine).exists()
    assert eventually(lambda: [p.name for p in home.machines.iterdir()] == ["a file"])


@pytest.mark.parametrize("path", ["", "/", "..", "a/../b", "a\nb", "a\0b", "\udc80", "../x"])
def test_a_path_that_leaves_or_lies_is_refused(path: str) -> None:
    with pytest.raises(UsageError):
        check_guest_path(path)


@pytest.mark.parametrize(("text", "source", "destination"), [
    ("a", "a", "a"), ("dir/a", "dir/a", "a"), ("a:b/c", "a", "b/c"), ("a:b/", "a", "b/a"),
    ("/x/y:/abs", "/x/y", "/abs")])
def test_inputs_are_read_as_documented(text: str, source: str, destination: str) -> None:
    found = parse_input(text)
    assert (str(found.source), found.destination) == (source, destination)


@pytest.mark.parametrize(("text", "source", "destination"), [
    ("out", "out", "out"), ("dir/out", "dir/out", "out"), ("out:x/y", "out", "x/y"),
    ("out:x/", "out", "x/out"), ("/abs/f:here", "/abs/f", "here")])
def test_outputs_are_read_as_documented(text: str, source: str, destination: str) -> None:
    found = parse_output(text)
    assert (found.source, found.destination) == (source, Path(destination).absolute())


@pytest.mark.parametrize("text", ["/abs/only", "../x", "a/../../b", ":x"])
def test_outputs_that_are_unclear_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_output(text)


@pytest.mark.parametrize("change", [
    {"memory_mb": 64}, {"memory_mb": 1 << 40}, {"cpus": 0}, {"disk_gb": 0}, {"time_limit": 0},
    {"tasks": ()}, {"tasks": (Task(()),)}])
def test_a_job_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    good = Job(tasks=(Task(("true",)),))
    good.check()
    with pytest.raises(UsageError):
        replace(good, **change).check()  # type: ignore[arg-type]
