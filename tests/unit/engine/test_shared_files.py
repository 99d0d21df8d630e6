"""A job and its host speak by files; whatever they say, the job ends once and as it said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from vmjob.engine.record import Record
from vmjob.engine.request import Request
from vmjob.engine.run import run_job
from vmjob.errors import UsageError
from vmjob.grid.contract import Quiet
from vmjob.home import Home
from vmjob.job.files import Folder
from vmjob.job.model import Job, Task, Triggers
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver

pytestmark = pytest.mark.anyio


class Heard(Quiet):
    def __init__(self) -> None:
        self.trickles: list[tuple[str, str]] = []
        self.warnings: list[str] = []

    async def trickle(self, variety: str, text: str) -> bool:
        self.trickles.append((variety, text))
        return True

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Runner:
    """Runs a script with a shared folder on a fake machine."""

    def __init__(self, home: Home, shape: MachineSpec, root: Path) -> None:
        self._home = home
        self._shape = shape
        self.shared = root / "shared"
        self.shared.mkdir()
        self.grid = Heard()

    async def __call__(self, script: str, limits: dict[str, Any] | None = None,
                       **triggers: Any) -> Record:
        job = Job((Task(("sh", "-c", f"cd shared; {script}")),),
                  folders=(Folder("shared", self.shared, "shared", **(limits or {})),),
                  triggers=Triggers(**triggers))
        with anyio.fail_after(60):
            return await run_job(self._home, Request(job, FakeDriver(), self._shape, {}), self.grid)

    def file(self, name: str) -> str:
        return (self.shared / name).read_text()


@pytest.fixture
def run(home: Home, fake_shape: MachineSpec, tmp_path: Path) -> Runner:
    return Runner(home, fake_shape, tmp_path)


async def test_a_completion_file_ends_a_job_that_would_run_on(run: Runner) -> None:
    record = await run("echo result > out; printf '3\\n1\\nenough\\n' > .d; mv .d done; sleep 60",
                       completion="done")
    assert record.error is None
    assert (record.exit_code, record.status) == (3, "failed")
    assert (record.message, record.notice) == ("enough", True)
    assert run.file("out") == "result\n"


async def test_a_completion_file_of_success_is_success(run: Runner) -> None:
    record = await run("echo 0 > done; sleep 60", completion="done")
    assert (record.error, record.exit_code, record.status) == (None, 0, "succeeded")


async def test_what_an_earlier_run_said_is_not_said_of_this_one(run: Runner) -> None:
    (run.shared / "done").write_text("9\n")
    (run.shared / "credit").write_text("old")
    record = await run("sleep 1; exit 4", completion="done", trickles=("credit",))
    assert record.exit_code == 4
    assert run.grid.trickles == []


async def test_a_trickle_is_sent_and_the_job_sees_that(run: Runner) -> None:
    record = await run("echo one > .t; mv .t t; while [ -e t ]; do sleep 0.05; done; "
                       "echo sent > out", trickles=("t",))
    assert record.exit_code == 0
    assert run.grid.trickles == [("t", "one\n")]
    assert run.file("out") == "sent\n"
    assert not (run.shared / "t").exists()


async def test_a_job_that_wants_to_wait_goes_on_afterwards(run: Runner) -> None:
    record = await run("printf '0\\n0\\nno work yet\\n' > later; "
                       "while [ -e later ]; do sleep 0.05; done; echo on > out",
                       temporary_exit="later")
    assert record.exit_code == 0
    assert run.file("out") == "on\n"
    assert run.grid.warnings == ["the job waits for 0 seconds: no work yet"]


async def test_a_heart_that_never_beats_ends_the_job_and_its_files_come(run: Runner) -> None:
    record = await run("echo log > log; sleep 60", heartbeat="beat", heartbeat_interval=1.0)
    assert record.error is not None
    assert record.error["code"] == "heartbeat-stopped"
    assert record.status == "failed"
    assert run.file("log") == "log\n"


async def test_a_folder_that_overflows_ends_the_job(run: Runner) -> None:
    record = await run("for i in 1 2 3 4 5 6 7 8 9; do echo $i > $i; done; sleep 60",
                       {"max_files": 5})
    assert record.error is not None
    assert record.error["code"] == "folder-full"


async def test_files_go_both_ways_while_the_job_runs(run: Runner) -> None:
    (run.shared / "in").write_text("from the host\n")
    record = await run("cat in > out; rm in; echo 0 > done; sleep 60", completion="done")
    assert record.exit_code == 0
    assert run.file("out") == "from the host\n"
    assert not (run.shared / "in").exists()


def test_triggers_need_a_shared_folder() -> None:
    with pytest.raises(UsageError, match="shared"):
        Job((Task(("true",)),), triggers=Triggers(completion="done")).check()
