"""What the client is told of each end that a job can have."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from vmjob import errors
from vmjob.engine.record import Record
from vmjob.engine.request import Request
from vmjob.engine.run import run_job
from vmjob.errors import VmjobError, all_errors
from vmjob.grid.contract import Quiet
from vmjob.guest.client import TaskEnd
from vmjob.home import Home
from vmjob.job.model import Job, OnFlood, Task
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver
from vmjob.wrapper.outcome import (
    AGAIN,
    FIRST,
    MOST,
    MOST_MACHINE_FAULTS,
    Finish,
    Postpone,
    of_error,
    of_record,
)


def ended(code: int | None, signal: int | None = None, by: str | None = None) -> TaskEnd:
    return TaskEnd(exit_code=code, signal=signal, wall_seconds=1.0, rusage={}, ended_by=by,
                   cpu_seconds=1.0, memory_peak_bytes=None, oom_kills=0)


def failed(error: VmjobError, code: int = 125) -> Record:
    return Record(exit_code=code, error=error.as_dict())


@pytest.mark.parametrize("code", [0, 1, 7, 126, 127, 139, 255])
def test_a_jobs_own_exit_code_is_what_the_client_gets(code: int) -> None:
    assert of_record(Record(exit_code=code, tasks=[ended(code)]), 0) == Finish(code)


def test_what_the_job_says_to_the_volunteer_is_passed_on() -> None:
    record = Record(exit_code=0, message="all found", notice=True)
    assert of_record(record, 0) == Finish(0, "all found", True)


def test_a_guest_out_of_memory_has_the_exit_code_that_boinc_has_for_it() -> None:
    assert of_record(Record(exit_code=137, tasks=[ended(None, 9, "out-of-memory")]), 0) == Finish(
        205)


@pytest.mark.parametrize(("kind", "code"), [
    (errors.JobFileInvalid, 206), (errors.InputMissing, 206), (errors.ImageCorrupt, 206),
    (errors.TimeLimit, 197), (errors.FolderFull, 196), (errors.OutputTooLarge, 196),
    (errors.HeartbeatStopped, 194), (errors.OutputMissing, 195), (errors.JobError, 195)])
def test_faults_of_the_job_end_it_at_once(kind: type[VmjobError], code: int) -> None:
    for before in (0, 50):
        assert of_record(failed(kind("x")), before) == Finish(code)


@pytest.mark.parametrize("code", [143, 137, 3])
@pytest.mark.parametrize(("kind", "by", "told"), [
    (errors.TimeLimit, "time-limit", 197), (errors.JobError, "output-limit", 195)])
def test_a_job_that_we_ended_has_boincs_code_for_it_not_our_signals(
        kind: type[VmjobError], by: str, told: int, code: int) -> None:
    record = failed(kind("x"), code)
    record.tasks = [ended(0), ended(code, by=by)]
    assert of_record(record, 0) == of_record(record, 50) == Finish(told)


@pytest.mark.anyio
@pytest.mark.parametrize(("script", "more", "told"), [
    ("sleep 60", {"time_limit": 0.3}, 197),
    ("trap 'exit 3' TERM; while :; do sleep 0.05; done", {"time_limit": 0.3}, 197),
    ("while :; do echo much; done", {"stream_limit": 1000, "on_flood": OnFlood.STOP}, 195)])
async def test_a_job_over_a_limit_is_told_as_that_however_it_died(
        home: Home, fake_shape: MachineSpec, monkeypatch: pytest.MonkeyPatch, script: str,
        more: dict[str, Any], told: int) -> None:
    monkeypatch.setattr("vmjob.engine.work.GRACE", 0.5)
    job = Job((Task(("sh", "-c", script)),), **more)
    with anyio.fail_after(60):
        record = await run_job(home, Request(job, FakeDriver(), fake_shape, {}), Quiet())
    assert record.exit_code in (3, 137, 143)
    assert of_record(record, 0) == Finish(told)


def test_a_job_that_failed_by_itself_keeps_its_code_though_an_output_is_missing() -> None:
    record = failed(errors.OutputMissing("x"), 7)
    record.tasks = [ended(7)]
    assert of_record(record, 0) == Finish(7)


def test_a_command_that_was_not_found_keeps_the_shells_code_for_that() -> None:
    assert of_record(failed(errors.CommandNotFound("x"), 127), 0) == Finish(127)


@pytest.mark.parametrize("kind", [
    errors.AcceleratorUnusable, errors.HostDiskFull, errors.HostMemoryLow, errors.ProgramMissing,
    errors.ProcessorChanged, errors.PolicyForbids, errors.PolicyInvalid, errors.SlotUnusable,
    errors.ImageBuildFailed])
def test_faults_of_the_computer_postpone_the_job_twice_as_long_each_time(
        kind: type[VmjobError]) -> None:
    error = kind("it is so", advice="Do that.")
    told = [of_record(failed(error), before) for before in range(10)]
    assert told[0] == Postpone(FIRST, "it is so. Do that.", notice=True)
    seconds = [each.seconds for each in told if isinstance(each, Postpone)]
    assert seconds[:4] == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert max(seconds) == seconds[-1] == MOST < 86400
    # Once is enough: the reason stays visible as the task's status.
    assert [each.notice for each in told if isinstance(each, Postpone)] == [True] + [False] * 9


def test_a_volunteer_is_told_nothing_of_options_and_variables() -> None:
    for kind in all_errors():
        outcome = of_error(kind("it is so").as_dict(), 0)
        if isinstance(outcome, Postpone):
            assert "--" not in outcome.reason
            assert "VMJOB_" not in outcome.reason
    own = errors.HostDiskFull("it is so", advice="Do that.")  # where somebody knows better
    assert of_error(own.as_dict(), 0) == Postpone(FIRST, "it is so. Do that.", notice=True)


def test_what_to_do_is_never_cut_off() -> None:
    error = errors.AcceleratorUnusable("kvm: " + "€" * 200, advice="Do that.")
    outcome = of_error(error.as_dict(), 0)
    assert isinstance(outcome, Postpone)
    assert outcome.reason.startswith("kvm: ")
    assert outcome.reason.endswith(".... Do that.")
    assert len(outcome.reason.encode()) <= 240


def test_another_machine_in_the_way_is_nothing_to_tell_the_volunteer() -> None:
    assert of_error(errors.Busy("two run").as_dict(), 0) == Postpone(
        FIRST, f"two run. {errors.Busy.standing_advice}", notice=False)


@pytest.mark.parametrize("kind", [errors.MachineDied, errors.AgentLost, errors.BootTimeout,
                                  errors.WrongState])
def test_a_machine_that_fails_goes_on_at_once_then_later_then_never(
        kind: type[VmjobError]) -> None:
    told = [of_record(failed(kind("gone")), before) for before in range(MOST_MACHINE_FAULTS + 1)]
    assert told[0] is AGAIN
    assert told[1] == Postpone(FIRST, "gone")
    assert told[2] == Postpone(2 * FIRST, "gone")
    assert told[-1] == Finish(195, "gone")


@pytest.mark.parametrize(("asked", "seconds"), [(90, 90), (0, 0), (86400, MOST), (-5, 0)])
def test_a_job_that_wants_to_wait_may_but_never_for_a_day(asked: float, seconds: int) -> None:
    error = errors.Postponed("no work now", delay=asked, notice=True)
    assert of_record(failed(error, 75), 3) == Postpone(seconds, "no work now", notice=True)


def test_every_error_that_there_is_has_an_outcome() -> None:
    for kind in all_errors():
        assert isinstance(of_error(kind("x").as_dict(), 0), Finish | Postpone | type(AGAIN))
