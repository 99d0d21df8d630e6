"""A job that is a whole disk: it boots, does its work, and switches itself off.

There is no agent in it, so nobody asks it anything: it has succeeded when it has switched itself
off, or when its duration is over. Where its guest can mount folders by itself, it has its folders
all the same, and is heard by the files in them: an agent beside the machine keeps them in step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from vmjob.engine.checkpointing import Checkpointer
from vmjob.engine.clock import RunClock
from vmjob.engine.devices import show_screen, take_picture, tell_note
from vmjob.engine.keeping import continued
from vmjob.engine.life import Life, State
from vmjob.engine.mailbox import make_floppy, read_floppy
from vmjob.engine.output import make_safe, mark_duration
from vmjob.engine.ownership import claim, sweep
from vmjob.engine.ports import open_ports
from vmjob.engine.progress import Progress
from vmjob.engine.record import Record
from vmjob.engine.session import Place, beside, keep_report, kept_report, note_report
from vmjob.engine.starting import end_error
from vmjob.engine.system import MAILBOX, is_copied, needs
from vmjob.engine.triggers import tell_run_time, tell_share
from vmjob.engine.work import Verdict
from vmjob.errors import FolderFull, HostDiskFull, JobError, TimeLimit, VmjobError
from vmjob.grid.contract import Grid
from vmjob.home import Home
from vmjob.host import below
from vmjob.job.model import Job
from vmjob.machine.contract import Driver, Ended, EndReason, Foreign, Machine, MachineSpec

if TYPE_CHECKING:
    from vmjob.engine.generations import Generation
    from vmjob.engine.request import Request
    from vmjob.engine.sharing import Sharing

__all__ = ["run_foreign"]


#: Seconds between looks at how much a guest has written to the folders that it mounts by itself,
#: and how often their limits it may be at one time: files on their way are there twice.
BOUND_PERIOD = 1.0
SLACK, SLACK_FILES = 2, 1000


class Bare:
    """A machine that nobody talks to: it stands still and goes on, and can be kept."""

    def __init__(self, machine: Machine, driver: Driver, sharing: Sharing | None) -> None:
        self.machine = machine
        self.driver_name = driver.name
        disk = machine.spec.foreign.disk if machine.spec.foreign else None
        self.copied = (disk,) if disk and is_copied(driver.capabilities, disk) else ()
        #: Set when its job has failed by its own word: its logs are kept as well.
        self.failed = False
        #: Its folders; None where it has none, or its guest no way to them.
        self.sharing = sharing

    async def suspend(self) -> None:
        await self.machine.suspend()

    async def resume(self) -> None:
        """Go on; its guest has to find out the time by itself."""
        await self.machine.resume()


class _Word:
    """What the job says by its files: how it has ended, or what is wrong with it."""

    def __init__(self) -> None:
        self.said: Verdict | VmjobError | None = None
        self.event = anyio.Event()

    def say(self, said: Verdict | VmjobError) -> None:
        """Only the first word counts."""
        if self.said is None:
            self.said = said
            self.event.set()


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
                said = await _carried(home, request, grid, life, bare, clock)
            except JobError:
                await _picture(bare, request, grid)
                raise
            if said is not None and said.exit_code != 0:
                await _picture(bare, request, grid)
                bare.failed = True
                if request.keep is not None:
                    record.kept = str(request.keep / bare.machine.spec.id)
        record.exit_code = 0
        if said is not None:
            record.exit_code, record.message, record.notice = (
                said.exit_code, said.message, said.notice)
        record.status = "failed" if record.exit_code else "succeeded"
    except VmjobError as error:
        failure = error
        record.error, record.exit_code = error.as_dict(), error.exit_code
        record.kept = error.context.get("kept")
    finally:
        life.finish()
    record.kept = kept_report(record.kept)
    # What failed on our side may be tried again, from the last checkpoint.
    if request.survival is not None and (failure is None or (
            isinstance(failure, JobError) and not failure.retryable)):
        request.survival.slot.end(record)
    return record


async def _begun(stack: contextlib.AsyncExitStack, home: Home, request: Request, grid: Grid,
                 life: Life) -> tuple[Bare, Generation | None]:
    """Its machine: from its newest checkpoint that is good, or else from the beginning."""
    slot = request.survival.slot if request.survival else None
    hardware = request.job.hardware
    shape = replace(request.shape, boot=None, foreign=Foreign(
        hardware.disk, hardware.iso, hardware.iso_first, hardware.cache_disk, _folders(request),
        floppy=hardware.mailbox is not None and request.driver.capabilities.floppy))
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
        spec = replace(shape, id=name, directory=directory)
        if spec.foreign is not None:
            await anyio.to_thread.run_sync(_furnish, spec, spec.foreign, request.job)
        machine = await request.driver.create(spec)
        try:
            async with _shared(request, spec, grid) as sharing:
                if sharing is not None:
                    await sharing.fill()
                life.enter(State.RESTORE if shape.saved else State.BOOT)
                for lane in (await machine.start()).values():
                    lane.close()
                bare = Bare(machine, request.driver, sharing)
                yield bare
            if bare.failed and request.keep is not None:
                await machine.stop()
                keep_report(machine, request.keep / name)
            if spec.foreign is not None and spec.foreign.floppy:
                tell_note(read_floppy(spec.floppy), grid)
        except VmjobError as error:
            if request.keep is not None:
                with anyio.CancelScope(shield=True):
                    await machine.stop()  # some logs are written then
                note_report(error, machine, request.keep / name)
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await machine.stop()
            console = machine.console()
            await machine.destroy()
            await grid.output("stdout", console.encode())


def _furnish(spec: MachineSpec, foreign: Foreign, job: Job) -> None:
    """Make what its guest finds besides its disks; raises `HostDiskFull`."""
    try:
        for folder in foreign.folders:
            spec.folder(folder).mkdir(mode=0o700, parents=True)
        if foreign.floppy and job.hardware.mailbox is not None:
            make_floppy(spec.floppy, job.hardware.mailbox)
    except OSError as error:
        raise HostDiskFull(f"cannot write {error.filename}: {error.strerror}") from error


def _folders(request: Request) -> dict[str, bool]:
    """The folders that its guest can mount by itself, and whether it may write there."""
    if not request.driver.capabilities.folders:
        return {}
    return {folder.name: folder.writable for folder in request.job.folders}


@contextlib.asynccontextmanager
async def _shared(request: Request, spec: MachineSpec, grid: Grid) -> AsyncIterator[Sharing | None]:
    """The job's folders, and those that its guest sees in their place."""
    if spec.foreign is None or not spec.foreign.folders:
        yield None
        return
    from vmjob.engine.sharing import Sharing
    from vmjob.guest.beside import agent_beside

    # Its guest knows them by their names, and mounts them where it likes.
    job = replace(request.job, folders=tuple(
        replace(folder, destination=str(spec.folder(folder.name)))
        for folder in request.job.folders))
    async with agent_beside(spec.directory, spec.directory / "agent") as client:
        yield Sharing(client, job, grid, request.survival.slot if request.survival else None, {})


