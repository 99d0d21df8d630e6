"""One job, from its inputs to its record."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread

from vmjob.engine.record import Record, describe_output, exit_code_of
from vmjob.engine.session import Session, beside, describe, open_session
from vmjob.errors import AgentProtocol, JobError, OutputMissing, TimeLimit, VmjobError
from vmjob.grid.contract import Grid
from vmjob.guest.client import SHORT_COMMAND, Limits, TaskEnd
from vmjob.home import Home
from vmjob.job.model import Job, OnFlood, Task
from vmjob.machine.contract import Driver, MachineSpec

__all__ = ["Request", "run_job"]

#: Seconds from the signal that ends a job (SIGTERM) to the one that cannot be ignored.
GRACE = 5.0
GIB = 1 << 30


@dataclass(frozen=True)
class Request:
    """A job with what it runs on: a driver, the shape of its machine, and whom to tell.

    ``cold``: boot the machine, whatever templates there are. ``hashes``: whether the record gets
    the outputs' SHA-256 (they are read once more for it). ``keep``: where a failed job's machine
    logs go, if anywhere.
    """

    job: Job
    driver: Driver
    shape: MachineSpec
    image_facts: dict[str, Any]
    cold: bool = False
    hashes: bool = False
    keep: Path | None = None


class _Phases:
    """Seconds spent in each phase, in order."""

    def __init__(self, record: Record, grid: Grid) -> None:
        self._record = record
        self._grid = grid
        self._name: str | None = None
        self._began = self._since = time.monotonic()

    def begin(self, name: str) -> None:
        self._end()
        self._name, self._since = name, time.monotonic()
        self._grid.phase(name)

    def finish(self) -> None:
        self._end()
        self._record.phases["total"] = time.monotonic() - self._began

    def _end(self) -> None:
        if self._name:
            spent = time.monotonic() - self._since
            self._record.phases[self._name] = self._record.phases.get(self._name, 0.0) + spent
        self._name = None


class _Output:
    """Counts a job's output, passes it on up to its limit, and says when that is reached."""

    def __init__(self, job: Job, grid: Grid, record: Record) -> None:
        self._limit = job.stream_limit
        self._grid = grid
        self._record = record
        self._seen = {"stdout": 0, "stderr": 0}
        self.flooded = anyio.Event()
        #: Why this side ended the job, if it did.
        self.stopped_for: str | None = None

    async def take(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        room = max(0, self._limit - self._seen[stream])
        self._seen[stream] += len(data)
        if len(data) > room:
            self._record.discarded_bytes += len(data) - room
            if not self.flooded.is_set():
                self.flooded.set()
                self._grid.warning(f"{stream} is longer than {self._limit} bytes; the rest is "
                                   "thrown away")
        if room:
            await self._grid.output(stream, data[:room])
        self._record.stdout_bytes = self._seen["stdout"]
        self._record.stderr_bytes = self._seen["stderr"]


async def run_job(home: Home, request: Request, grid: Grid) -> Record:
    """Carry a job through its life; its record, whatever happened.

    Errors of vmjob are in the record, not raised; only a cancellation passes through, after
    the machine is gone.
    """
    record = Record(image=request.image_facts)
    phases = _Phases(record, grid)
    try:
        request.job.check()
        async with open_session(home, request.driver, request.shape, cold=request.cold,
                                on_phase=phases.begin, keep=request.keep) as session:
            record.machine = describe(session)
            if session.cold_because:
                grid.warning(f"the machine was booted, not copied: {session.cold_because}")
            async with session.explaining():
                phases.begin("inputs")
                await _put_inputs(session, request.job, grid)
                phases.begin("run")
                await _run_tasks(session, request.job, grid, record)
                phases.begin("outputs")
                await _get_outputs(session, request.job, grid, record)
            session.failed = record.exit_code != 0
            phases.begin("end")
            if session.failed and request.keep is not None:
                record.kept = str(request.keep / session.machine.spec.id)
        if request.hashes:
            for output in request.job.outputs:
                record.outputs += await anyio.to_thread.run_sync(describe_output,
                                                                 output.destination)
    except VmjobError as error:
        record.error = error.as_dict()
        # A job that ended badly by itself explains its missing outputs: its code comes first.
        own = bool(record.tasks) and exit_code_of(record.tasks[-1]) != 0
        if not own or not isinstance(error, JobError) or isinstance(error, TimeLimit):
            record.exit_code = error.exit_code
        if own and isinstance(error, TimeLimit):
            record.exit_code = exit_code_of(record.tasks[-1])
        record.kept = error.context.get("kept")
    finally:
        phases.finish()
    record.status = "succeeded" if record.exit_code == 0 and not record.error else "failed"
    return record


async def _put_inputs(session: Session, job: Job, grid: Grid) -> None:
    for given in job.inputs:
        await session.client.put(given.source, given.destination,
                                 functools.partial(grid.transferred, str(given.source)))


async def _run_tasks(session: Session, job: Job, grid: Grid, record: Record) -> None:
    """Run the tasks in order; the first that fails is the last."""
    output = _Output(job, grid, record)
    session.client.on_message(lambda text: _heard(text, grid))
    deadline = None if job.time_limit is None else time.monotonic() + job.time_limit
    for task in job.tasks:
        end = await _run_task(session, job, task, grid, output, deadline)
        record.tasks.append(end)
        record.exit_code = exit_code_of(end)
        if end.ended_by == "time-limit":
            raise TimeLimit(f"the job did not end within {job.time_limit:g} seconds")
        if end.ended_by == "out-of-memory":
            grid.warning("the machine ran out of memory and ended the job's largest process; "
                         "--memory gives it more")
        if end.ended_by == "output-limit":
            raise JobError("the job was ended because it wrote more than its stream limit",
                           advice="Raise --stream-limit, or let the rest be discarded.")
        if record.exit_code != 0:
            return


async def _run_task(session: Session, job: Job, task: Task, grid: Grid, output: _Output,
                    deadline: float | None) -> TaskEnd:
    client = session.client
    limits = Limits(cpu_seconds=task.cpu_seconds, memory_bytes=task.memory_bytes,
                    file_bytes=task.file_bytes, processes=task.processes)
    number = await client.start(list(task.argv), env=task.env, cwd=task.cwd, user=task.user,
                                limits=limits, stdin=grid.has_input,
                                wait=0.0 if grid.has_input else SHORT_COMMAND)
    async with beside(_feed(session, number, grid)), \
            beside(_enforce(session, number, job, output, deadline)):
        end = await client.follow(number, output.take)
    client.forget(number)
    if end.ended_by in ("time-limit", "output-limit") and end.ended_by != output.stopped_for:
        raise AgentProtocol(f"the machine says {end.ended_by!r}, which was not reached")
    return end


async def _feed(session: Session, number: int, grid: Grid) -> None:
    if grid.has_input:
        await session.client.feed(number, grid.input)


async def _enforce(session: Session, number: int, job: Job, output: _Output,
                   deadline: float | None) -> None:
    """End the job at its time limit, or when it floods and is to be stopped for it."""
    stop = job.on_flood is OnFlood.STOP
    why = "output-limit"
    with anyio.move_on_after(None if deadline is None else deadline - time.monotonic()) as waiting:
        await (output.flooded.wait() if stop else anyio.sleep_forever())
    if waiting.cancelled_caught:
        why = "time-limit"
    output.stopped_for = why
    await session.client.signal(number, signal.SIGTERM, why=why)
    await anyio.sleep(GRACE)
    await session.client.signal(number, signal.SIGKILL, why=why)


def _heard(text: str, grid: Grid) -> None:
    """A message of the job: ``fraction_done 0.5`` is understood, everything is passed on."""
    word, _, value = text.partition(" ")
    if word == "fraction_done":
        with contextlib.suppress(ValueError):
            fraction = float(value)
            if 0 <= fraction <= 1:
                grid.fraction_done(fraction)
                return
    grid.message(text)


async def _get_outputs(session: Session, job: Job, grid: Grid, record: Record) -> None:
    """Fetch every declared output; the first problem is raised after all were tried."""
    limit = job.output_limit or job.disk_gb * GIB
    problems: list[VmjobError] = []
    for output in job.outputs:
        name = output.source
        try:
            await session.client.get(name, output.destination, limit=limit,
                                     progress=functools.partial(grid.transferred, name))
        except JobError as error:
            if isinstance(error, OutputMissing) and record.exit_code != 0:
                record.warnings.append(error.message)
                grid.warning(error.message)
            else:
                problems.append(error)
    if problems:
        raise problems[0]

