"""A job that is a whole disk: it boots, does its work, and switches itself off.

There is no agent in it, so nobody asks it anything: it has succeeded when it has switched itself
off, or when its duration is over.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from vmjob.engine.checkpointing import Checkpointer
from vmjob.engine.clock import RunClock
from vmjob.engine.devices import show_screen, take_picture
from vmjob.engine.keeping import continued
from vmjob.engine.life import Life, State
from vmjob.engine.output import mark_duration
from vmjob.engine.ownership import claim, sweep
from vmjob.engine.ports import open_ports
from vmjob.engine.progress import Progress
from vmjob.engine.record import Record
from vmjob.engine.session import Place, beside, keep_report
from vmjob.engine.starting import end_error
from vmjob.engine.triggers import tell_run_time, tell_share
from vmjob.errors import JobError, TimeLimit, VmjobError
from vmjob.grid.contract import Grid
from vmjob.home import Home
from vmjob.job.model import Job
from vmjob.machine.contract import Ended, EndReason, Foreign, Machine, MachineSpec

if TYPE_CHECKING:
    from vmjob.engine.generations import Generation
    from vmjob.engine.run import Request

__all__ = ["run_foreign"]


class Bare:
    """A machine that nobody talks to: it stands still and goes on, and can be kept."""

    def __init__(self, machine: Machine, driver_name: str) -> None:
        self.machine = machine
        self.driver_name = driver_name

    async def suspend(self) -> None:
        await self.machine.suspend()

    async def resume(self) -> None:
        """Go on; its guest has to find out the time by itself."""
        await self.machine.resume()


class _Alone:
    """What a checkpoint has to know of it: for how long it has run."""

    running = True

    def __init__(self, clock: RunClock) -> None:
        self._clock = clock

    def steady(self) -> AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()

    def progress(self) -> Progress:
        return Progress([], 0, {}, {}, self._clock.seconds, 0)

    async def settle(self, progress: Progress) -> None:
        """The host has nothing of it."""


async def run_foreign(home: Home, request: Request, grid: Grid) -> Record:
    """Carry a job without tasks, on the disk or CD that it brings; see `run_job`.

    What its console said to this process goes to the grid as the job's stdout when it is over.
    """
    record = Record(machine=dict(request.machine_facts))
    life = Life(record, grid)
    failure: VmjobError | None = None
    sweep(home)
    try:
        request.job.check()
        _say_what_is_missing(request, grid)
        async with contextlib.AsyncExitStack() as stack:
            bare, generation = await _begun(stack, home, request, grid, life)
            record.machine |= bare.machine.facts()
            clock = RunClock(generation.progress.run_seconds if generation else 0.0)
            if generation is None:
                life.enter(State.INPUTS)
            life.enter(State.RUN)
            try:
                await _carried(home, request, grid, life, bare, clock)
            except JobError:
                await _picture(bare, request, grid)
                raise
        record.exit_code, record.status = 0, "succeeded"
    except VmjobError as error:
        failure = error
        record.error, record.exit_code = error.as_dict(), error.exit_code
        record.kept = error.context.get("kept")
    finally:
        life.finish()
    # What failed on our side may be tried again, from the last checkpoint.
    if request.survival is not None and (failure is None or isinstance(failure, JobError)):
        request.survival.slot.end(record)
    return record


async def _begun(stack: contextlib.AsyncExitStack, home: Home, request: Request, grid: Grid,
                 life: Life) -> tuple[Bare, Generation | None]:
    """Its machine: from its newest checkpoint that is good, or else from the beginning."""
    slot = request.survival.slot if request.survival else None
    hardware = request.job.hardware
    shape = replace(request.shape, boot=None, foreign=Foreign(
        hardware.disk, hardware.iso, hardware.iso_first, hardware.cache_disk))
    place: Place = slot.machine_place if slot else functools.partial(claim, home)
    open_one = functools.partial(_machine, place, request, grid, life)
    if slot is None:
        return await stack.enter_async_context(open_one(shape)), None
    found = await continued(stack, slot.generations, shape, open_one, grid.warning)
    if found is not None:
        return found
    bare = await stack.enter_async_context(open_one(shape))
    slot.generations.restart()  # not before: perhaps no machine starts here today
    return bare, None


@contextlib.asynccontextmanager
async def _machine(place: Place, request: Request, grid: Grid, life: Life,
                   shape: MachineSpec) -> AsyncIterator[Bare]:
    """A machine of this shape that runs; gone when the block ends."""
    with place() as (name, directory):
        life.enter(State.MACHINE)
        machine = await request.driver.create(replace(shape, id=name, directory=directory))
        try:
            life.enter(State.RESTORE if shape.saved else State.BOOT)
            for lane in (await machine.start()).values():
                lane.close()
            yield Bare(machine, request.driver.name)
        except VmjobError as error:
            if request.keep is not None:
                error.context["kept"] = str(keep_report(directory, request.keep / name))
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await machine.stop()
            console = machine.console()
            await machine.destroy()
            await grid.output("stdout", console.encode())


async def _carried(home: Home, request: Request, grid: Grid, life: Life, bare: Bare,
                   clock: RunClock) -> None:
    """Carry it to its end, with what it asked for; raises what is wrong with that end."""
    job, survival = request.job, request.survival
    if job.hardware.display:
        show_screen(bare.machine, job, grid)
    if job.forwards:
        await open_ports(bare.machine, job, grid, remote=request.remote_ports)
    clock.go()
    async with contextlib.AsyncExitStack() as helpers:
        checkpointer = None
        if survival is not None:
            checkpointer = Checkpointer(home, survival.slot, bare, _Alone(clock), clock, life, grid,
                                        survival.disk_limit)
        await helpers.enter_async_context(
            request.control.attached(bare, clock, life, checkpointer))
        if checkpointer is not None and survival is not None:
            await helpers.enter_async_context(beside(checkpointer.every(survival.pace)))
        if job.trickle_every is not None:
            await helpers.enter_async_context(beside(tell_run_time(clock, grid,
                                                                   job.trickle_every)))
        ended = await _its_end(bare.machine, clock, job, grid)
    _judge(bare.machine, ended, job)
    if ended is None:
        mark_duration(job)


async def _picture(bare: Bare, request: Request, grid: Grid) -> None:
    """Of the screen of a job that has failed, where it wants one and the machine still runs."""
    if request.job.hardware.screenshot is not None:
        await take_picture(bare.machine, request.job.hardware.screenshot, grid)


def _say_what_is_missing(request: Request, grid: Grid) -> None:
    """What the job asks for and does not get, because there is no agent in its machine."""
    job, hardware = request.job, request.job.hardware
    missing = [what for what, wanted in (
        ("folders", bool(job.folders)), ("mailbox", hardware.mailbox is not None)) if wanted]
    if missing:
        grid.warning("a job that boots its own disk runs without what it asks for: "
                     + ", ".join(missing))


async def _its_end(machine: Machine, clock: RunClock, job: Job, grid: Grid) -> Ended | None:
    """How the machine ended by itself; None when its time was over."""
    limits = [limit for limit in (job.time_limit, job.duration) if limit is not None]
    ended: list[Ended] = []

    async with anyio.create_task_group() as waiting:
        async def end() -> None:
            ended.append(await machine.ended())
            waiting.cancel_scope.cancel()

        waiting.start_soon(end)
        if job.duration is not None:
            waiting.start_soon(tell_share, clock, grid, job.duration)
        if limits:
            await clock.reach(min(limits))
            waiting.cancel_scope.cancel()
    return ended[0] if ended else None


def _judge(machine: Machine, ended: Ended | None, job: Job) -> None:
    """Raise what is wrong with a machine's end, if anything is."""
    if ended is not None:
        if ended.reason is not EndReason.POWERED_OFF:
            raise end_error(ended, machine.console())
    elif job.duration is None or (job.time_limit is not None and job.time_limit < job.duration):
        raise TimeLimit(f"the job did not end within {job.time_limit:g} seconds")
