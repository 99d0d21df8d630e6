"""Where the client wants a job's machine, and the volunteer its network."""

from __future__ import annotations

import asyncio
import contextlib
import time

from vmjob.engine.control import Control
from vmjob.errors import VmjobError
from vmjob.grid.boinc import GlobalPreferences
from vmjob.wrapper import network
from vmjob.wrapper.network import Gate

__all__ = ["Orders"]

#: Seconds between two looks at whether there is anything to limit.
IDLE = 1.0


class Orders:
    """Keeps the last word on each, and brings the machine there, however long that takes.

    A CPU throttle says two words a second, and either may take longer than that to be done.
    """

    def __init__(self, control: Control, preferences: GlobalPreferences | None) -> None:
        self._control = control
        self._changed = asyncio.Event()
        self._gate = Gate(preferences)
        self._gate_open = True
        #: Whether the job is to stand still.
        self.still = False
        #: Whether it may use the network; None: nobody has said anything.
        self.online: bool | None = None

    def stand(self, still: bool) -> None:
        self.still = still
        self._changed.set()

    def connect(self, online: bool) -> None:
        self.online = online
        self._changed.set()

    def prefer(self, preferences: GlobalPreferences) -> None:
        """The volunteer's limits have changed."""
        self._gate = Gate(preferences)

    async def obey(self) -> None:
        """Bring the machine where it is wanted, for ever."""
        still, plugged = False, True
        while True:
            await self._changed.wait()
            self._changed.clear()
            # A machine that is gone: its job tells it, and the next one obeys the other order too.
            with contextlib.suppress(VmjobError):
                if (self.online is not False and self._gate_open) != plugged:
                    plugged = not plugged
                    await self._control.set_network(plugged)
            with contextlib.suppress(VmjobError):
                if self.still != still:
                    still = self.still
                    await (self._control.suspend() if still else self._control.resume())

    async def limit(self) -> None:
        """Keep what passes the network within the volunteer's limits, for ever."""
        while True:
            if not self._gate.limited or not self._control.has_network:
                if not self._gate_open:  # a limit that is lifted must not stay a pulled cable
                    self._gate_open = True
                    self._changed.set()
                await asyncio.sleep(IDLE)
                continue
            sent, received = self._control.traffic()
            is_open = self._gate.allows(sent, received, time.monotonic())
            if is_open != self._gate_open:
                self._gate_open = is_open
                self._changed.set()
            await asyncio.sleep(network.PERIOD)
