"""One job under the client's orders, from its job file to what the client is told at the end."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmjob.engine.clock import Pace
from vmjob.engine.control import Control
from vmjob.engine.record import Record
from vmjob.engine.run import Request, Survival, run_job
from vmjob.engine.session import beside
from vmjob.engine.slot import Asked, Slot
from vmjob.errors import AcceleratorUnusable, HostDiskFull, HostMemoryLow, VmjobError
from vmjob.grid import boinc
from vmjob.grid.boinc import (
    Abort,
    ClientGone,
    Event,
    InitData,
    Quit,
    Reread,
    Resume,
    Runtime,
    Status,
    Suspend,
    TrickleDown,
    Uploaded,
)
from vmjob.home import Home
from vmjob.host.facts import disk_free, memory
from vmjob.job.logical import is_there
from vmjob.job.model import SHARED, Job, Network
from vmjob.job.packages import with_packages
from vmjob.machine.contract import Priority
from vmjob.machine.qemu import programs
from vmjob.machine.qemu.driver import QemuDriver
from vmjob.shape import doubt, machine_shape
from vmjob.wrapper import contents, network, places, policy, totals
from vmjob.wrapper.client import TAIL, ClientGrid
from vmjob.wrapper.log import Log, Tail
from vmjob.wrapper.network import Gate
from vmjob.wrapper.outcome import Again, Outcome, of_error, of_record
from vmjob.wrapper.usage import Usage

__all__ = ["Carrier", "Left", "Options"]

MIB = 1 << 20
#: The engine's slot, in the client's.
SLOT = "vmjob"
#: The application's program that shows its jobs; only with it somebody reads how far a job is.
GRAPHICS_APP = "graphics_app"
#: Where the logs of a machine that failed are put for the report.
FAILED = "failed"
#: Seconds for a last checkpoint when the client wants us to leave; it kills after 60.
QUIT_DEADLINE = 45.0
#: Seconds between status messages, and how many of them go by between two savings of the totals.
STATUS_PERIOD = 1.0
SAVE_EVERY = 10
#: Share of the disk bound that the job's checkpoints may fill with what else is in the slot, and
#: from which on the log warns: the client ends jobs that reach it.
DISK_SHARE = 0.95
DISK_WARNING = 0.8
#: MiB that a machine needs on the disk besides its memory, to begin with.
DISK_RESERVE = 256
#: The priority in the preferences from which on a machine is no background work (2: "normal").
NORMAL_PRIORITY = 2


class Left(enum.Enum):
    """Why the job was left unfinished."""

    QUIT = "the client wants us to leave"
    ABORT = "the client has given up the job"
    CLIENT_GONE = "the client has ended"
    SIGNAL = "a signal wants us to leave"


@dataclass(frozen=True)
class Options:
    """The command line of the application version and the workunit; None: not said."""

    arguments: tuple[str, ...] = ()
    cpus: int | None = None
    memory_mb: float | None = None
    image_number: int | None = None
    trickle_every: float | None = None
    sporadic: bool = False
    prepare_only: bool = False
    emulation: bool = False


class Carrier:
    """Carries the slot's job. Made and run in one event loop; events come from the runtime."""

    def __init__(self, runtime: Runtime, directory: Path, options: Options, log: Log,
                 leaving: Callable[[Left], None]) -> None:
        init = runtime.init
        self._runtime = runtime
        self._directory = directory
        self._options = options
        self._log = log
        self._leaving = leaving
        self._init = init
        self.where = contents.surroundings(directory, init, options.arguments, options.cpus,
                                           options.memory_mb, options.image_number)
        self._loop = asyncio.get_running_loop()
        self._control = Control()
        self._pace = Pace()
        self._still = False
        self._online: bool | None = None
        self._gate = Gate(init.global_preferences if init is not None else None)
        self._gate_open = True
        self._orders = asyncio.Event()
        self._work: asyncio.Task[Outcome] | None = None
        self._parting: asyncio.Task[None] | None = None
        self._usage = Usage()
        self._before = 0.0
        self._passed = (0, 0)
        self._job: Job | None = None
        self._warned_of_disk = False
        self._shows = is_there(GRAPHICS_APP, self.where)
        self.left: Left | None = None
        self.totals = totals.read(directory)
        self.grid = ClientGrid(runtime, self.where, self.totals, log)
        self.record: Record | None = None
        self.error: dict[str, Any] | None = None
        #: What is known of the machine's ground, for the report.
        self.facts: dict[str, Any] = {}

    @property
    def slot(self) -> Path:
        """Where everything of the job is."""
        return self._directory / SLOT

    def streams(self) -> dict[str, Tail]:
        """The end of what the job has written, over all processes that carried it."""
        kept = {name: Tail.of(self.slot / name, TAIL) for name in self.grid.streams}
        return {name: kept[name] if kept[name].total else heard
                for name, heard in self.grid.streams.items()}

    async def carry(self) -> Outcome | None:
        """Carry the job; None when it was left (`left` says why) and is to be continued."""
        self._begin()
        self._runtime.listen(self._deliver)
        self._work = self._loop.create_task(self._whole())
        try:
            async with beside(self._obey()), beside(self._tell()), beside(self._limit()):
                return await self._work
        except asyncio.CancelledError:
            if self.left is None:
                raise
            return None
        finally:
            if self._parting is not None:
                self._parting.cancel()
            self._measure()  # now that the machine has ended, all that it used is known
            self._save()

    def leave(self, why: Left) -> None:
        """Leave the job; with a last checkpoint where there is time for one."""
        if self.left is not None and self.left not in (Left.QUIT, Left.SIGNAL):
            return
        again, self.left = self.left is not None, why
        if not again:
            self._log.line(why.value)
            self._leaving(why)
        elif why not in (Left.QUIT, Left.SIGNAL):
            self._leaving(why)
        if self._work is None:
            return
        if why in (Left.QUIT, Left.SIGNAL) and not again:
            self._parting = self._loop.create_task(self._keep())
        elif why not in (Left.QUIT, Left.SIGNAL):
            self._work.cancel()

    # -- the job -------------------------------------------------------------------------------

    def _begin(self) -> None:
        told = self._init.wu_cpu_time if self._init is not None else 0.0
        self._before = max(told, self.totals.cpu_seconds)
        self.totals.cpu_seconds = self._before
        self.totals.starts += 1
        if self._init is not None:
            names = (f"{self._init.app_name} {self._init.app_version / 100:.2f}",
                     self._init.plan_class, self._init.result_name,
                     f"start {self.totals.starts}")
            self._log.line(", ".join(filter(None, names)))

    async def _whole(self) -> Outcome:
        outcome: Outcome
        while True:
            self.record = self.error = None
            try:
                outcome = await self._once()
            except VmjobError as error:
                outcome = of_error(self._heard(error.as_dict()), self.count(error.code))
            if not isinstance(outcome, Again):
                return outcome
            assert self.error is not None
            self._log.line(f"{self.error['message']}: it goes on from the last checkpoint")

    async def _once(self) -> Outcome:
        """Carry the job until it ends, or something is in the way; raises `VmjobError`."""
        rules = policy.read(self._policies())
        with self._claimed() as slot:
            ended = slot.result()
            if ended is not None:  # we ended between its end and the client's hearing of it
                self.record = ended
                return of_record(ended, 0)
            if slot.has_job:
                asked = slot.asked()
                job, accel, cpu = asked.job, asked.accel, asked.cpu
                rules.check(job)
            else:
                job, accel, cpu = self._read(rules), "auto", ""
                job.check()
            self._job = job
            check_room(job, self._directory)
            with self._place(rules):
                home = contents.home_of(self._init)
                home.root.mkdir(parents=True, exist_ok=True)
                os.environ["TMPDIR"] = str(home.cache)  # /tmp is read-only in a hardened service
                self._find_hypervisor(home)
                image = await asyncio.to_thread(contents.find_image, home, self.where)
                allowed = rules.allowed(
                    emulation=self._options.emulation or contents.allows_emulation(self._init))
                try:
                    shape, found, why = await machine_shape(
                        home, image.name if image else job.image, accel, memory_mb=job.memory_mb,
                        cpus=job.cpus, disk_gb=job.disk_gb, network=job.network,
                        cpu=cpu or job.cpu or "baseline", progress=self._building,
                        allowed=allowed)
                except AcceleratorUnusable as unusable:
                    self._log.line(unusable.message)
                    raise rules.asking_for_emulation(unusable, allowed) from unusable
                self.facts = {"image": found.name, "accelerator": shape.accelerator,
                              "why": why}
                if not slot.has_job:
                    slot.begin(Asked(job, shape.accelerator, shape.cpu_model, None))
                shape = replace(shape, priority=self._priority(), display=job.hardware.screen)
                self._set_pace(job)
                survival = Survival(slot, self._pace, self._disk_limit(slot))
                request = Request(
                    job, QemuDriver(), shape,
                    {"name": found.name, "digest": found.manifest.parts["root"].sha256,
                     "kernel": found.manifest.kernel_version},
                    {"accelerator_why": why}, survival=survival, control=self._control,
                    keep=slot.root / FAILED)
                self.record = await self._run(home, request)
                doubt(home, shape, self.record.error)
        error = self.record.error
        count = self.count(str(error["code"])) if error is not None else 0
        if error is not None:
            self.error = error
        return of_record(self.record, count)

    async def _run(self, home: Home, request: Request) -> Record:
        if self._options.prepare_only:
            from vmjob.engine.session import describe, open_session

            async with open_session(home, request.driver, request.shape) as session:
                return Record(exit_code=0, status="prepared", machine=describe(session))
        if request.job.tasks:
            return await run_job(home, request, self.grid)
        from vmjob.engine.foreign import run_foreign

        return await run_foreign(home, request, self.grid)

    def _read(self, rules: policy.Policy) -> Job:
        job, findings = contents.read_job(self.where)
        for each in findings[:20]:
            self._log.line(f"job file, line {each.line}: {each.what}")
        job = contents.limited(job, rules, self._init, cpus=self._options.cpus)
        if self._options.trickle_every is not None:
            job = replace(job, trickle_every=self._options.trickle_every)
        return with_packages(contents.sporadic(job) if self._options.sporadic else job)

    def _policies(self) -> list[Path]:
        own = [self._init.boinc_dir / policy.FILE] if self._init is not None else []
        return [policy.SYSTEM, *own]

    def _claimed(self) -> contextlib.AbstractContextManager[Slot]:
        return Slot.claim(self.slot)

    @contextlib.contextmanager
    def _place(self, rules: policy.Policy) -> Iterator[None]:
        """One of the machines that may run at once."""
        if rules.machines is None or self._init is None:
            yield
            return
        with places.taken(self._init.boinc_dir / "vmjob", rules.machines):
            yield

    def _find_hypervisor(self, home: Home) -> None:
        """Where this computer has no QEMU, use the one that came with the application."""
        archive = contents.find_qemu(self.where)
        if archive is None:
            return
        try:
            programs.version(programs.find(programs.system_binary()))
        except VmjobError:  # none, or one that is too old
            from vmjob.host.unpacking import unpacked

            os.environ["VMJOB_QEMU"] = str(unpacked(archive, home.root / "programs"))

    def _building(self, fraction: float, text: str) -> None:
        if fraction == 0:
            self._loop.call_soon_threadsafe(self._log.line, f"the image is built: {text}")

    def _priority(self) -> Priority:
        init = self._init
        if init is not None and (init.no_priority_change
                                 or init.process_priority >= NORMAL_PRIORITY):
            return Priority.NORMAL
        return Priority.LOW

    def _set_pace(self, job: Job) -> None:
        """The longer of what the volunteer and what the job want; 0 of the job's means never."""
        if job.checkpoint_every == 0:
            self._pace.change(None)
        else:
            wanted = self._init.checkpoint_period if self._init is not None else 600.0
            self._pace.change(max(wanted, job.checkpoint_every or 0.0))

    def _disk_limit(self, slot: Slot) -> int | None:
        bound = self._init.rsc_disk_bound if self._init is not None else 0.0
        if bound <= 0:
            return None
        others = used(self._directory) - used(slot.root)
        return max(1, int(bound * DISK_SHARE) - others)

    def _heard(self, error: dict[str, Any]) -> dict[str, Any]:
        self.error = error
        return error

    def count(self, code: str) -> int:
        """How often in a row this was in the way before; once more now."""
        before = self.totals.faults.get(code, 0)
        self.totals.faults = {code: before + 1}
        self._save()
        return before

    # -- the client ----------------------------------------------------------------------------

    def _deliver(self, event: Event) -> None:
        """In the runtime's thread: pass it on, whatever the loop is doing."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: all is over
            self._loop.call_soon_threadsafe(self._hear, event)

    def _hear(self, event: Event) -> None:
        match event:
            case Suspend() | Resume():
                if self.left is None:  # else a machine would stand that is to be kept
                    self._still = isinstance(event, Suspend)
                    self._orders.set()
            case boinc.Network(available):
                if self._online is not None or not available:
                    self._log.line(f"the network is {'on' if available else 'off'}")
                self._online = available
                self._orders.set()
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

    async def _obey(self) -> None:
        """Bring the machine where the client wants it; only its last word counts.

        A CPU throttle says two words a second, and either may take longer than that to be done.
        """
        still, plugged = False, True
        while True:
            await self._orders.wait()
            self._orders.clear()
            with contextlib.suppress(VmjobError):  # a machine that is gone: its job tells it
                if (self._online is not False and self._gate_open) != plugged:
                    plugged = not plugged
                    await self._control.set_network(plugged)
                if self._still != still:
                    still = self._still
                    await (self._control.suspend() if still else self._control.resume())

    async def _limit(self) -> None:
        """Keep what passes the network within the volunteer's limits, for ever."""
        while True:
            if not self._gate.limited or self._job is None or self._job.network is Network.NONE:
                await asyncio.sleep(STATUS_PERIOD)
                continue
            sent, received = self._control.traffic()
            is_open = self._gate.allows(sent, received, time.monotonic())
            if is_open != self._gate_open:
                self._gate_open = is_open
                self._orders.set()
            await asyncio.sleep(network.PERIOD)

    async def _tell(self) -> None:
        """The status, once a second, and now and then what else has to be known or written."""
        number = 0
        last = time.monotonic()
        while True:
            now = time.monotonic()
            if self.grid.current == "run":
                self.totals.run_seconds += now - last
            last = now
            self._measure()
            if number % SAVE_EVERY == 0:
                self._save()
                await asyncio.to_thread(self._look_at_disk)
            number += 1
            await asyncio.sleep(STATUS_PERIOD)

    def _measure(self) -> None:
        """Tell the client what the job has used, and how far it is."""
        used_now = self._usage.measure()
        self.totals.cpu_seconds = max(self.totals.cpu_seconds,
                                      self._before + used_now.cpu_seconds)
        self._count_traffic()
        self._runtime.report(Status(
            cpu_seconds=self.totals.cpu_seconds, fraction_done=self.grid.fraction,
            other_pid=self._control.pid, memory_bytes=used_now.memory_bytes,
            bytes_sent=self.totals.bytes_sent, bytes_received=self.totals.bytes_received,
            want_network=self._job is not None and self._job.network is not Network.NONE))

        if self._shows:
            with contextlib.suppress(OSError):  # a full disk: the picture stands still
                self._runtime.status_file(
                    cpu_seconds=self.totals.cpu_seconds, elapsed_seconds=self.totals.run_seconds,
                    fraction_done=self.grid.fraction or 0.0)

    def _count_traffic(self) -> None:
        """Add what the machine has sent and received since the last time; one may be a new one."""
        sent, received = self._control.traffic()
        before_sent, before_received = self._passed
        self.totals.bytes_sent += sent - (before_sent if sent >= before_sent else 0)
        self.totals.bytes_received += received - (
            before_received if received >= before_received else 0)
        self._passed = (sent, received)

    async def _keep(self) -> None:
        """Make a last checkpoint, if there is time for it, and leave."""
        work = self._work
        assert work is not None
        try:
            with contextlib.suppress(VmjobError, OSError):  # those before it stay good
                async with asyncio.timeout(QUIT_DEADLINE):
                    if self._still:  # a machine that stands still is kept when it goes on
                        self._still = False  # nor is it to stand by an order not yet obeyed
                        await self._control.resume()
                    await self._control.checkpoint(QUIT_DEADLINE)
        except TimeoutError:
            self._log.line("there was no time for a last checkpoint")
        finally:
            work.cancel()

    def _reread(self, init: InitData) -> None:
        self._init = init
        self._gate = Gate(init.global_preferences)
        if self._job is not None:
            self._set_pace(self._job)
        self._log.line(f"preferences: a checkpoint every {self._pace.seconds or 0:.0f} s")

    def _pass_down(self, path: Path) -> None:
        """A message of the project's server goes to the job as a file of its shared folder."""
        folder = next((each for each in (self._job.folders if self._job else ())
                       if each.name == SHARED and each.live), None)
        if folder is None:
            self._log.line(f"{path.name} is not passed on: the job has no shared folder")
            path.unlink(missing_ok=True)
            return
        if path.parent == folder.source:
            return
        try:
            path.replace(folder.source / path.name)
            self._log.line(f"message of the project: {path.name}")
        except OSError as error:
            self._log.line(f"{path.name} cannot be passed on: {error.strerror}")

    def _look_at_disk(self) -> None:
        bound = self._init.rsc_disk_bound if self._init is not None else 0.0
        if bound <= 0 or self._warned_of_disk:
            return
        now = used(self._directory)
        if now > DISK_WARNING * bound:
            self._warned_of_disk = True
            self._log.line(f"warning: the job takes {now // MIB} MiB of the disk; the client ends "
                           f"it at {int(bound) // MIB}")

    def _save(self) -> None:
        totals.write(self._directory, self.totals)


def check_room(job: Job, directory: Path) -> None:
    """Refuse to take memory or disk that is not there; raises `HostMemoryLow`, `HostDiskFull`.

    Linux would give the memory all the same, and kill somebody later.
    """
    if (available := memory().available // MIB) < job.memory_mb:
        raise HostMemoryLow(f"the job needs {job.memory_mb} MiB of memory; {available} are free",
                            advice="It starts by itself when other programs have ended.")
    if (free := disk_free(directory) // MIB) < job.memory_mb + DISK_RESERVE:
        raise HostDiskFull(f"the disk has {free} MiB left; a machine with {job.memory_mb} MiB of "
                           "memory needs more than that for one checkpoint",
                           advice="Free some disk space.")


def used(directory: Path) -> int:
    """Bytes in a directory as the client counts them: sizes of files, holes included."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total
