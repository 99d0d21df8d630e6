"""The tasks of a job on its machine: one after the other, their output, and how far they are."""

from __future__ import annotations

import contextlib
import math
import signal
from dataclasses import dataclass
from typing import Literal

import anyio

from vmjob.engine.clock import RunClock
from vmjob.engine.commands import command
from vmjob.engine.fraction import overall, parse_fraction, parse_number
from vmjob.engine.output import Output
from vmjob.engine.peeking import peek
from vmjob.engine.progress import Progress
from vmjob.engine.record import Record, exit_code_of
from vmjob.engine.session import Session, beside
from vmjob.errors import (
    AgentProtocol,
    CommandNotExecutable,
    CommandNotFound,
    GuestRefused,
    JobError,
    TimeLimit,
    VmjobError,
)
from vmjob.grid.contract import Grid
from vmjob.guest.client import SHORT_COMMAND, Limits, TaskEnd
from vmjob.job.model import Job, OnFlood, Task
from vmjob.job.triggers import parse_credit

__all__ = ["Verdict", "Work"]

#: Seconds from the signal that ends a job (SIGTERM) to the one that cannot be ignored.
GRACE = 5.0
#: Seconds of run time in which the end of a killed task is heard of, on any computer.
PATIENCE = 60.0
#: What only this side can have ended a task for; `TaskEnd.ended_by`.
OURS = frozenset({"time-limit", "duration", "task-limit", "output-limit", "verdict", "job-over"})


#: Seconds between looks at a task's fraction file, and the longest one that is read, bytes.
FRACTION_PERIOD = 2.0
FRACTION_BYTES = 64 << 10


@dataclass(frozen=True)
class Verdict:
    """How a job ended by its own word, whatever its tasks still did; see `Record`."""

    exit_code: int
    message: str = ""
    notice: bool = False


