"""What a task may have of its own: files for its streams, a weight, a limit, helpers beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.engine.clock import RunClock
from vmjob.engine.commands import command
from vmjob.engine.fraction import overall, parse_fraction
from vmjob.engine.output import Output as EngineOutput
from vmjob.engine.peeking import peek
from vmjob.engine.record import Record
from vmjob.engine.request import Request
from vmjob.engine.run import run_job
from vmjob.engine.session import open_session
from vmjob.engine.work import Work
from vmjob.errors import UsageError
from vmjob.grid.contract import Quiet
from vmjob.home import Home
from vmjob.job.files import Output
from vmjob.job.model import Job, Task
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver, FakeMachine, Faults

pytestmark = pytest.mark.anyio


class Heard(Quiet):
    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.tasks: list[tuple[str, int, int]] = []
        self.warnings: list[str] = []
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def fraction_done(self, fraction: float) -> None:
        self.fractions.append(fraction)

    def task(self, title: str, number: int, count: int) -> None:
        self.tasks.append((title, number, count))

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Messenger:
    """Of a machine nothing but its messages."""

    def on_message(self, sink: Callable[[str], None]) -> None:
        self.say = sink

    async def start(self, *args: object, **more: object) -> int:
        raise NotImplementedError


class Runner:
    """Runs tasks as one job on a fake machine; ``file`` reads what it left."""

    def __init__(self, home: Home, shape: MachineSpec, results: Path) -> None:
        self._home = home
        self._shape = shape
        self._results = results
        self.grid = Heard()

    async def __call__(self, *tasks: Task, outputs: tuple[str, ...] = (), **more: Any) -> Record:
        job = Job(tasks, outputs=tuple(Output(name, self._results / name) for name in outputs),
                  **more)
        with anyio.fail_after(60):
            return await run_job(self._home, Request(job, FakeDriver(), self._shape, {}), self.grid)

    def file(self, name: str) -> str:
        return (self._results / name).read_text()


@pytest.fixture
def run(home: Home, fake_shape: MachineSpec, tmp_path: Path) -> Runner:
    (tmp_path / "results").mkdir()
    return Runner(home, fake_shape, tmp_path / "results")


def sh(script: str, **more: Any) -> Task:
    return Task(("sh", "-c", script), **more)


async def test_streams_of_a_task_can_be_files_that_tasks_share(run: Runner) -> None:
    record = await run(sh("echo a; echo b >&2", stdout="out", stderr="it's err"),
                       sh("cat; echo c", stdin="out", stdout="out 2"),
                       sh("echo d", stdout="out"),
                       outputs=("out", "out 2", "it's err"))
    assert record.exit_code == 0
    assert run.file("out") == "a\nd\n"
    assert run.file("out 2") == "a\nc\n"
    assert run.file("it's err") == "b\n"
    assert record.stdout_bytes == record.stderr_bytes == 0


async def test_input_that_is_not_there_fails_the_task(run: Runner) -> None:
    record = await run(sh("true", stdin="nothing"), sh("echo never", stdout="out"))
    assert record.exit_code != 0
    assert len(record.tasks) == 1
    assert record.stderr_bytes > 0  # the shell says what is missing


async def test_files_are_below_the_jobs_directory_wherever_the_task_is(run: Runner) -> None:
    record = await run(sh("mkdir sub; echo in > in"),
                       sh("pwd; cat", cwd="sub", stdin="in", stdout="out"), outputs=("out",))
    assert record.exit_code == 0
    assert run.file("out").splitlines()[0].endswith("/sub")
    assert run.file("out").splitlines()[1] == "in"


def test_words_with_any_character_reach_the_program_unchanged() -> None:
    task = Task(("prog", "$HOME", "a b", "'\"", ";"), stdout="x;y", cwd="-")
    assert command(task) == (
        ["/bin/sh", "-c", "exec >>'x;y' && cd ./- && exec \"$@\"", "prog", *task.argv], None)
    assert command(Task(("prog", "a"), cwd="b")) == (["prog", "a"], "b")


async def test_a_task_that_may_fail_does_not_end_the_job(run: Runner) -> None:
    record = await run(sh("exit 3", may_fail=True, name="unpack"), sh("exit 0"))
    assert record.exit_code == 0
    assert [end.exit_code for end in record.tasks] == [3, 0]
    assert run.grid.warnings == ["unpack failed (3), which it may"]


async def test_a_program_that_is_not_there_may_be_missing_too(run: Runner) -> None:
    record = await run(Task(("no-such-program",), may_fail=True), sh("true"))
    assert (record.exit_code, record.error) == (0, None)
    assert [end.exit_code for end in record.tasks] == [127, 0]
    record = await run(Task(("no-such-program",)), sh("true"))
    assert record.error is not None


async def test_a_task_is_ended_at_its_own_limit_and_the_next_one_runs(run: Runner) -> None:
    record = await run(sh("sleep 60", time_limit=0.3), sh("echo next", stdout="out"),
                       outputs=("out",))
    assert record.error is None
    assert record.exit_code == 0
    assert record.tasks[0].ended_by == "task-limit"
    assert run.file("out") == "next\n"


async def test_a_job_that_reaches_its_duration_has_succeeded(run: Runner) -> None:
    record = await run(sh("echo so far > out; sleep 60"), sh("echo never >> out"), duration=0.5,
                       outputs=("out",))
    assert record.error is None
    assert (record.exit_code, record.status) == (0, "succeeded")
    assert run.file("out") == "so far\n"


async def test_a_daemon_runs_beside_all_tasks_and_is_ended_with_them(run: Runner) -> None:
    daemon = sh("trap 'echo bye >> log; exit' TERM; while :; do date > up; sleep 0.05; done",
                daemon=True)
    wait = "until test -s up; do sleep 0.05; done; rm up"
    record = await run(daemon, sh(wait), sh(wait), outputs=("log",))
    assert record.error is None
    assert record.exit_code == 0
    assert len(record.tasks) == 2
    assert run.file("log") == "bye\n"
    assert run.grid.warnings == []


async def test_a_daemon_begins_when_it_is_its_turn(run: Runner) -> None:
    record = await run(sh("test ! -e up && echo first > ready"),
                       sh("cat ready > up; sleep 60", daemon=True),
                       sh("until test -s up; do sleep 0.05; done"), outputs=("up",))
    assert record.exit_code == 0
    assert run.file("up") == "first\n"


async def test_a_fraction_of_an_earlier_task_is_none_of_this_one(
        run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.engine.work.FRACTION_PERIOD", 0.05)
    await run(sh("echo 1 > f"), sh("sleep 0.5", fraction_file="f"))
    assert run.grid.fractions == [0.5, 1.0]


async def test_a_daemon_that_ends_too_early_is_told(run: Runner) -> None:
    record = await run(Task(("sh", "-c", "echo gone; exit 7"), daemon=True, name="server"),
                       sh("until test -s server.log; do sleep 0.05; done; sleep 0.3"),
                       outputs=("server.log",))
    assert record.exit_code == 0
    assert run.grid.warnings == ["server was to run as long as the job, but has ended (7)"]
    assert run.file("server.log") == "gone\n"


async def test_a_daemon_that_does_not_want_to_end_is_killed(
        run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.engine.work.GRACE", 0.2)
    record = await run(sh("trap '' TERM; while :; do sleep 0.05; done", daemon=True), sh("true"))
    assert record.exit_code == 0


def test_a_job_of_nothing_but_daemons_is_refused() -> None:
    with pytest.raises(UsageError, match="daemons"):
        Job((Task(("server",), daemon=True),)).check()


async def test_tasks_count_by_their_weight(run: Runner) -> None:
    await run(sh("true", weight=3.0), sh("true", weight=0.0), sh("true", weight=1.0))
    assert run.grid.fractions == [0.75, 0.75, 1.0]
    assert run.grid.tasks == [("sh", 1, 3), ("sh", 2, 3), ("sh", 3, 3)]


async def test_the_fraction_that_a_task_writes_is_its_share_of_the_job(
        run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.engine.work.FRACTION_PERIOD", 0.05)
    run.grid.fraction_done = run.grid.fractions.append  # type: ignore[method-assign]
    await run(sh("true"), sh("echo 0.1 > f; echo 0.5 >> f; sleep 1", fraction_file="f"))
    assert run.grid.fractions[0] == 0.5
    assert 0.75 in run.grid.fractions
    assert run.grid.fractions[-1] == 1.0


@pytest.mark.parametrize(("content", "fraction"), [
    (b"0.25\n", 0.25), (b"0.1\n0.5", 0.5), (b"7", 1.0), (b"1e-2\n\n", 0.01), (b"", None),
    (b"half", None), (b"nan", None), (b"-1", None), (b"0.5 %", None), (b"\xff", None)])
def test_a_fraction_is_the_number_on_the_last_line(content: bytes, fraction: float | None) -> None:
    assert parse_fraction(content) == fraction


@given(st.binary(max_size=200))
def test_any_bytes_are_a_fraction_or_none(content: bytes) -> None:
    fraction = parse_fraction(content)
    assert fraction is None or 0 <= fraction <= 1


@given(st.lists(st.floats(-1, 1e6), min_size=1, max_size=9), st.integers(0, 9),
       st.floats(0, 1))
def test_a_jobs_fraction_is_one_and_never_falls_back(weights: list[float], ended: int,
                                                     fraction: float) -> None:
    ended = min(ended, len(weights))
    assert 0 <= overall(weights, ended, fraction) <= 1
    if ended < len(weights):
        assert overall(weights, ended, fraction) <= overall(weights, ended + 1, 0.0) + 1e-9
    assert overall(weights, len(weights), 0.0) == pytest.approx(1.0)


async def test_a_fraction_file_that_is_a_directory_costs_nothing(
        home: Home, fake_shape: MachineSpec) -> None:
    async with open_session(home, FakeDriver(), fake_shape) as session:
        assert isinstance(session.machine, FakeMachine)
        (session.machine.workdir / "f" / "g").mkdir(parents=True)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert await peek(session, "f", 100) is None
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        assert not (session.machine.spec.directory / "peeked").exists()


async def test_messages_without_end_are_thrown_away_as_output_is() -> None:
    """They are kept in events files and logs: a guest must not fill a disk with them."""
    grid = Heard()
    job = Job((sh("true"),), stream_limit=1000)
    record = Record()
    client = Messenger()
    work = Work(SimpleNamespace(client=client), job, grid, record,  # type: ignore[arg-type]
                EngineOutput(job, grid, record, None, {}), RunClock())
    with pytest.raises(NotImplementedError):
        await work.run()
    for _ in range(500):
        client.say("x" * 99)
    assert len(grid.messages) == 10
    assert len(grid.warnings) == 1


@pytest.mark.parametrize(("value", "fraction"), [
    ("0.25", 0.25), ("1e-2 ", 0.01), ("7", None), ("a\n0.5", None), ("0.5\na", None),
    ("1e999", None), ("\u0660.\u0665", None), ("", None)])
async def test_a_message_of_a_fraction_is_one_or_a_message_like_others(
        value: str, fraction: float | None) -> None:
    grid, client, job = Heard(), Messenger(), Job((sh("true"),))
    record = Record()
    work = Work(SimpleNamespace(client=client), job, grid, record,  # type: ignore[arg-type]
                EngineOutput(job, grid, record, None, {}), RunClock())
    with pytest.raises(NotImplementedError):
        await work.run()
    client.say(text := f"fraction_done {value}")
    assert grid.fractions == ([] if fraction is None else [fraction])
    assert grid.messages == ([text] if fraction is None else [])


# -- an agent that says nothing of a task's end --------------------------------------------------


async def test_a_killed_task_whose_end_nobody_tells_ends_the_job(
        home: Home, fake_shape: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root in the machine may have put something in the agent's place that answers for ever."""
    monkeypatch.setattr("vmjob.engine.work.GRACE", 0.1)
    monkeypatch.setattr("vmjob.engine.work.PATIENCE", 1.0)
    job = Job((Task(("sleep", "60")),), time_limit=0.3)
    with anyio.fail_after(60):
        record = await run_job(home, Request(job, FakeDriver(Faults(endless=True)), fake_shape, {},
                                             cold=True), Heard())
    assert record.error is not None
    assert record.error["code"] == "agent-protocol"


