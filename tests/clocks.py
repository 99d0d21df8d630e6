"""A look at the clocks of machines, on a computer however busy."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vmjob.guest.client import AgentClient


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


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    found = Clocks()

    def timed(call: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def wrapped(*given: Any, **more: Any) -> None:
            began = time.monotonic()
            await call(*given, **more)
            found.late = time.monotonic() - began
        return wrapped

    for name in ("introduce", "set_clock"):
        monkeypatch.setattr(AgentClient, name, timed(getattr(AgentClient, name)))
    return found