async def _carried(home: Home, request: Request, grid: Grid, life: Life, bare: Bare,
                   clock: RunClock) -> Verdict | None:
    """Carry it to its end, with what it asked for; what it said of that end by its files.

    Raises what is wrong with that end.
    """
    job, survival = request.job, request.survival
    word = _Word()
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
        if bare.sharing is not None:
            await helpers.enter_async_context(beside(bare.sharing.keep_in_step(
                word.say, clock, grid, request.control, survival.slot if survival else None)))
            await helpers.enter_async_context(beside(_bound(bare.machine.spec, job, word)))
        if job.duration is not None and not (bare.sharing is not None and job.tells_its_fraction):
            await helpers.enter_async_context(beside(tell_share(clock, grid, job.duration)))
        ended = await _its_end(bare.machine, clock, job, word.event)
    if bare.sharing is not None:
        if ended is None:
            with contextlib.suppress(VmjobError):  # it ends just now
                await bare.machine.suspend()  # what is looked at for the last time must not change
        await _collect(bare.sharing, word)
    if isinstance(word.said, VmjobError):
        raise word.said
    if word.said is None:
        _judge(bare.machine, ended, job)
        if ended is None:
            mark_duration(job)
    if survival is not None:
        await make_safe(job, bare.sharing.came() if bare.sharing is not None else ())
    return word.said


async def _collect(sharing: Sharing, word: _Word) -> None:
    """Take what it said and made just before its end; raises what is wrong with what it made."""
    try:
        await sharing.last_words()
    except VmjobError as error:
        word.say(error)
    try:
        await sharing.collect()
    except VmjobError:
        if not isinstance(word.said, VmjobError):  # else that is the story
            raise


async def _bound(spec: MachineSpec, job: Job, word: _Word) -> None:
    """End a job whose guest fills this computer's disk with what no folder would take."""
    while True:
        for folder in job.folders:
            most = SLACK * folder.max_files + SLACK_FILES
            size, count = await anyio.to_thread.run_sync(
                below.occupied, spec.folder(folder.name), most)
            if size > SLACK * folder.max_bytes or count > most:
                word.say(FolderFull(f"the machine has written more to the folder {folder.name!r} "
                                    f"than the {folder.max_bytes} bytes or {folder.max_files} "
                                    "files that it may hold"))
        await anyio.sleep(BOUND_PERIOD)


async def _picture(bare: Bare, request: Request, grid: Grid) -> None:
    """Of the screen of a job that has failed, where it wants one and the machine still runs."""
    if request.job.hardware.screenshot is not None:
        await take_picture(bare.machine, request.job.hardware.screenshot, grid)


def _say_what_is_missing(request: Request, grid: Grid) -> None:
    """What the job asks for and does not get, because there is no agent in its machine."""
    able = request.driver.capabilities
    missing = [what for what in needs(request.job)
               if not (able.floppy if what == MAILBOX else able.folders)]
    if missing:
        grid.warning("a job that boots its own disk runs without what it asks for: "
                     + ", ".join(missing))


async def _its_end(machine: Machine, clock: RunClock, job: Job,
                   over: anyio.Event) -> Ended | None:
    """How the machine ended by itself; None when its time was over, or the job said so."""
    limits = [limit for limit in (job.time_limit, job.duration) if limit is not None]
    ended: list[Ended] = []

    async with anyio.create_task_group() as waiting:
        async def end() -> None:
            ended.append(await machine.ended())
            waiting.cancel_scope.cancel()

        async def word() -> None:
            await over.wait()
            waiting.cancel_scope.cancel()

        waiting.start_soon(end)
        waiting.start_soon(word)
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