class Slow(Heard):
    """Takes its time with what a job has written."""

    async def output(self, stream: str, data: bytes) -> None:
        await anyio.sleep(4.5)


async def test_a_reader_who_takes_his_time_is_no_silence_of_the_machine(
        home: Home, fake_shape: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.engine.work.GRACE", 0.1)
    monkeypatch.setattr("vmjob.engine.work.PATIENCE", 2.5)
    job = Job((Task(("sh", "-c", "echo one; sleep 60")),), time_limit=0.3)
    with anyio.fail_after(60):
        record = await run_job(home, Request(job, FakeDriver(), fake_shape, {}), Slow())
    assert record.error is not None
    assert record.error["code"] == "time-limit"


async def test_a_machine_that_ends_no_command_is_not_waited_for_when_it_is_frozen(
        home: Home, fake_shape: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.engine.freezing.WARM_DEADLINE", 1.0)
    monkeypatch.setattr("vmjob.engine.work.GRACE", 0.1)
    monkeypatch.setattr("vmjob.engine.work.PATIENCE", 1.0)
    job = Job((Task(("sleep", "60")),), time_limit=0.3)
    grid = Heard()
    with anyio.fail_after(60):
        await run_job(home, Request(job, FakeDriver(Faults(endless=True)), fake_shape, {}), grid)
    assert any("does not end its first small commands" in each for each in grid.warnings)
