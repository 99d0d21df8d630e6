"""What a job runs on here: what it asks for, within what this computer has and its owner allows."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmjob.engine.slot import Slot
from vmjob.errors import AcceleratorUnusable, HostDiskFull, HostMemoryLow, VmjobError
from vmjob.grid.boinc import InitData
from vmjob.home import Home
from vmjob.host.facts import disk_free, memory
from vmjob.job.model import Job
from vmjob.job.packages import with_packages
from vmjob.job.sporadic import sporadic
from vmjob.machine.contract import Driver, MachineSpec, Priority
from vmjob.machine.qemu import programs
from vmjob.shape import machine_shape
from vmjob.wrapper import contents, places, policy
from vmjob.wrapper.log import Log
from vmjob.wrapper.options import Options

__all__ = ["Ground", "Shaped", "check_room", "used"]

MIB = 1 << 20
#: Share of the disk bound that the job's checkpoints may fill, with what else is in the slot: the
#: client ends jobs that reach the bound.
DISK_SHARE = 0.95
#: MiB that a machine needs on the disk besides its memory, to begin with.
DISK_RESERVE = 256
#: The priority in the preferences from which on a machine is no background work (2: "normal").
NORMAL_PRIORITY = 2
#: Seconds between checkpoints where no client says any.
CHECKPOINT_EVERY = 600.0


@dataclass(frozen=True)
class Shaped:
    """A machine's driver and shape, and facts for the record: its image, why this accelerator."""

    driver: Driver
    shape: MachineSpec
    image: dict[str, Any]
    why: str


class Ground:
    """One slot on one computer. ``init`` is what the client said last; None: there is no client."""

    def __init__(self, directory: Path, init: InitData | None, options: Options, log: Log) -> None:
        self.init = init
        self.where = contents.surroundings(directory, init, options.arguments, options.cpus,
                                           options.memory_mb, options.image_number)
        self._directory = directory
        self._options = options
        self._log = log

    def rules(self) -> policy.Policy:
        """What the owner of this computer allows; raises `PolicyInvalid`."""
        own = [self.init.boinc_dir / policy.FILE] if self.init is not None else []
        return policy.read([policy.SYSTEM, *own])

    def job(self, rules: policy.Policy) -> Job:
        """The slot's job as it may run here; raises `JobFileInvalid`, `PolicyForbids`."""
        job, findings = contents.read_job(self.where)
        for each in findings[:20]:
            self._log.line(f"job file, line {each.line}: {each.what}")
        job = contents.limited(job, rules, self.init, cpus=self._options.cpus)
        if self._options.trickle_every is not None:
            job = replace(job, trickle_every=self._options.trickle_every)
        job = with_packages(sporadic(job) if self._options.sporadic else job)
        job.check()
        return job

    @contextlib.contextmanager
    def place(self, rules: policy.Policy) -> Iterator[None]:
        """One of the machines that may run at once; raises `Busy`."""
        if rules.machines is None or self.init is None:
            yield
            return
        with places.taken(self.init.boinc_dir / "vmjob", rules.machines):
            yield

    def home(self) -> Home:
        """Where templates and proofs are; also for whatever wants a directory for its own files."""
        home = contents.home_of(self.init)
        os.environ["TMPDIR"] = str(home.cache)  # /tmp is read-only in a hardened service
        return home

    async def shape(self, home: Home, job: Job, accel: str, cpu: str,
                    rules: policy.Policy) -> Shaped:
        """The job's machine. ``accel``, ``cpu``: what it began with, 'auto' and '' for a new one.

        Raises what `machine_shape` raises; `AcceleratorUnusable` also where only emulation would
        work, and nobody has allowed it.
        """
        self._find_hypervisor(home)
        image = await asyncio.to_thread(contents.find_image, home, self.where)
        allowed = rules.allowed(
            emulation=self._options.emulation or contents.allows_emulation(self.init))
        try:
            made = await machine_shape(
                home, image.name if image else job.image, accel, memory_mb=job.memory_mb,
                cpus=job.cpus, disk_gb=job.disk_gb, network=job.network,
                cpu=cpu or job.cpu or "baseline", progress=self._building(), allowed=allowed)
        except AcceleratorUnusable as unusable:
            self._log.line(unusable.message)
            raise rules.asking_for_emulation(unusable, allowed) from unusable
        found = made.image
        facts = {"name": found.name, "digest": found.manifest.parts["root"].sha256,
                 "kernel": found.manifest.kernel_version}
        spec = replace(made.spec, priority=self._priority(), display=job.hardware.screen)
        return Shaped(made.driver, spec, facts, made.why)

    def pace(self, job: Job) -> float | None:
        """Seconds between checkpoints: the longer of what the volunteer and what the job want.

        0 of the job's means never (None).
        """
        if job.checkpoint_every == 0:
            return None
        wanted = self.init.checkpoint_period if self.init is not None else CHECKPOINT_EVERY
        return max(wanted, job.checkpoint_every or 0.0)

    @property
    def disk_bound(self) -> int | None:
        """Bytes of the slot at which the client ends the job; None: no such bound."""
        bound = self.init.rsc_disk_bound if self.init is not None else 0.0
        return int(bound) if bound > 0 else None

    def disk_limit(self, slot: Slot) -> int | None:
        """Bytes that the job's checkpoints may take."""
        bound = self.disk_bound
        if bound is None:
            return None
        return max(1, int(bound * DISK_SHARE) - (used(self._directory) - used(slot.root)))

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

    def _building(self) -> Callable[[float, str], None]:
        loop = asyncio.get_running_loop()

        def building(fraction: float, text: str) -> None:  # in another thread
            if fraction == 0:
                loop.call_soon_threadsafe(self._log.line, f"the image is built: {text}")

        return building

    def _priority(self) -> Priority:
        init = self.init
        if init is not None and (init.no_priority_change
                                 or init.process_priority >= NORMAL_PRIORITY):
            return Priority.NORMAL
        return Priority.LOW


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
