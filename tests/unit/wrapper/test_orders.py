"""The client's last word is obeyed, whatever went wrong with the one before."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from vmjob.engine.control import Control
from vmjob.engine.session import beside
from vmjob.errors import MachineDied
from vmjob.grid.boinc import GlobalPreferences
from vmjob.wrapper import orders
from vmjob.wrapper.orders import Orders

pytestmark = pytest.mark.anyio


class Plugged(Control):
    """A machine with a network through which far too much has passed."""

    has_network = True

    def __init__(self) -> None:
        super().__init__()
        self.online = True
        self.passed = 0

    async def set_network(self, available: bool) -> None:
        self.online = available

    def traffic(self) -> tuple[int, int]:
        self.passed += 10**9
        return self.passed, self.passed


class Unplugged(Control):
    """A machine that ends while its cable is pulled."""

    async def set_network(self, available: bool) -> None:
        raise MachineDied("it is gone")


async def until(control: Plugged, *, online: bool) -> None:
    async with asyncio.timeout(10):
        while control.online is not online:  # noqa: ASYNC110 - a fake tells nobody
            await asyncio.sleep(0.01)


async def test_a_cable_is_plugged_in_again_when_the_volunteer_lifts_the_limit(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "IDLE", 0.01)
    control = Plugged()
    wanted = Orders(control, replace(GlobalPreferences(), max_bytes_sec_up=1.0))
    async with beside(wanted.obey()), beside(wanted.limit()):
        await until(control, online=False)
        wanted.prefer(GlobalPreferences())
        await until(control, online=True)


async def test_a_cable_that_cannot_be_pulled_does_not_cost_the_order_to_stand_still() -> None:
    control = Unplugged()
    wanted = Orders(control, None)
    async with beside(wanted.obey()):
        wanted.connect(False)
        wanted.stand(True)
        for _ in range(5):
            await asyncio.sleep(0)
    assert control._still  # so the machine that goes on from the checkpoint will stand
