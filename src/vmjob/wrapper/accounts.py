"""What a job has used, in all: told to the client once a second, written down now and then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

from vmjob.engine.control import Control
from vmjob.grid.boinc import Runtime, Status
from vmjob.job.logical import is_there
from vmjob.wrapper import totals
from vmjob.wrapper.client import ClientGrid
from vmjob.wrapper.ground import Ground, used
from vmjob.wrapper.log import Log
from vmjob.wrapper.totals import Totals
from vmjob.wrapper.usage import Usage

__all__ = ["Accounts"]

MIB = 1 << 20
#: Seconds between status messages, and how many of them go by between two savings of the totals.
STATUS_PERIOD = 1.0
SAVE_EVERY = 10
#: Share of the disk bound from which on the log warns.
DISK_WARNING = 0.8
#: The application's program that shows its jobs; only with it somebody reads how far a job is.
GRAPHICS_APP = "graphics_app"


class Accounts:
    """Keeps ``kept``, the totals of one job, and tells the client of them."""

    def __init__(self, runtime: Runtime, directory: Path, ground: Ground, control: Control,
                 grid: ClientGrid, kept: Totals, log: Log) -> None:
        self._runtime = runtime
        self._directory = directory
        self._ground = ground
        self._control = control
        self._grid = grid
        self._log = log
        self._usage = Usage()
        self._passed = (0, 0)
        self._told = False
        self._warned = False
        self._shows = is_there(GRAPHICS_APP, ground.where)
        self.kept = kept
        # The client knows of the last checkpoint, and at its own end hears of nothing more.
        told = ground.init.wu_cpu_time if ground.init is not None else 0.0
        self._before = kept.cpu_seconds = max(told, kept.cpu_seconds)
        kept.starts += 1

    async def tell(self) -> None:
        """Do all of it, for ever."""
        number, last = 0, time.monotonic()
        while True:
            now = time.monotonic()
            if self._grid.current == "run":
                self.kept.run_seconds += now - last
            last = now
            self.measure()
            if number % SAVE_EVERY == 0:
                self.save()
                await asyncio.to_thread(self._look_at_disk)
            number += 1
            await asyncio.sleep(STATUS_PERIOD)

    def measure(self) -> None:
        """Tell the client what the job has used, and how far it is."""
        kept, now = self.kept, self._usage.measure()
        kept.cpu_seconds = max(kept.cpu_seconds, self._before + now.cpu_seconds)
        self._count_traffic()
        self._runtime.report(Status(
            cpu_seconds=kept.cpu_seconds, fraction_done=kept.fraction,
            other_pid=self._announced(), memory_bytes=now.memory_bytes,
            bytes_sent=kept.bytes_sent, bytes_received=kept.bytes_received,
            want_network=self._control.has_network))
        if self._shows:
            with contextlib.suppress(OSError):  # a full disk: the picture stands still
                self._runtime.status_file(
                    cpu_seconds=kept.cpu_seconds, elapsed_seconds=kept.run_seconds,
                    fraction_done=kept.fraction or 0.0)

    def _announced(self) -> int | None:
        """The machine's process. The client kills it when we have ended, so once it has ended
        another is named in its place: ours, before somebody else has its number.
        """
        if (pid := self._control.pid) is not None:
            self._told = True
            return pid
        return os.getpid() if self._told else None

    def fault(self, code: str) -> int:
        """Something was in the way: how often it was before, since the last checkpoint.

        Another fault in between forgives nothing: of two that take turns each would be the first
        one for ever, and be tried again at once.
        """
        before = self.kept.faults.get(code, 0)
        self.kept.faults[code] = before + 1
        self.save()
        return before

    def save(self) -> None:
        totals.write(self._directory, self.kept)

    def _count_traffic(self) -> None:
        """Add what the machine has sent and received since the last time; one may be a new one."""
        sent, received = self._control.traffic()
        before_sent, before_received = self._passed
        self.kept.bytes_sent += sent - (before_sent if sent >= before_sent else 0)
        self.kept.bytes_received += received - (
            before_received if received >= before_received else 0)
        self._passed = (sent, received)

    def _look_at_disk(self) -> None:
        bound = self._ground.disk_bound
        if bound is None or self._warned:
            return
        now = used(self._directory)
        if now > DISK_WARNING * bound:
            self._warned = True
            self._log.line(f"warning: the job takes {now // MIB} MiB of the disk; the client ends "
                           f"it at {bound // MIB}")
