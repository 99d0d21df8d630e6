"""A job with a shared folder as a whole: what its trigger files decide, to the very end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from vmjob.engine.folders import Mirror
from vmjob.engine.record import Record
from vmjob.engine.request import Request
from vmjob.engine.run import run_job
from vmjob.errors import AgentProtocol, GuestRefused
from vmjob.grid.contract import Quiet
from vmjob.home import Home
from vmjob.job.files import Folder, Output
from vmjob.job.model import Job, Task, Triggers
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver

pytestmark = pytest.mark.anyio


class Heard(Quiet):
    def __init__(self) -> None:
        self.heard: list[object] = []
        self.warnings: list[str] = []

    async def trickle(self, variety: str, text: str) -> bool:
        self.heard.append((variety, text))
        return True

    async def upload(self, name: str) -> None:
        self.heard.append(name)

    def operations(self, floating: float, integer: float) -> None:
        self.heard.append((floating, integer))

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Runner:
    """Runs a script as a job whose folder ``shared`` is ``here`` on the host."""

    def __init__(self, home: Home, shape: MachineSpec, here: Path) -> None:
        self._home = home
        self._shape = shape
        self.here = here
        self.grid = Heard()

    async def __call__(self, script: str, triggers: Triggers, **more: Any) -> Record:
        job = Job((Task(("sh", "-c", script)),), folders=(Folder("shared", self.here, "shared"),),
                  triggers=triggers, **more)
        with anyio.fail_after(60):
            return await run_job(self._home, Request(job, FakeDriver(), self._shape, {}), self.grid)


@pytest.fixture
def run(home: Home, fake_shape: MachineSpec, tmp_path: Path) -> Runner:
    return Runner(home, fake_shape, tmp_path / "shared here")


async def test_a_job_that_succeeds_without_its_output_does_not_end_with_0(
        run: Runner, tmp_path: Path) -> None:
    """Its task was ended by us, for success: that is no exit code to keep."""
    missing = (Output("result", tmp_path / "result"),)
    record = await run("echo 0 > shared/done; sleep 60", Triggers(completion="done"),
                       outputs=missing)
    assert record.error is not None
    assert (record.exit_code, record.status) == (125, "failed")
    record = await run("sleep 60", Triggers(), duration=0.3, outputs=missing)
    assert record.error is not None
    assert record.exit_code == 125


async def test_what_a_job_says_with_its_last_breath_is_heard(run: Runner) -> None:
    record = await run("cd shared; echo hello > t; echo x > part; echo 5 > ops; exit 0",
                       Triggers(trickles=("t",), uploads=("part",), credit="ops"))
    assert record.exit_code == 0
    assert run.grid.heard == [(5.0, 0.0), ("t", "hello\n"), "part"]
    assert not (run.here / "t").exists()


async def test_a_completion_file_counts_however_soon_the_task_ends_after_it(run: Runner) -> None:
    record = await run("printf '3\\n1\\nno input\\n' > shared/done; exit 0",
                       Triggers(completion="done"))
    assert (record.exit_code, record.message, record.notice) == (3, "no input", True)
    assert record.status == "failed"


async def test_a_job_that_wants_to_wait_and_ends_at_once_is_put_off(run: Runner) -> None:
    record = await run("printf '60\\n' > shared/later; exit 0", Triggers(temporary_exit="later"))
    assert record.exit_code == 75


async def test_a_word_that_ends_the_job_has_the_exit_code_of_that_word(run: Runner) -> None:
    """Not that of the task, which was killed for it."""
    record = await run("sleep 60", Triggers(heartbeat="beat", heartbeat_interval=0.3))
    assert record.error is not None
    assert (record.error["code"], record.exit_code) == ("heartbeat-stopped", 125)


@pytest.mark.parametrize("trouble", [
    GuestRefused("the folder is gone"), AgentProtocol("a lie"), OSError(24, "too many files")])
async def test_a_job_whose_folder_fails_does_not_run_on_unheard(
        run: Runner, monkeypatch: pytest.MonkeyPatch, trouble: Exception) -> None:
    """It would wait for ever for an answer, and nobody would see its completion file."""
    async def step(self: Mirror) -> bool:
        raise trouble

    monkeypatch.setattr(Mirror, "step", step)
    monkeypatch.setattr(Mirror, "collect", step)
    began = time.monotonic()
    record = await run("sleep 50", Triggers(completion="done"))
    assert time.monotonic() - began < 30
    assert record.error is not None
    assert record.exit_code == 125
