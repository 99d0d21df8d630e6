"""When a job's checkpoints are made, and how one becomes the newest generation of its slot."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread

from vmjob.engine.clock import RunClock
from vmjob.engine.generations import DIGITS, Draft, Generation, Progress
from vmjob.engine.life import Life, State
from vmjob.engine.session import Session
from vmjob.engine.slot import Slot, Streams
from vmjob.engine.work import Output, Work
from vmjob.errors import CheckpointFailed, HostDiskFull, VmjobError
from vmjob.grid.contract import Grid
from vmjob.home import Home
from vmjob.host.facts import processor
from vmjob.host.priority import lower_disk_priority
from vmjob.machine.contract import MachineSpec

__all__ = ["Checkpointer", "processor_of", "shape_of"]

#: Seconds between looks at the lock that another job of this computer holds.
LOCK_PERIOD = 0.05
#: Seconds for output that the checkpoint contains to reach the slot.
OUTPUT_DEADLINE = 30.0
#: Bytes that stay free on the disk whatever happens.
LEFT_FREE = 64 << 20
MIB = 1 << 20


class Checkpointer:
    """Makes the checkpoints of one job; one at a time, and one at a time in a home."""

    def __init__(self, home: Home, slot: Slot, session: Session, work: Work, output: Output,
                 streams: Streams, clock: RunClock, life: Life, grid: Grid,
                 disk_limit: int | None = None) -> None:
        self._lock = home.locks / "checkpoint"
        self._slot = slot
        self._session = session
        self._work = work
        self._output = output
        self._streams = streams
        self._clock = clock
        self._life = life
        self._grid = grid
        self._disk_limit = disk_limit
        self._told: str | None = None

    async def every(self, seconds: float) -> None:
        """Make one after each so many seconds of the job's run time, for ever.

        One that fails is told, and the next one is made as usual.
        """
        while True:
            await self._clock.reach(self._clock.seconds + seconds)
            try:
                await self.take()
            except (VmjobError, OSError) as error:
                self._warn(f"no checkpoint was made: {error}")

    async def take(self) -> Generation | None:
        """Make one now; None when no task runs, so that there is nothing to keep.

        Raises `CheckpointFailed`, `HostDiskFull`; the job goes on, earlier checkpoints stay good.
        """
        async with _held(self._lock), self._work.steady:
            if not self._work.running:
                return None
            with self._life.during(State.CHECKPOINT):
                return await self._take()

    async def _take(self) -> Generation:
        generations, machine = self._slot.generations, self._session.machine
        number = generations.next_number()
        self._check_room()
        at_that_time: list[Progress] = []
        checkpoint = await machine.checkpoint(
            generations.directory, f"{number:0{DIGITS}}",
            lambda: at_that_time.append(self._work.progress()))
        progress, = at_that_time
        try:
            with anyio.fail_after(OUTPUT_DEADLINE):
                await self._output.reached(progress.position)
        except TimeoutError:
            raise CheckpointFailed("nobody takes the job's output") from None
        spec = machine.spec
        draft = Draft(number, time.time(), self._session.driver_name, processor_of(spec),
                      shape_of(spec), progress)

        def publish() -> Generation:
            lower_disk_priority()
            self._streams.sync()
            return generations.publish(draft, checkpoint)

        try:
            return await anyio.to_thread.run_sync(publish)
        except OSError as error:
            raise HostDiskFull(f"a checkpoint could not be written: {error.strerror}") from error

    def _check_room(self) -> None:
        """Refuse to begin what would fill the disk, or break the limit of who owns it."""
        directory = self._slot.generations.directory
        most = self._session.machine.spec.memory_mb * MIB
        if shutil.disk_usage(directory).free < most + LEFT_FREE:
            raise HostDiskFull(f"there is no room for another checkpoint in {directory}")
        if self._disk_limit is not None and self._slot.disk_bytes() + most > self._disk_limit:
            raise HostDiskFull("another checkpoint might take more disk than the job may use "
                               f"({self._disk_limit // MIB} MiB)")

    def _warn(self, text: str) -> None:
        if text != self._told:
            self._grid.warning(text)
        self._told = text


def shape_of(spec: MachineSpec) -> dict[str, object]:
    """What a machine must be made with to continue from another's checkpoint."""
    return {"memory_mb": spec.memory_mb, "cpus": spec.cpus, "disk_gb": spec.disk_gb,
            "network": spec.network, "accelerator": spec.accelerator, "cpu_model": spec.cpu_model}


def processor_of(spec: MachineSpec) -> str:
    """What a machine's guest sees of this computer's processor; '' where it is emulated."""
    return processor() if spec.accelerator in ("kvm", "hvf", "whpx") else ""


@contextlib.asynccontextmanager
async def _held(path: Path) -> AsyncIterator[None]:
    """One checkpoint at a time: two would share the disk, and both take twice as long."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await anyio.sleep(LOCK_PERIOD)
        yield


