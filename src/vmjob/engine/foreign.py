"""A job that is a whole disk: it boots, does its work, and switches itself off.

There is no agent in it, so nobody asks it anything: it has succeeded when it has switched itself
off, or when its duration is over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from vmjob.engine.clock import RunClock
from vmjob.engine.life import Life, State
from vmjob.engine.ownership import claim, sweep
from vmjob.engine.record import Record
from vmjob.engine.session import keep_report
from vmjob.engine.starting import end_error
from vmjob.engine.triggers import tell_share
from vmjob.errors import JobError, TimeLimit, VmjobError
from vmjob.grid.contract import Grid
from vmjob.home import Home
from vmjob.job.model import Job
from vmjob.machine.contract import Ended, EndReason, Foreign, Machine

if TYPE_CHECKING:
    from vmjob.engine.run import Request

__all__ = ["run_foreign"]


class _Bare:
    """A machine that nobody talks to: it stands still and goes on, and that is all."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    async def suspend(self) -> None:
        await self.machine.suspend()

    async def resume(self) -> None:
        """Its guest has to find out the time by itself."""


async def run_foreign(home: Home, request: Request, grid: Grid) -> Record:
    """Carry a job without tasks, on the disk or CD that it brings; see `run_job`.

    What its console said goes to the grid as the job's stdout when it is over.
    """
    record = Record(machine=dict(request.machine_facts))
    life = Life(record, grid)
    failure: VmjobError | None = None
    hardware = request.job.hardware
    sweep(home)
    try:
        request.job.check()
        _say_what_is_missing(request, grid)
        with claim(home) as (name, directory):
            spec = replace(request.shape, id=name, directory=directory, boot=None, foreign=Foreign(
                hardware.disk, hardware.iso, hardware.iso_first, hardware.cache_disk))
            life.enter(State.MACHINE)
            machine = await request.driver.create(spec)
            try:
                life.enter(State.BOOT)
                for lane in (await machine.start()).values():
                    lane.close()
                record.machine |= machine.facts()
                life.enter(State.INPUTS)
                life.enter(State.RUN)
                clock = RunClock()
                clock.go()
                async with request.control.attached(_Bare(machine), clock, life, None):
                    ended = await _its_end(machine, clock, request.job, grid)
                _judge(machine, ended, request.job)
                record.exit_code, record.status = 0, "succeeded"
            except VmjobError as error:
                if request.keep is not None:
                    error.context["kept"] = str(keep_report(directory, request.keep / name))
                raise
            finally:
                life.enter(State.END)
                with anyio.CancelScope(shield=True):
                    await machine.stop()
                console = machine.console()
                await machine.destroy()
            await grid.output("stdout", console.encode())
    except VmjobError as error:
        failure = error
        record.error, record.exit_code = error.as_dict(), error.exit_code
        record.kept = error.context.get("kept")
    finally:
        life.finish()
    # What failed on our side may be tried again; there is no checkpoint, so from the beginning.
    if request.survival is not None and (failure is None or isinstance(failure, JobError)):
        request.survival.slot.end(record)
    return record


def _say_what_is_missing(request: Request, grid: Grid) -> None:
    """What the job asks for and does not get: without an agent, or not done so far."""
    job, hardware = request.job, request.job.hardware
    missing = [what for what, wanted in (
        ("folders", bool(job.folders)), ("forwarded ports", bool(job.forwards)),
        ("mailbox", hardware.mailbox is not None), ("screen", hardware.display),
        ("picture of the screen", hardware.screenshot is not None),
        ("trickles", job.trickle_every is not None),
        ("checkpoints", request.survival is not None)) if wanted]
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
