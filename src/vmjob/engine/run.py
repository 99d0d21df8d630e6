"""One job, from its inputs to its record."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from vmjob.engine.clock import RunClock
from vmjob.engine.devices import fill_mailbox, read_mailbox, show_screen, take_picture
from vmjob.engine.life import Life, State
from vmjob.engine.output import Output, make_safe, mark_duration
from vmjob.engine.record import Record, describe_output, exit_code_of
from vmjob.engine.request import Request
from vmjob.engine.session import Session, beside, describe, kept_report, open_session
from vmjob.engine.work import Work
from vmjob.errors import (
    JobError,
    OutputMissing,
    TimeLimit,
    VmjobError,
)
from vmjob.grid.contract import Grid
from vmjob.home import Home
from vmjob.job.files import INIT_DATA
from vmjob.job.model import Job

if TYPE_CHECKING:
    from vmjob.engine.generations import Generation
    from vmjob.engine.sharing import Sharing

__all__ = ["prepare", "run_job"]

GIB = 1 << 30
#: Seconds between looks at this computer's clock, and by how many it must have jumped.
CLOCK_PERIOD = 5.0
CLOCK_JUMP = 1.0


async def run_job(home: Home, request: Request, grid: Grid) -> Record:
    """Carry a job through its life; its record, whatever happened.

    Errors of vmjob are in the record, not raised; only a cancellation passes through, after
    the machine is gone (a job with a slot can then be continued). One without tasks boots what it
    brings.
    """
    if not request.job.tasks:
        return await _run_disk(home, request, grid)
    record = Record(image=request.image_facts, machine=dict(request.machine_facts))
    life = Life(record, grid)
    failure: VmjobError | None = None
    try:
        if request.survival is None:
            request.job.check()
        async with _begun(home, request, grid, life) as (session, generation):
            record.machine |= describe(session)
            if session.cold_because:
                grid.warning(f"the machine was booted, not copied: {session.cold_because}")
            async with session.explaining():
                hardware = request.job.hardware
                isolated = request.driver.capabilities.isolated
                if hardware.display:
                    show_screen(session.machine, request.job, grid)
                if request.job.forwards:
                    from vmjob.engine.ports import open_ports

                    await open_ports(session.machine, request.job, grid,
                                     remote=request.remote_ports)
                sharing = _sharing(session, request, grid, generation)
                if generation is None:
                    life.enter(State.INPUTS)
                    if request.shape.attached is not None:
                        from vmjob.engine.system import find_system

                        await find_system(session)
                    await _put_inputs(session, request.job, grid)
                    await fill_mailbox(session, hardware, isolated=isolated)
                    if sharing is not None:
                        await sharing.fill()
                life.enter(State.RUN)
                try:
                    await _run_tasks(home, request, grid, life, session, record, generation,
                                     sharing)
                except JobError:
                    if hardware.screenshot is not None:
                        await take_picture(session.machine, hardware.screenshot, grid)
                    if sharing is not None:  # what there is of its files explains the failure
                        with contextlib.suppress(VmjobError):
                            await sharing.collect()
                    raise
                if record.exit_code != 0 and hardware.screenshot is not None:
                    await take_picture(session.machine, hardware.screenshot, grid)
                life.enter(State.OUTPUTS)
                await read_mailbox(session, hardware, grid, isolated=isolated)
                if sharing is not None:
                    await sharing.collect()
                await _get_outputs(session, request.job, grid, record)
                if record.tasks and record.tasks[-1].ended_by == "duration":
                    mark_duration(request.job)
                if request.survival is not None:
                    await make_safe(request.job, sharing.came() if sharing else ())
            session.failed = record.exit_code != 0
            life.enter(State.END)
            if session.failed and request.keep is not None:
                record.kept = str(request.keep / session.machine.spec.id)
        if request.hashes:
            for output in request.job.outputs:
                record.outputs += await anyio.to_thread.run_sync(describe_output,
                                                                 output.destination)
    except VmjobError as error:
        failure = error
        record.error = error.as_dict()
        # A job that ended badly by itself explains its missing outputs: its code comes first. Not
        # so where its last task was ended by us, and that was no failure.
        own = bool(record.tasks) and record.exit_code != 0
        if not own or not isinstance(error, JobError) or isinstance(error, TimeLimit):
            record.exit_code = error.exit_code
        if own and isinstance(error, TimeLimit):
            record.exit_code = exit_code_of(record.tasks[-1])
        record.kept = error.context.get("kept")
    finally:
        life.finish()
    record.kept = kept_report(record.kept)
    record.status = "succeeded" if record.exit_code == 0 and not record.error else "failed"
    # What failed on our side may be tried again, from the last checkpoint.
    if request.survival is not None and (failure is None or (
            isinstance(failure, JobError) and not failure.retryable)):
        request.survival.slot.end(record)
    return record


async def _run_disk(home: Home, request: Request, grid: Grid) -> Record:
    """Carry a job without tasks, on the disk or CD that it brings.

    Where it needs an agent, and there is a Linux system on the disk, that runs on our kernel: see
    `vmjob.engine.system`. Else the machine boots by its BIOS.
    """
    from vmjob.engine.foreign import run_foreign
    from vmjob.engine.system import NoSystem, hosted

    if (in_ours := hosted(request)) is not None:
        try:
            return await run_job(home, in_ours, grid)
        except NoSystem as why:
            grid.warning(f"the disk boots by its BIOS: there is no Linux system on it that could "
                         f"be started otherwise ({why})")
    return await run_foreign(home, request, grid)


async def prepare(home: Home, request: Request) -> Record:
    """Have a frozen machine ready, so that the job starts at once later; runs nothing of it."""
    async with open_session(home, request.driver, request.shape, cold=request.cold) as session:
        return Record(exit_code=0, status="prepared", image=request.image_facts,
                      machine=describe(session))


@contextlib.asynccontextmanager
async def _begun(home: Home, request: Request, grid: Grid,
                 life: Life) -> AsyncIterator[tuple[Session, Generation | None]]:
    """The job's machine: from its newest checkpoint that is good, or else from the beginning."""
    slot = request.survival.slot if request.survival else None
    open_one = functools.partial(
        open_session, home, request.driver, cold=request.cold,
        on_phase=lambda phase: life.enter(State(phase)), keep=request.keep,
        place=slot.machine_place if slot else None)
    async with contextlib.AsyncExitStack() as stack:
        if slot is None:
            yield await stack.enter_async_context(open_one(request.shape)), None
            return
        from vmjob.engine.keeping import continued  # not at start-up: most jobs have no slot

        found = await continued(stack, slot.generations, request.shape, open_one, grid.warning)
        if found is not None:
            yield found
            return
        request.job.check()  # not before: a job that is continued has its inputs
        session = await stack.enter_async_context(open_one(request.shape))
        slot.generations.restart()  # not before: perhaps no machine starts here today
        yield session, None


