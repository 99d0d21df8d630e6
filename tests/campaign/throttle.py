"""A job that is suspended and resumed second by second, as a CPU throttle does it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import anyio
import psutil

from tests.campaign import ticking
from vmjob.engine.clock import Pace
from vmjob.engine.control import Control
from vmjob.engine.record import Record
from vmjob.engine.request import Request, Survival
from vmjob.engine.run import run_job
from vmjob.engine.slot import Asked, Slot
from vmjob.errors import VmjobError
from vmjob.grid.contract import Quiet
from vmjob.home import Home
from vmjob.image.store import Image
from vmjob.job.files import Input
from vmjob.job.model import Job, Task
from vmjob.machine.contract import BootParts, MachineSpec, Priority
from vmjob.machine.qemu.driver import QemuDriver

__all__ = ["throttle"]

SCRIPT = Path(__file__).with_name("ticking.py")
MEMORY_MB = 256
#: Seconds of run time between checkpoints: some are under way when the machine is suspended.
EVERY = 10.0
#: Most processor seconds of QEMU while it stands still for a second: what the kernel counts by.
IDLE = 0.02
#: Seconds by which the machine's time of day may differ, and a sleep of a tenth be late. What
#: counted a second of standing still would be later than that.
CLOCK, LATE = 0.2, 0.9
#: Part by which run time, as the guest, the alarms and the limit count it, may differ.
DRIFT = 0.03
#: What Linux says when it misses its timers.
COMPLAINTS = ("rcu_sched", "rcu_preempt", "soft lockup", "hung_task", "blocked for more than",
              "unstable", "Kernel panic")


class _Heard(Quiet):
    """What comes from the job."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.messages: list[str] = []
        self.warnings: list[str] = []

    async def output(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        self.out += data if stream == "stdout" else b"stderr: " + data

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class _Control(Control):
    """Tells when there is something to control."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()

    @contextlib.asynccontextmanager
    async def attached(self, *parts: Any) -> AsyncIterator[None]:
        async with super().attached(*parts):
            self.begun.set()
            yield


class _Throttle:
    """Suspends and resumes one job, and looks at its machine each time."""

    def __init__(self, control: _Control, slot: Path, on: float, off: float) -> None:
        self._control = control
        self._slot = slot
        self._on = on
        self._off = off
        self.ran = self.stood = 0.0
        #: Processor seconds of QEMU in each stand; apart, where a checkpoint was to be finished.
        self.busy: list[float] = []
        self.busy_keeping: list[float] = []
        self.offsets: list[float] = []
        self.console = ""
        self.checkpoints = 0
        self.wrong: list[str] = []

    async def while_it_runs(self) -> None:
        await self._control.begun.wait()
        while (parts := self._control._parts) is not None:
            session = parts[0]
            began = time.monotonic()
            await anyio.sleep(self._on)
            await self._look(session.client.ping())
            self.console = session.machine.console()
            self.checkpoints = self._newest()
            if not await self._control.suspend():
                return
            stopped = time.monotonic()
            self.ran += stopped - began
            qemu = psutil.Process(session.machine.pid)  # type: ignore[attr-defined]
            keeping = _keeps(session.machine)
            before = sum(qemu.cpu_times()[:2])
            await anyio.sleep(self._off)
            used = sum(qemu.cpu_times()[:2]) - before
            (self.busy_keeping if keeping else self.busy).append(used)
            await self._control.resume()
            self.stood += time.monotonic() - stopped

    def _newest(self) -> int:
        """The number of the newest checkpoint; a failed one has none."""
        return max((int(path.stem) for path in (self._slot / "checkpoints").glob("[0-9]*.json")),
                   default=0)

    async def _look(self, ping: Any) -> None:
        """The agent answers, and its time of day is ours."""
        before = time.time()
        said = float((await ping)["time"])
        after = time.time()
        self.offsets.append(min(0.0, said - before) + max(0.0, said - after))


def _keeps(machine: Any) -> bool:
    """Whether a checkpoint is being made, or the layers of the disk are being merged."""
    merging = machine._merging
    return bool(machine._checkpointing.locked() or (merging and not merging.done()))


async def throttle(home: Home, image: Image, place: Path, minutes: float, on: float,
                   off: float) -> dict[str, Any]:
    """Throttle a job until its time limit ends it, after about so many minutes; what was seen."""
    limit = minutes * 60 * on / (on + off)
    job = Job((Task(("python3", "job.py")),), inputs=(Input(SCRIPT, "job.py"),),
              memory_mb=MEMORY_MB, time_limit=limit)
    shape = MachineSpec(id="", directory=home.root, boot=BootParts.of(image), memory_mb=MEMORY_MB,
                        accelerator="tcg", priority=Priority.NORMAL)
    heard, control = _Heard(), _Control()
    worker = _Throttle(control, place / "slot", on, off)
    began = time.monotonic()
    with Slot.claim(place / "slot") as slot:
        slot.begin(Asked(job))
        running = asyncio.ensure_future(run_job(home, Request(
            job, QemuDriver(), shape, {}, survival=Survival(slot, Pace(EVERY)),
            control=control), heard))
        throttling = asyncio.ensure_future(worker.while_it_runs())
        record = await running
        throttling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await throttling
            except (VmjobError, OSError, psutil.Error) as error:
                # It may be in the middle of something when the job ends, not before.
                if worker.ran < limit * (1 - DRIFT):
                    worker.wrong.append(f"{type(error).__name__}: {error}")
        kept = (place / "slot" / "stdout").read_bytes()
    worker.wrong += _wrong(record, heard, worker, kept, limit)
    if left := [*home.machines.iterdir(), *(place / "slot").glob("machine*")]:
        worker.wrong.append(f"left over: {left}")
    lines = [line.split() for line in kept.decode().splitlines()]
    return {"seconds": round(time.monotonic() - began, 1),
            "suspended": len(worker.busy) + len(worker.busy_keeping),
            "suspended_in_a_checkpoint": len(worker.busy_keeping),
            "stood_seconds": round(worker.stood, 1), "limit_seconds": limit,
            "guest_seconds": float(lines[-1][2]) if lines else None, "lines": len(lines),
            "messages": len(heard.messages), "checkpoints": worker.checkpoints,
            "processor_seconds_while_still": round(sum(worker.busy), 2),
            "most_processor_seconds_in_one": round(max(worker.busy, default=0), 2),
            "clock_off_most": round(max(map(abs, worker.offsets), default=0), 4),
            "longest_sleep_of_a_tenth": max((float(line[3]) for line in lines), default=None),
            "warnings": heard.warnings, "wrong": worker.wrong}


def _wrong(record: Record, heard: _Heard, seen: _Throttle, kept: bytes,
           limit: float) -> Iterator[str]:
    """What must not be."""
    if (record.error or {}).get("code") != "time-limit":
        yield f"the job did not end by its time limit: {record.error}, {record.exit_code}"
    if bytes(heard.out) != kept:
        yield "what was heard is not what the slot has"
    lines = [line.split() for line in kept.decode().splitlines()]
    state = b"begin"
    for number, line in enumerate(lines):
        state = ticking.following(state)
        if line[:2] != [str(number), state.hex()]:
            yield f"line {number} is {line[:2]}"
            return
        if not ticking.SLEEP <= float(line[3]) <= ticking.SLEEP + LATE:
            yield f"line {number}: a sleep of {ticking.SLEEP} s took {line[3]} s"
    if not lines:
        yield "the job wrote nothing"
        return
    ran, alarms = float(lines[-1][2]), int(lines[-1][4])
    for what, seconds in (("the guest's clock", ran), ("the alarms", alarms * ticking.ALARM),
                          ("the throttle", seen.ran)):
        if not abs(seconds - limit) <= limit * DRIFT + 1:
            yield f"{what} counted {seconds:.1f} s of a limit of {limit:g} s"
    ticks = [f"tick {number}" for number in range(0, len(lines), ticking.EACH)]
    if heard.messages not in (ticks, ticks[:-1]):
        yield f"{len(heard.messages)} messages of {len(ticks)}"
    if worst := [each for each in seen.offsets if abs(each) > CLOCK]:
        yield f"the time of day was off {len(worst)} times, by up to {max(map(abs, worst)):.2f} s"
    if worst := [each for each in seen.busy if each > IDLE]:
        yield f"QEMU used the processor {len(worst)} times while it stood still: {max(worst):.2f} s"
    yield from (f"the guest's kernel says {each!r}" for each in COMPLAINTS if each in seen.console)
    if heard.warnings:
        yield f"warnings: {heard.warnings[:3]}"
