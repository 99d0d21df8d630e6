"""A job's folders while it runs: kept in step, and looked at for its trigger files."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import anyio

from vmjob.engine.clock import RunClock
from vmjob.engine.control import Control
from vmjob.engine.folders import Mirror
from vmjob.engine.slot import Slot
from vmjob.engine.triggers import Sent, TriggerWatch
from vmjob.engine.work import Verdict
from vmjob.errors import HostDiskFull, HostError, MachineError, Postponed, VmjobError
from vmjob.grid.contract import Grid
from vmjob.guest.client import AgentClient
from vmjob.host import below
from vmjob.job.model import SHARED, Job, Triggers
from vmjob.job.secrets import redacted_bytes
from vmjob.job.triggers import Postponement

__all__ = ["Sharing"]

#: Seconds for the checkpoint of a job that asks to be continued later.
CHECKPOINT_DEADLINE = 60.0
#: Seconds for the grid to take the trickles of a job whose tasks have ended.
LAST_TRICKLES = 60.0
#: Where the slot remembers which trickles were sent.
SENT = "trickles"
#: Ends a job, whatever it still does.
End = Callable[[Verdict | VmjobError], None]

#: Ending of the files in which it remembers what came from the machine.
JOURNAL = "-folder.journal"


class Sharing:
    """The folders of one job on one machine. ``known``: `Progress.folders`, when it goes on.

    ``client``: the agent that sees the guest's side of them.
    """

    def __init__(self, client: AgentClient, job: Job, grid: Grid, slot: Slot | None,
                 known: Mapping[str, dict[str, Any]]) -> None:
        self._job = job
        self._triggers: TriggerWatch | None = None
        self._mirrors = {
            folder.name: Mirror(
                folder, client, redact=redacted_bytes, warn=grid.warning,
                known=known.get(folder.name),
                journal=slot.root / f"{folder.name}{JOURNAL}" if slot else None,
                base=folder.base)
            for folder in job.folders}

    async def fill(self) -> None:
        """Before the first task: all that is there goes in; what earlier runs triggered does not.

        Raises what `Mirror.fill` raises.
        """
        for folder in self._job.folders:
            if folder.name == SHARED:
                for name in _names(self._job.triggers):
                    below.remove(folder.source, name)
        for mirror in self._mirrors.values():
            await mirror.fill()

    def known(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint must know of the folders."""
        return {name: mirror.known() for name, mirror in self._mirrors.items()}

    async def keep_in_step(self, end: End, clock: RunClock, grid: Grid, control: Control,
                           slot: Slot | None) -> None:
        """Round after round while the job runs; ``end`` ends it, as a fault of a folder does."""
        live = [self._mirrors[folder.name] for folder in self._job.folders if folder.live]
        watch = self._triggers = self._watch(end, clock, grid, control, slot)
        try:
            while live:
                await clock.going()
                since = clock.seconds
                for mirror in live:
                    await mirror.step()
                if watch is not None:
                    await watch.look(since)
                await anyio.sleep(min(mirror.pause for mirror in live))
        except MachineError:
            raise  # that breaks the job's own lanes as well, which tell it better
        except VmjobError as error:  # the guest's, too: it may refuse this and answer all else
            end(error)
        except OSError as error:
            end(_of_this_computer(error))

    async def last_words(self) -> None:
        """After the last task: hear what the job said just before its end, which still counts."""
        if self._triggers is not None:
            await self._collect(self._mirrors[SHARED])
            with anyio.move_on_after(LAST_TRICKLES):
                while not await self._triggers.hear():  # noqa: ASYNC110 - no grid says when
                    await anyio.sleep(1)

    async def collect(self) -> None:
        """After the last task: what did not come yet."""
        for folder in self._job.folders:
            if folder.writable:
                await self._collect(self._mirrors[folder.name])

    async def _collect(self, mirror: Mirror) -> None:
        try:
            await mirror.collect()
        except OSError as error:
            raise _of_this_computer(error) from error

    def came(self) -> list[Path]:
        """Files of this computer that came from the machine."""
        return [path for mirror in self._mirrors.values() for path in mirror.came()]

    def _watch(self, end: End, clock: RunClock, grid: Grid, control: Control,
               slot: Slot | None) -> TriggerWatch | None:
        for folder in self._job.folders:
            if folder.name == SHARED:
                return TriggerWatch(
                    folder.source, self._job.triggers, clock, grid, Sent(_sent(slot)),
                    self._mirrors[SHARED], end, _postponing(end, grid, control, slot))
        return None


def _postponing(end: End, grid: Grid, control: Control,
                slot: Slot | None) -> Callable[[Postponement], Awaitable[None]]:
    """What is done for a job that wants to wait: with a slot, others may use its time."""
    async def postpone(said: Postponement) -> None:
        why = f": {said.message}" if said.message else ""
        if slot is not None:
            with contextlib.suppress(VmjobError):  # the checkpoints before it stay good
                await control.checkpoint(CHECKPOINT_DEADLINE)
        elif await control.suspend():  # not when the tasks have ended: nothing would go on
            grid.warning(f"the job waits for {said.delay:g} seconds{why}")
            await anyio.sleep(said.delay)
            await control.resume()
            return
        end(Postponed(f"the job is to be continued after {said.delay:g} seconds{why}",
                      delay=said.delay, notice=said.notice))

    return postpone


def _of_this_computer(error: OSError) -> HostError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (HostDiskFull if full else HostError)(
        f"cannot keep the job's folders in step: {error.strerror}")


def _names(triggers: Triggers) -> list[str]:
    """Every file by which the job would say something."""
    said = (triggers.completion, triggers.temporary_exit, triggers.fraction_done,
            triggers.heartbeat, triggers.credit, *triggers.trickles)
    return [name for name in said if name]


def _sent(slot: Slot | None) -> Path | None:
    return slot.root / SENT if slot else None
