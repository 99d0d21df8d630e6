"""One job under the client's orders, from its job file to what the client is told at the end."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmjob.engine.clock import Pace
from vmjob.engine.control import Control
from vmjob.engine.record import Record
from vmjob.engine.request import Request, Survival
from vmjob.engine.run import prepare, run_job
from vmjob.engine.session import beside
from vmjob.engine.slot import Asked, Slot
from vmjob.errors import VmjobError
from vmjob.grid.boinc import (
    Abort,
    ClientGone,
    Event,
    InitData,
    Network,
    Quit,
    Reread,
    Resume,
    Runtime,
    Suspend,
    TrickleDown,
    Uploaded,
)
from vmjob.job.model import SHARED, Job
from vmjob.shape import doubt
from vmjob.wrapper import totals
from vmjob.wrapper.accounts import Accounts
from vmjob.wrapper.client import TAIL, ClientGrid
from vmjob.wrapper.ground import Ground, check_room
from vmjob.wrapper.log import Log, Tail
from vmjob.wrapper.options import Options
from vmjob.wrapper.orders import Orders
from vmjob.wrapper.outcome import Again, Outcome, of_error, of_record

__all__ = ["FAILED", "QUIT_DEADLINE", "SLOT", "Carrier", "Left"]

#: The engine's slot, in the client's.
SLOT = "vmjob"
#: Where the logs of a machine that failed are put for the report.
FAILED = "failed"
#: Seconds for a last checkpoint when the client wants us to leave; it kills after 60.
QUIT_DEADLINE = 45.0
#: Seconds between looks at whether a job that is at its end has ended.
END_PERIOD = 1.0


class Left(enum.Enum):
    """Why the job was left unfinished."""

    QUIT = "the client wants us to leave"
    ABORT = "the client has given up the job"
    CLIENT_GONE = "the client has ended"
    SIGNAL = "a signal wants us to leave"

    @property
    def keeps(self) -> bool:
        """Whether there is time for a last checkpoint."""
        return self in (Left.QUIT, Left.SIGNAL)


class Carrier:
    """Carries the slot's job. Made and run in one event loop; events come from the runtime.

    ``leaving`` is called when the job is to be left, before anything is done for it.
    """

    def __init__(self, runtime: Runtime, directory: Path, options: Options, log: Log,
                 leaving: Callable[[Left], None]) -> None:
        self._runtime = runtime
        self._options = options
        self._log = log
        self._leaving = leaving
        self._loop = asyncio.get_running_loop()
        self._control = Control()
        self._pace = Pace()
        self._work: asyncio.Task[Outcome] | None = None
        self._parting: asyncio.Task[None] | None = None
        self._renewing = False
        self._job: Job | None = None
        #: Messages that came before it was known which job they are for.
        self._early: list[Path] = []
        self.ground = Ground(directory, runtime.init, options, log)
        kept = totals.read(directory)
        self.grid = ClientGrid(runtime, self.ground.where, kept, log, self._renew_worn)
        self.accounts = Accounts(runtime, directory, self.ground, self._control, self.grid, kept,
                                 log)
        self._orders = Orders(self._control,
                              runtime.init.global_preferences if runtime.init else None)
        #: Where everything of the job is.
        self.slot = directory / SLOT
        self.left: Left | None = None
        self.record: Record | None = None
        self.error: dict[str, Any] | None = None
        #: What is known of the machine's ground, for the report.
        self.facts: dict[str, Any] = {}

    def streams(self) -> dict[str, Tail]:
        """The end of what the job has written, over all processes that carried it."""
        kept = {name: Tail.of(self.slot / name, TAIL) for name in self.grid.streams}
        return {name: kept[name] if kept[name].total else heard
                for name, heard in self.grid.streams.items()}

    async def carry(self) -> Outcome | None:
        """Carry the job; None when it was left (`left` says why) and is to be continued."""
        self._greet(self.ground.init)
        self._runtime.listen(self._deliver)
        try:
            async with beside(self._orders.obey()), beside(self._orders.limit()), \
                    beside(self.accounts.tell()):
                while (outcome := await self._worked()) is None:
                    pass
                return outcome
        except asyncio.CancelledError:
            if self.left is None:
                raise
            return None
        finally:
            if self._parting is not None:
                self._parting.cancel()
            self.accounts.measure()  # now that the machine has ended, all that it used is known
            self.accounts.save()

    def leave(self, why: Left) -> None:
        """Leave the job; with a last checkpoint where there is time for one.

        A word that leaves no time overrules one that does; otherwise the first counts.
        """
        first = self.left is None
        if not first and (why.keeps or (self.left is not None and not self.left.keeps)):
            return
        self.left = why
        self._log.line(why.value)
        self._leaving(why)
        if self._work is None:
            return
        if why.keeps:
            self._parting = self._loop.create_task(self._keep(self._work))
        else:
            self._work.cancel()

    # -- the job -------------------------------------------------------------------------------

    async def _worked(self) -> Outcome | None:
        """Carry the job until it ends; None when its machine is to be a new one."""
        self._work = self._loop.create_task(self._whole())
        try:
            return await self._work
        except asyncio.CancelledError:
            if not self._renewing or self.left is not None:
                raise
            self._renewing = False
            return None

    def _renew_worn(self) -> None:
        """After a checkpoint: go on from it in a new machine, if this one should make no more."""
        if self._control.worn and self.left is None and self._work is not None:
            self._log.line("its machine goes on in a new process, from this checkpoint")
            self._renewing = True
            self._work.cancel()

    def _greet(self, init: InitData | None) -> None:
        if init is not None:
            names = (f"{init.app_name} {init.app_version / 100:.2f}", init.plan_class,
                     init.result_name, f"start {self.accounts.kept.starts}")
            self._log.line(", ".join(filter(None, names)))

    async def _whole(self) -> Outcome:
        outcome: Outcome
        while True:
            self.record = self.error = None
            try:
                outcome = await self._once()
            except VmjobError as error:
                self.error = error.as_dict()
                outcome = of_error(self.error, self.accounts.fault(error.code))
            if not isinstance(outcome, Again):
                return outcome
            assert self.error is not None
            self._log.line(f"{self.error['message']}: it goes on from the last checkpoint")

    async def _once(self) -> Outcome:
        """Carry the job until it ends, or something is in the way; raises `VmjobError`."""
        ground = self.ground
        rules = ground.rules()
        with Slot.claim(self.slot) as slot:
            ended = slot.result()
            if ended is not None:  # we ended between its end and the client's hearing of it
                self.record, self.error = ended, ended.error
                return of_record(ended, 0)
            accel, cpu = "auto", ""
            if slot.has_job:
                asked = slot.asked()
                job, accel, cpu = asked.job, asked.accel, asked.cpu
                rules.check_begun(job)
            else:
                job = ground.job(rules)
            self._know(job)
            check_room(job, slot.root)
            with ground.place(rules):
                home = ground.home()
                made = await ground.shape(home, job, accel, cpu, rules)
                self.facts = {"image": made.image["name"], "accelerator_why": made.why,
                              "accelerator": made.shape.accelerator}
                if not slot.has_job:
                    slot.begin(Asked(job, made.shape.accelerator, made.shape.cpu_model, None))
                self._pace.change(ground.pace(job))
                request = Request(
                    job, made.driver, made.shape, made.image, {"accelerator_why": made.why},
                    survival=Survival(slot, self._pace, ground.disk_limit(slot)),
                    control=self._control, keep=slot.root / FAILED)
                self.record = await (prepare(home, request) if self._options.prepare_only
                                     else run_job(home, request, self.grid))
                doubt(home, made.shape, self.record.error)
        self.error = self.record.error
        before = self.accounts.fault(str(self.error["code"])) if self.error is not None else 0
        return of_record(self.record, before)

    async def _keep(self, work: asyncio.Task[Outcome]) -> None:
        """Make a last checkpoint, if there is time for it, and leave."""
        try:
            async with asyncio.timeout(QUIT_DEADLINE):
                while not await self._kept() and self._fetches and not work.done():
                    await asyncio.wait([work], timeout=END_PERIOD)
        except TimeoutError:
            self._log.line("there was no time for a last checkpoint")
        finally:
            work.cancel()

    async def _kept(self) -> bool:
        with contextlib.suppress(VmjobError, OSError):  # those before it stay good
            if self._orders.still:  # one that stands still is kept when it goes on
                self._orders.still = False  # nor may it stand by an order not yet obeyed
                await self._control.resume()
            return await self._control.checkpoint(QUIT_DEADLINE) is not None
        return False

    @property
    def _fetches(self) -> bool:
        """Whether the tasks are over, and only what they made is missing: soon it is all done.

        To leave now would be to do again all that came after the last checkpoint.
        """
        return self._control.pid is None and self.grid.current in ("run", "outputs", "end")

    # -- the client ----------------------------------------------------------------------------

    def _deliver(self, event: Event) -> None:
        """In the runtime's thread: pass it on, whatever the loop is doing."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: all is over
            self._loop.call_soon_threadsafe(self._hear, event)

    def _hear(self, event: Event) -> None:
        match event:
            case Suspend() | Resume():
                if self.left is None:  # else a machine would stand that is to be kept
                    self._orders.stand(isinstance(event, Suspend))
            case Network(available):
                if self._orders.online is not None or not available:
                    self._log.line(f"the network is {'on' if available else 'off'}")
                self._orders.connect(available)
            case Quit():
                self.leave(Left.QUIT)
            case Abort():
                self.leave(Left.ABORT)
            case ClientGone():
                self.leave(Left.CLIENT_GONE)
            case Reread(init):
                self._reread(init)
            case TrickleDown(path):
                self._pass_down(path)
            case Uploaded(name, status):
                self._log.line(f"{name} is uploaded" if status == 0
                               else f"{name} could not be uploaded ({status})")
            case _:
                pass

    def _reread(self, init: InitData) -> None:
        self.ground.init = init
        self._orders.prefer(init.global_preferences)
        if self._job is not None:
            self._pace.change(self.ground.pace(self._job))
        self._log.line(f"preferences: a checkpoint every {self._pace.seconds or 0:.0f} s")

    def _know(self, job: Job) -> None:
        self._job = job
        early, self._early = self._early, []
        for path in early:
            self._pass_down(path)

    def _pass_down(self, path: Path) -> None:
        """A message of the project's server goes to the job as a file of its shared folder."""
        if self._job is None:  # the client has told it already, and tells it once in a process
            self._early.append(path)
            return
        folder = next((each for each in self._job.folders
                       if each.name == SHARED and each.live), None)
        if folder is None:
            self._log.line(f"{path.name} is not passed on: the job has no shared folder")
            path.unlink(missing_ok=True)
            return
        if path.parent == folder.source:
            return
        try:
            folder.source.mkdir(mode=0o700, parents=True, exist_ok=True)  # before its first task
            path.replace(folder.source / path.name)
            self._log.line(f"message of the project: {path.name}")
        except OSError as error:
            self._log.line(f"{path.name} cannot be passed on: {error.strerror}")
