"""The grid that the engine tells of a job: BOINC's client, and the log."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import anyio.to_thread

from vmjob.errors import BadPath
from vmjob.grid.boinc import Runtime
from vmjob.grid.contract import Quiet
from vmjob.job.logical import is_there, resolve
from vmjob.job.reading import Surroundings
from vmjob.wrapper.log import Log, Tail
from vmjob.wrapper.totals import Totals

__all__ = ["TAIL", "ClientGrid"]

#: Bytes kept of the end of each of the job's streams.
TAIL = 12 << 10
#: Messages of the job that are logged.
MOST_MESSAGES = 50
#: Phases that are worth a line: the others follow from them.
TOLD = {"boot": "the machine boots", "template": "a machine is frozen, once for all jobs",
        "thaw": "the machine starts", "restore": "the machine continues from a checkpoint",
        "outputs": "output files are fetched"}


class ClientGrid(Quiet):
    """Passes on what happens; ``totals`` is kept by whoever carries the job.

    ``kept`` is called when there is a new checkpoint.
    """

    def __init__(self, runtime: Runtime, where: Surroundings, totals: Totals, log: Log,
                 kept: Callable[[], None]) -> None:
        self._runtime = runtime
        self._where = where
        self._totals = totals
        self._log = log
        self._kept = kept
        self._messages = MOST_MESSAGES
        self.streams = {"stdout": Tail(TAIL), "stderr": Tail(TAIL)}
        #: Phase of the job's life; and the last one before its end.
        self.current = self.failed_in = ""

    def phase(self, name: str) -> None:
        self.current = name
        if name != "end":
            self.failed_in = name
        if name in TOLD:
            self._log.line(TOLD[name])

    def task(self, title: str, number: int, count: int) -> None:
        self._log.line(f"the job runs: {title}" + (f" ({number} of {count})" if count > 1 else ""))

    async def output(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        self.streams[stream].add(data)

    def message(self, text: str) -> None:
        if self._messages > 0:
            self._messages -= 1
            self._log.line(f"the job says: {text}")

    def fraction_done(self, fraction: float) -> None:
        self._totals.fraction = fraction

    def checkpoint(self, number: int, still_seconds: float, written_bytes: int) -> None:
        """Told to the client by a change of the processor time at the last one."""
        self._totals.checkpoints += 1
        self._totals.faults.clear()
        self._runtime.checkpointed(self._totals.cpu_seconds)
        self._log.line(f"checkpoint {number}: the machine stood still for "
                       f"{still_seconds * 1000:.0f} ms, {written_bytes / 1e6:.1f} MB written")
        self._kept()

    async def trickle(self, variety: str, text: str) -> bool:
        try:
            taken = self._runtime.trickle_up(variety, text)
        except (ValueError, OSError) as error:
            self._log.line(f"a trickle {variety!r} cannot be sent: {error}")
            return True
        if taken:
            self._log.line(f"trickle {variety}: {len(text)} characters")
        return taken

    async def upload(self, name: str) -> None:
        try:
            # Gigabytes, perhaps: the client's orders are heard meanwhile.
            await anyio.to_thread.run_sync(self._ready, name)
            self._runtime.upload(name)
        except (BadPath, ValueError, OSError) as error:
            self._log.line(f"{name!r} cannot be uploaded before the end: {error}")
        else:
            self._log.line(f"upload before the end: {name}")

    def _ready(self, name: str) -> None:
        """Put a file of the shared folder where the client looks for the output of that name.

        The client reads the project's file when it is asked to upload, not the slot's.
        """
        shared = self._where.directory / "shared" / name
        if not is_there(name, self._where) or not shared.is_file():
            return
        target = resolve(name, self._where)
        new = Path(f"{target}.vmjob")
        with shared.open("rb") as source, new.open("wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
        new.replace(target)

    def address(self, what: Literal["web", "console", "port"], where: str) -> None:
        # What is logged goes to a public server: not the password of a screen.
        where = where.partition(",")[0].removeprefix("vnc://")
        self._log.line(f"{what} address of the job: {where}")
        with contextlib.suppress(ValueError):
            if what == "web":
                self._runtime.web_address(where)
            elif what == "console":
                self._runtime.remote_desktop(where)

    def warning(self, text: str) -> None:
        self._log.line(f"warning: {text}")
