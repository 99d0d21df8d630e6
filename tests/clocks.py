"""A look at the clocks of machines, on a computer however busy."""

from __future__ import annotations

import time

from vmjob.guest.client import AgentClient

__all__ = ["Clocks"]


class Clocks:
    """Looks at machines' times of day."""

    #: Seconds that the order took by which one was set last: it may be that much behind.
    late = 0.0

    async def wrong(self, client: AgentClient) -> float:
        """Seconds by which one is wrong, beyond what the ways of that order and this look explain.
        """
        before = time.time()
        guest = float((await client.ping())["time"])
        return max(before - self.late - guest, guest - time.time(), 0.0)