class Work:
    """The tasks of a job. `run` carries them to their end, from ``progress`` on if there is any."""

    def __init__(self, session: Session, job: Job, grid: Grid, record: Record, output: Output,
                 clock: RunClock, progress: Progress | None = None) -> None:
        self._session = session
        self._job = job
        self._tasks = [task for task in job.tasks if not task.daemon]
        self._grid = grid
        self._record = record
        self._output = output
        self._clock = clock
        self._number: int | None = None
        #: The agent's numbers of the daemons that were started, in their order.
        self._daemons: list[int] = []
        self._ended: list[anyio.Event] = []
        #: Run time of the job when the task that runs began, seconds.
        self._since = 0.0
        self._offsets: dict[Literal["stdout", "stderr"], int] = {}
        #: Bytes of the streams before the task that runs.
        self._base = dict(output.position)
        self._heard_bytes = 0
        #: Held while a task begins or ends: host and guest are then not of one mind about it.
        self.steady = anyio.Lock()
        self._over = anyio.Event()
        self._verdict: Verdict | VmjobError | None = None
        #: Why this side ended the task, if it did.
        self._stopped_for: str | None = None
        self._continued = progress is not None
        if progress is not None:
            record.tasks = list(progress.ends)
            self._number, self._daemons = progress.number, list(progress.daemons)
            self._since = progress.task_since
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
            self._clock.seconds, client.messages_seen, list(self._daemons), self._since)

    def end(self, verdict: Verdict | VmjobError) -> None:
        """The job is over, whatever its tasks do; `run` then returns, or raises the error."""
        if self._verdict is None:
            self._verdict = verdict
            self._over.set()

    async def run(self) -> None:
        """Run the tasks in order; the first that fails is the last, unless it may."""
        self._session.client.on_message(self._heard)
        async with contextlib.AsyncExitStack() as watches:
            for number in self._daemons:
                await self._watch(watches, number)
            await self._run_tasks(watches)
            await self._end_daemons()

    async def _run_tasks(self, watches: contextlib.AsyncExitStack) -> None:
        done, daemons = len(self._record.tasks), len(self._daemons)
        for task in self._job.tasks:
            if task.daemon:
                daemons -= 1
                if daemons < 0:
                    await self._start_daemon(watches, task)
                continue
            done -= 1
            if done >= 0:
                continue
            if self._verdict is None:
                await self._one(task)
            if self._verdict is not None:
                break
            if self._record.exit_code != 0 or self._stopped_for == "duration":
                return
        self.conclude()

    def conclude(self) -> None:
        """Let the job's own word decide, if there was one; raises the error that it ended with."""
        if isinstance(self._verdict, VmjobError):
            self._record.exit_code = self._verdict.exit_code  # not that of a task killed for it
            raise self._verdict
        if self._verdict is not None:
            record = self._record
            record.exit_code, record.message = self._verdict.exit_code, self._verdict.message
            record.notice = self._verdict.notice

    async def _one(self, task: Task) -> None:
        """Run a task and judge its end."""
        end = await self._run_task(task)
        if end.ended_by == "time-limit":
            raise TimeLimit(f"the job did not end within {self._job.time_limit:g} seconds")
        if end.ended_by == "out-of-memory":
            self._grid.warning("the machine ran out of memory and ended the job's largest "
                               "process; --memory gives it more")
        if end.ended_by == "output-limit":
            raise JobError("the job was ended because it wrote more than its stream limit",
                           advice="Raise --stream-limit, or let the rest be discarded.")
        if end.ended_by in ("task-limit", "duration"):
            self._record.exit_code = 0
        elif self._record.exit_code != 0 and task.may_fail:
            self._grid.warning(f"{task.title} failed ({self._record.exit_code}), which it may")
            self._record.exit_code = 0
        self._fraction(0.0)

    async def _run_task(self, task: Task) -> TaskEnd:
        client = self._session.client
        feeds = self._grid.has_input and task.stdin is None
        async with self.steady:
            if self._number is None:
                self._since = self._clock.seconds
                if task.fraction_file is not None:
                    await self._remove(task.fraction_file)
                try:
                    self._number = await self._start(task, feeds)
                except (CommandNotFound, CommandNotExecutable) as error:
                    if not task.may_fail:
                        raise
                    return self._never_began(error)
            self._grid.task(task.title, len(self._record.tasks) + 1, len(self._tasks))
        number = self._number
        end = None
        with anyio.CancelScope() as patience:
            async with beside(self._feed(number, feeds)), \
                    beside(self._enforce(task, number, patience)), \
                    beside(self._read_fractions(task)):
                end = await client.follow(number, self._output.take, self._offsets)
        if end is None:
            raise AgentProtocol("the machine says nothing of the end of a task that was killed")
        if end.ended_by in OURS and end.ended_by != self._stopped_for:
            raise AgentProtocol(f"the machine says {end.ended_by!r}, which was not reached")
        async with self.steady:
            self._record.tasks.append(end)
            self._record.exit_code = exit_code_of(end)
            self._number, self._offsets, self._base = None, {}, dict(self._output.position)
            client.forget(number)
        return end

    def _never_began(self, error: VmjobError) -> TaskEnd:
        """The end of a task whose program is not there, as a shell would have it."""
        self._grid.warning(error.message)
        end = TaskEnd(exit_code=error.exit_code, signal=None, wall_seconds=0.0, rusage={},
                      ended_by=None, cpu_seconds=None, memory_peak_bytes=None, oom_kills=0)
        self._record.tasks.append(end)
        self._record.exit_code = error.exit_code
        return end

    async def _start(self, task: Task, feeds: bool) -> int:
        argv, cwd = command(task)
        return await self._session.client.start(
            argv, env=task.env, cwd=cwd, user=task.user,
            limits=Limits(cpu_seconds=task.cpu_seconds, memory_bytes=task.memory_bytes,
                          file_bytes=task.file_bytes, processes=task.processes),
            stdin=feeds, wait=0.0 if feeds or task.daemon else SHORT_COMMAND)

    async def _remove(self, path: str) -> None:
        """Remove a file of the machine, where there is one: it would speak for another task."""
        with contextlib.suppress(GuestRefused):
            await self._session.client.delete(path)

    async def _feed(self, number: int, feeds: bool) -> None:
        if feeds:
            await self._session.client.feed(number, self._grid.input, again=self._continued)

    # -- daemons -------------------------------------------------------------------------------

    async def _start_daemon(self, watches: contextlib.AsyncExitStack, task: Task) -> None:
        async with self.steady:
            number = await self._start(task, feeds=False)
            self._daemons.append(number)
        await self._watch(watches, number)

    async def _watch(self, watches: contextlib.AsyncExitStack, number: int) -> None:
        self._ended.append(anyio.Event())
        await watches.enter_async_context(
            beside(self._watch_daemon(len(self._ended) - 1, number, self._ended[-1])))

    async def _watch_daemon(self, index: int, number: int, ended: anyio.Event) -> None:
        end = await self._session.client.follow(number, _nowhere)
        ended.set()
        if end.ended_by != "job-over":
            task = [task for task in self._job.tasks if task.daemon][index]
            self._grid.warning(f"{task.title} was to run as long as the job, but has ended "
                               f"({exit_code_of(end)})")

    async def _end_daemons(self) -> None:
        """End them, politely first: what they write then still belongs to the job."""
        client = self._session.client
        with anyio.move_on_after(GRACE):
            for number, end in zip(self._daemons, self._ended, strict=True):
                if not end.is_set():
                    await client.signal(number, signal.SIGTERM, why="job-over")
            for end in self._ended:
                await end.wait()
        for number, end in zip(self._daemons, self._ended, strict=True):
            if not end.is_set():
                await client.signal(number, signal.SIGKILL, why="job-over")
                await end.wait()

    # -- what ends a task early ----------------------------------------------------------------

    async def _enforce(self, task: Task, number: int, patience: anyio.CancelScope) -> None:
        """End a task when its time is over, the job is, or it floods and is stopped for that.

        ``patience`` is cancelled when its end is not heard of then: root in the machine may have
        put something in the agent's place, which answers for ever.
        """
        job, reached = self._job, self._clock.reach
        ends = {"time-limit": job.time_limit, "duration": job.duration,
                "task-limit": None if task.time_limit is None else self._since + task.time_limit}
        async with anyio.create_task_group() as waiting:
            def because(why: str) -> None:
                self._stopped_for = self._stopped_for or why
                waiting.cancel_scope.cancel()

            async def at(why: str, seconds: float) -> None:
                await reached(seconds)
                because(why)

            async def when(why: str, event: anyio.Event) -> None:
                await event.wait()
                because(why)

            self._stopped_for = None
            for why, seconds in ends.items():
                waiting.start_soon(at, why, math.inf if seconds is None else seconds)
            waiting.start_soon(when, "verdict", self._over)
            if job.on_flood is OnFlood.STOP:
                waiting.start_soon(when, "output-limit", self._output.flooded)
        client, reason = self._session.client, self._stopped_for
        if reason != "verdict":
            await client.signal(number, signal.SIGTERM, why=reason)
            await anyio.sleep(GRACE)
        await client.signal(number, signal.SIGKILL, why=reason)
        until = self._clock.seconds + PATIENCE
        while self._clock.seconds < until:
            await reached(self._clock.seconds + 1)
            if self._output.blocked:  # its end comes behind output that nobody takes
                until = self._clock.seconds + PATIENCE
        patience.cancel()

    # -- how far it is -------------------------------------------------------------------------

    async def _read_fractions(self, task: Task) -> None:
        while task.fraction_file is not None:
            await anyio.sleep(FRACTION_PERIOD)
            await self._clock.going()
            content = await peek(self._session, task.fraction_file, FRACTION_BYTES)
            fraction = None if content is None else parse_fraction(content)
            if fraction is not None:
                self._fraction(fraction)

    def _fraction(self, of_task: float) -> None:
        ended = len(self._record.tasks)
        if len(self._tasks) > 1 or of_task:
            self._grid.fraction_done(overall([task.weight for task in self._tasks], ended, of_task))

    def _heard(self, text: str) -> None:
        """A message of the job; the words of `vmjob_job` are understood, others passed on.

        All together are no longer than one stream: they go to files and terminals as that does.
        """
        had, self._heard_bytes = self._heard_bytes, self._heard_bytes + len(text.encode()) + 1
        if self._heard_bytes > self._job.stream_limit:
            if had <= self._job.stream_limit:
                self._grid.warning(f"the job's messages are longer than {self._job.stream_limit} "
                                   "bytes; the rest is thrown away")
            return
        word, _, value = text.partition(" ")
        fraction = parse_number(value) if word == "fraction_done" else None
        if fraction is not None and fraction <= 1:
            self._fraction(fraction)
        elif word == "ops_cumulative" and (operations := parse_credit(
                value.replace(" ", "\n", 1).encode())) is not None:
            self._grid.operations(*operations)
        elif text != "checkpoint_completed":  # the machine as a whole is kept when it is time
            self._grid.message(text)


async def _nowhere(stream: Literal["stdout", "stderr"], data: bytes) -> None:
    """A daemon's streams are files; there is nothing to take."""
