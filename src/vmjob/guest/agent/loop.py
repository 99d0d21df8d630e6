"""One thread that waits for many descriptors.

The agent has no threads: a fork from a process with threads costs 3 ms more under
emulation, and each hand-over between threads a fraction of one (measured; see
docs/decisions/003-agent-without-threads.md).
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable

READ = select.POLLIN
WRITE = select.POLLOUT


class Loop:
    """Calls back when descriptors are ready and when moments come."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._moments: dict[object, tuple[float, Callable[[], None]]] = {}
        self.stopped = False

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(events)`` whenever ``fd`` is ready; replaces an earlier watch."""
        self._poll.register(fd, events)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor; before it is closed."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def later(self, key: object, seconds: float, callback: Callable[[], None]) -> None:
        """Call ``callback()`` once, in ``seconds``; replaces an earlier call of the same key."""
        self._moments[key] = (time.monotonic() + seconds, callback)

    def sooner(self, key: object, seconds: float) -> None:
        """Make a call of `later` come in ``seconds``, if it would come later than that."""
        moment, callback = self._moments[key]
        self._moments[key] = (min(moment, time.monotonic() + seconds), callback)

    def forget(self, key: object) -> None:
        """Cancel `later`."""
        self._moments.pop(key, None)

    def run(self) -> None:
        """Serve until `stopped`."""
        while not self.stopped:
            wait = None
            if self._moments:
                next_moment = min(moment for moment, _ in self._moments.values())
                wait = max(0, int((next_moment - time.monotonic()) * 1000) + 1)
            for fd, events in self._poll.poll(wait):
                # An earlier callback of this round may have closed it.
                if callback := self._callbacks.get(fd):
                    callback(events)
            if not self._moments:
                continue
            now = time.monotonic()
            for key, (moment, call) in list(self._moments.items()):
                if moment <= now and key in self._moments:
                    del self._moments[key]
                    call()
