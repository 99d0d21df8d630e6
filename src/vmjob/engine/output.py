"""The output of a job on its way from the machine to whoever wants it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread

from vmjob.engine.record import Record
from vmjob.errors import HostDiskFull
from vmjob.grid.contract import Grid
from vmjob.host import durable
from vmjob.job.model import Job

if TYPE_CHECKING:
    from vmjob.engine.slot import Streams

__all__ = ["Output", "make_safe", "mark_duration"]

#: What stands in that file: vboxwrapper's words, in case somebody compares them.
DURATION_OVER = "Work Unit completed.\n"


class Output:
    """Counts a job's output, passes it on up to its limit, and says when that is reached.

    With ``streams``, it is kept there before anybody hears of it. ``position``: bytes of each
    stream so far, from the beginning of the first task.
    """

    def __init__(self, job: Job, grid: Grid, record: Record, streams: Streams | None,
                 position: dict[str, int]) -> None:
        self._limit = job.stream_limit
        self._grid = grid
        self._record = record
        self._streams = streams
        self._moved = anyio.Event()
        self.position = {"stdout": 0, "stderr": 0, **position}
        self.flooded = anyio.Event()
        #: Whether somebody is being waited for to take what there is.
        self.blocked = False
        self._note()

    async def take(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """The next bytes of a stream."""
        room = max(0, self._limit - self.position[stream])
        if room and self._streams is not None:
            self._streams.write(stream, data[:room])
        self.position[stream] += len(data)
        self._note()
        self._moved.set()
        self._moved = anyio.Event()
        if len(data) > room and not self.flooded.is_set():
            self.flooded.set()
            self._grid.warning(f"{stream} is longer than {self._limit} bytes; the rest is "
                               "thrown away")
        if room:
            self.blocked = True
            try:
                await self._grid.output(stream, data[:room])
            finally:
                self.blocked = False

    async def reached(self, position: dict[str, int]) -> None:
        """Wait until all up to there was taken."""
        while any(self.position[stream] < wanted for stream, wanted in position.items()):
            await self._moved.wait()

    def _note(self) -> None:
        seen = self.position
        self._record.stdout_bytes, self._record.stderr_bytes = seen["stdout"], seen["stderr"]
        self._record.discarded_bytes = sum(max(0, each - self._limit) for each in seen.values())


async def make_safe(job: Job, came: Iterable[Path]) -> None:
    """See that what the job made survives a power cut: its checkpoints are about to go.

    The record of its end is safe at once; without this it could tell of outputs that are empty.
    ``came``: files that came through its folders. Raises `HostDiskFull`.
    """
    made = [*(output.destination for output in job.outputs), *came]
    if job.duration_file is not None:
        made.append(job.duration_file)
    try:
        await anyio.to_thread.run_sync(durable.sync_all, made)
    except OSError as error:
        raise HostDiskFull(f"the job's outputs could not be written: {error.strerror}") from error


def mark_duration(job: Job) -> None:
    """Write the file that says that the job's duration is over; raises `HostDiskFull`."""
    if job.duration_file is None:
        return
    try:
        beside = job.duration_file.with_name(f"{job.duration_file.name}.new")
        beside.unlink(missing_ok=True)  # a link there would lead elsewhere
        with beside.open("x", encoding="ascii") as file:
            file.write(DURATION_OVER)
        beside.replace(job.duration_file)
    except OSError as error:
        raise HostDiskFull(f"cannot write {job.duration_file}: {error.strerror}") from error