async def _put_inputs(session: Session, job: Job, grid: Grid) -> None:
    for given in job.inputs:
        source = given.source
        # As in a folder: without the secrets, whatever leads to it.
        if os.path.realpath(source).endswith(f"{os.sep}{INIT_DATA}") and source.is_file():
            from vmjob.job.secrets import redacted_bytes

            content = await anyio.to_thread.run_sync(source.read_bytes)
            source = session.machine.spec.directory / INIT_DATA
            source.write_bytes(redacted_bytes(content))
        await session.client.put(source, given.destination,
                                 functools.partial(grid.transferred, str(given.source)))


def _sharing(session: Session, request: Request, grid: Grid,
             generation: Generation | None) -> Sharing | None:
    """The job's folders; None where it has none: most jobs need nothing of that."""
    if not request.job.folders:
        return None
    from vmjob.engine.sharing import Sharing

    return Sharing(session.client, request.job, grid,
                   request.survival.slot if request.survival else None,
                   generation.progress.folders if generation else {})


async def _run_tasks(home: Home, request: Request, grid: Grid, life: Life, session: Session,
                     record: Record, generation: Generation | None,
                     sharing: Sharing | None) -> None:
    """Run the tasks to their end, keeping them meanwhile as was asked."""
    job, survival = request.job, request.survival
    progress = generation.progress if generation else None
    position = dict(progress.position) if progress else {}
    clock = RunClock(progress.run_seconds if progress else 0.0)
    with contextlib.ExitStack() as stack:
        streams = None
        if survival is not None:
            from vmjob.engine.slot import Streams

            streams = Streams(survival.slot, {
                stream: min(count, job.stream_limit) for stream, count in position.items()})
            stack.callback(streams.close)
        output = Output(job, grid, record, streams, position)
        work = Work(session, job, grid, record, output, clock, progress)
        checkpointer = None
        if survival is not None and streams is not None:
            from vmjob.engine.checkpointing import Checkpointer, Tasks

            tasks = Tasks(work, output, streams, sharing.known if sharing else dict)
            checkpointer = Checkpointer(home, survival.slot, session, tasks, clock, life, grid,
                                        survival.disk_limit)
        clock.go()
        async with contextlib.AsyncExitStack() as helpers:
            await helpers.enter_async_context(
                request.control.attached(session, clock, life, checkpointer))
            await helpers.enter_async_context(beside(_keep_time(session, life)))
            if job.trickle_every is not None:
                from vmjob.engine.triggers import tell_run_time

                await helpers.enter_async_context(
                    beside(tell_run_time(clock, grid, job.trickle_every)))
            if job.duration is not None and not job.tells_its_fraction:
                from vmjob.engine.triggers import tell_share

                await helpers.enter_async_context(beside(tell_share(clock, grid, job.duration)))
            if sharing is not None:
                await helpers.enter_async_context(beside(sharing.keep_in_step(
                    work.end, clock, grid, request.control, survival.slot if survival else None)))
            if checkpointer is not None and survival is not None:
                await helpers.enter_async_context(beside(checkpointer.every(survival.pace)))
            await work.run()
        if sharing is not None:
            await sharing.last_words()
            work.conclude()
        if streams is not None:
            await anyio.to_thread.run_sync(streams.sync)


async def _keep_time(session: Session, life: Life) -> None:
    """Tell the machine the time when this computer's clock has jumped: it slept, or was set."""
    before = time.time() - time.monotonic()
    while True:
        await anyio.sleep(CLOCK_PERIOD)
        now = time.time() - time.monotonic()
        if abs(now - before) > CLOCK_JUMP and life.state is not State.SUSPENDED:
            before = now
            await session.client.set_clock()


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

