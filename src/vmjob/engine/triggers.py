"""The files by which a job speaks to whoever runs it, and what the engine does about each.

They are looked at on the host's side of the shared folder, where only whole files appear.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from vmjob.engine.agreement import Pair
from vmjob.engine.clock import RunClock
from vmjob.engine.folderside import full_disk
from vmjob.engine.fraction import parse_fraction
from vmjob.engine.work import Verdict
from vmjob.errors import HeartbeatStopped, VmjobError
from vmjob.grid.contract import Grid
from vmjob.host import below
from vmjob.host.below import Seen
from vmjob.job.model import Triggers
from vmjob.job.triggers import (
    MOST_BYTES,
    Postponement,
    parse_completion,
    parse_credit,
    parse_postponement,
)

__all__ = ["Sent", "TriggerWatch", "tell_run_time", "tell_share"]

#: Seconds between two words on how much of a fixed duration is over, at least, and how many there
#: are of these at most.
SHARE_PERIOD = 2.0
SHARES = 1000


async def tell_run_time(clock: RunClock, grid: Grid, seconds: float) -> None:
    """Send a trickle with the run time after each so many seconds of it, for ever.

    ``cpu_time`` is its variety, although it never was that: projects know it by this name.
    """
    while True:
        await clock.reach(clock.seconds + seconds)
        await grid.trickle("cpu_time", f"<cpu_time>{clock.seconds:f}</cpu_time>")


async def tell_share(clock: RunClock, grid: Grid, duration: float) -> None:
    """Tell how much of a job's fixed duration is over, now and then, for ever."""
    while True:
        await clock.reach(clock.seconds + max(SHARE_PERIOD, duration / SHARES))
        grid.fraction_done(min(1.0, clock.seconds / duration))


class Sent:
    """Which trickles were sent, in a file that outlives this process; None: in no file.

    A job that goes back to a checkpoint finds the file of a trickle again that it had sent since.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._keys: set[str] = set()
        if path is not None and path.exists():
            self._keys = set(path.read_text(encoding="ascii").split())

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str) -> None:
        """Remember one, safely; raises `HostDiskFull`."""
        self._keys.add(key)
        if self._path is not None:
            with full_disk(), self._path.open("a", encoding="ascii") as file:
                file.write(key + "\n")
                file.flush()
                os.fsync(file.fileno())


class Shared(Protocol):
    """The part of `Mirror` that is needed here."""

    def version(self, name: str) -> Pair | None:
        """Which file both sides have under a name; None while they differ."""
        ...

    async def remove(self, name: str, version: Pair) -> bool:
        """Take it away on both sides, if it is still this one."""
        ...


class TriggerWatch:
    """Looks for one job's trigger files below ``root``, again and again.

    ``end`` ends the job, ``postpone`` makes it wait.
    """

    def __init__(self, root: Path, triggers: Triggers, clock: RunClock, grid: Grid, sent: Sent,
                 shared: Shared, end: Callable[[Verdict | VmjobError], None],
                 postpone: Callable[[Postponement], Awaitable[None]]) -> None:
        self._root = root
        self._shared = shared
        self._triggers = triggers
        self._clock = clock
        self._grid = grid
        self._sent = sent
        self._end = end
        self._postpone = postpone
        self._seen: dict[str, Seen | None] = {}
        self._uploaded: set[str] = set()
        self._beat = clock.seconds

    async def look(self, since: float) -> None:
        """Act on what is there, and what is not.

        ``since``: run time when the guest was asked for it. A long copy may lie between: the heart
        may well have beaten then, and is heard with the next round.
        """
        await self.hear()
        if self._triggers.heartbeat:
            self._listen(self._triggers.heartbeat, since)

    async def hear(self) -> bool:
        """Act on what is there; false when the grid has not taken all of it yet."""
        triggers = self._triggers
        if triggers.credit and (content := self._changed(triggers.credit)) is not None:
            self._credit(content)
        if triggers.fraction_done and (content := self._changed(triggers.fraction_done)):
            fraction = parse_fraction(content)
            if fraction is not None:
                self._grid.fraction_done(fraction)
        taken = [await self._trickle(name) for name in triggers.trickles]
        for name in triggers.uploads:
            if name not in self._uploaded and self._shared.version(name) is not None:
                self._uploaded.add(name)
                await self._grid.upload(name)
        await self._ends()
        return all(taken)

    async def _ends(self) -> None:
        triggers = self._triggers
        if triggers.completion:
            # One that the guest has yet to write again, after a checkpoint, does not count.
            there = self._shared.version(triggers.completion) is not None
            found = below.read(self._root, triggers.completion, MOST_BYTES)
            if there and found is not None:
                said = parse_completion(found[1])
                self._end(Verdict(said.process_exit_code, said.message, said.notice))
                return
        if triggers.temporary_exit:
            version = self._shared.version(triggers.temporary_exit)
            found = below.read(self._root, triggers.temporary_exit, MOST_BYTES)
            if found is not None and version is not None and await self._shared.remove(
                    triggers.temporary_exit, version):
                await self._postpone(parse_postponement(found[1]))

    def _listen(self, name: str, now: float) -> None:
        if self._changed(name) is not None:
            self._beat = now
        silent = now - self._beat
        if silent > self._triggers.heartbeat_interval:
            self._end(HeartbeatStopped(
                f"the job's heartbeat file {name!r} did not change for {silent:.0f} seconds"))

    def _changed(self, name: str) -> bytes | None:
        """The content of a file that is another than at the last look."""
        seen = below.look(self._root, name)
        if seen is None or seen == self._seen.get(name):
            return None
        self._seen[name] = seen
        found = below.read(self._root, name, MOST_BYTES)
        return found[1] if found else None

    def _credit(self, content: bytes) -> None:
        operations = parse_credit(content)
        if operations is not None:
            self._grid.operations(*operations)

    async def _trickle(self, name: str) -> bool:
        """Send one, if it is there; false: not now."""
        version = self._shared.version(name)
        found = below.read(self._root, name, MOST_BYTES + 1)
        if found is None or version is None:
            return True
        seen, content = found
        if seen.size > MOST_BYTES:
            self._grid.warning(f"the trickle {name!r} is longer than {MOST_BYTES} bytes; it is "
                               "thrown away")
        else:
            text = content.decode("utf-8", "replace")
            key = hashlib.sha256(f"{name}\0{seen.mtime_ns}\0{text}".encode()).hexdigest()
            if key not in self._sent:
                if not await self._grid.trickle(name, text):
                    return False  # later: one is still on its way
                self._sent.add(key)
        await self._shared.remove(name, version)
        return True
