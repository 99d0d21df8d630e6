"""The tasks of a job on its machine: one after the other, their output, and how far they are."""

from __future__ import annotations

import contextlib
import signal
from typing import Literal

import anyio

from vmjob.engine.clock import RunClock
from vmjob.engine.output import Output
from vmjob.engine.progress import Progress
from vmjob.engine.record import Record, exit_code_of
from vmjob.engine.session import Session, beside
from vmjob.errors import AgentProtocol, JobError, TimeLimit
from vmjob.grid.contract import Grid
from vmjob.guest.client import SHORT_COMMAND, Limits, TaskEnd
from vmjob.job.model import Job, OnFlood, Task

__all__ = ["Work"]

#: Seconds from the signal that ends a job (SIGTERM) to the one that cannot be ignored.
GRACE = 5.0


class Work:
    """The tasks of a job. `run` carries them to their end, from ``progress`` on if there is any."""

    def __init__(self, session: Session, job: Job, grid: Grid, record: Record, output: Output,
                 clock: RunClock, progress: Progress | None = None) -> None:
        self._session = session
        self._job = job
        self._grid = grid
        self._record = record
        self._output = output
        self._clock = clock
        self._number: int | None = None
        self._offsets: dict[Literal["stdout", "stderr"], int] = {}
        #: Bytes of the streams before the task that runs.
        self._base = dict(output.position)
        #: Held while a task begins or ends: host and guest are then not of one mind about it.
        self.steady = anyio.Lock()
        self._continued = progress is not None
        if progress is not None:
            record.tasks = list(progress.ends)
            self._number = progress.number
            self._offsets = {"stdout": progress.received.get("stdout", 0),
                             "stderr": progress.received.get("stderr", 0)}
            self._base = {stream: count - progress.received.get(stream, 0)
                          for stream, count in output.position.items()}
            session.client.continue_command(self._number, self._offsets)
            session.client.continue_messages(progress.messages_seen)

    @property
    def running(self) -> bool:
        """Whether a task runs, or its end was not understood yet."""
        return self._number is not None

    def progress(self) -> Progress:
        """How far the job is now; needs `running`, and `steady` held."""
        assert self._number is not None
        client = self._session.client
        received = client.received(self._number)
        return Progress(
            list(self._record.tasks), self._number,
            {str(stream): count for stream, count in received.items()},
            {stream: self._base[stream] + count for stream, count in received.items()},
            self._clock.seconds, client.messages_seen)

    async def run(self) -> None:
        """Run the tasks in order; the first that fails is the last."""
        self._session.client.on_message(self._heard)
        for task in self._job.tasks[len(self._record.tasks):]:
            end = await self._run_task(task)
            if end.ended_by == "time-limit":
                raise TimeLimit(f"the job did not end within {self._job.time_limit:g} seconds")
            if end.ended_by == "out-of-memory":
                self._grid.warning("the machine ran out of memory and ended the job's largest "
                                   "process; --memory gives it more")
            if end.ended_by == "output-limit":
                raise JobError("the job was ended because it wrote more than its stream limit",
                               advice="Raise --stream-limit, or let the rest be discarded.")
            if self._record.exit_code != 0:
                return

    async def _run_task(self, task: Task) -> TaskEnd:
        client = self._session.client
        async with self.steady:
            if self._number is None:
                self._number = await client.start(
                    list(task.argv), env=task.env, cwd=task.cwd, user=task.user,
                    limits=Limits(cpu_seconds=task.cpu_seconds, memory_bytes=task.memory_bytes,
                                  file_bytes=task.file_bytes, processes=task.processes),
                    stdin=self._grid.has_input,
                    wait=0.0 if self._grid.has_input else SHORT_COMMAND)
        number = self._number
        async with beside(self._feed(number)), beside(self._enforce(number)):
            end = await client.follow(number, self._output.take, self._offsets)
        stopped_for = self._output.stopped_for
        if end.ended_by in ("time-limit", "output-limit") and end.ended_by != stopped_for:
            raise AgentProtocol(f"the machine says {end.ended_by!r}, which was not reached")
        async with self.steady:
            self._record.tasks.append(end)
            self._record.exit_code = exit_code_of(end)
            self._number, self._offsets, self._base = None, {}, dict(self._output.position)
            client.forget(number)
        return end

    async def _feed(self, number: int) -> None:
        if self._grid.has_input:
            await self._session.client.feed(number, self._grid.input, again=self._continued)

    async def _enforce(self, number: int) -> None:
        """End the job at its time limit, or when it floods and is to be stopped for it."""
        async with anyio.create_task_group() as waiting:
            waiting.start_soon(self._time_over, waiting.cancel_scope)
            waiting.start_soon(self._flooded, waiting.cancel_scope)
        client, why = self._session.client, self._output.stopped_for
        await client.signal(number, signal.SIGTERM, why=why)
        await anyio.sleep(GRACE)
        await client.signal(number, signal.SIGKILL, why=why)

    async def _time_over(self, waiting: anyio.CancelScope) -> None:
        if self._job.time_limit is None:
            await anyio.sleep_forever()
        else:
            await self._clock.reach(self._job.time_limit)
            self._output.stopped_for = "time-limit"
            waiting.cancel()

    async def _flooded(self, waiting: anyio.CancelScope) -> None:
        if self._job.on_flood is not OnFlood.STOP:
            await anyio.sleep_forever()
        await self._output.flooded.wait()
        self._output.stopped_for = "output-limit"
        waiting.cancel()

    def _heard(self, text: str) -> None:
        """A message of the job: ``fraction_done 0.5`` is understood, everything is passed on."""
        word, _, value = text.partition(" ")
        if word == "fraction_done":
            with contextlib.suppress(ValueError):
                fraction = float(value)
                if 0 <= fraction <= 1:
                    self._grid.fraction_done(fraction)
                    return
        self._grid.message(text)
