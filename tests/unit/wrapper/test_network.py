"""On average nothing passes faster than the volunteer allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.grid.boinc import GlobalPreferences
from vmjob.wrapper.network import BURST, PERIOD, Allowance, Gate


@given(st.integers(1000, 10_000_000), st.integers(1000, 50_000_000), st.integers(5, 300))
def test_a_guest_that_sends_all_it_can_gets_its_allowance_and_no_more(
        rate: int, line: int, seconds: int) -> None:
    allowance, total, now = Allowance(rate), 0, 0.0
    while now < seconds:
        if allowance.allows(total, now):
            total += int(line * PERIOD)
        now += PERIOD
    fair, slack = min(rate, line) * seconds, rate * BURST + 2 * line * PERIOD
    assert total <= fair + slack
    assert total >= 0.9 * fair - slack - 2 * line * PERIOD


def test_without_a_limit_everything_passes() -> None:
    allowance = Allowance(0)
    assert all(allowance.allows(total * 10**9, total) for total in range(10))


def test_a_machine_that_began_anew_is_counted_from_there() -> None:
    allowance = Allowance(1000)
    allowance.allows(10**6, 0.0)
    assert allowance.allows(100, 1.0)
    assert not allowance.allows(10_000, 1.0)


@pytest.mark.parametrize(("up", "down", "allowed"), [(0, 0, True), (10, 0, False), (0, 10, False)])
def test_the_cable_is_pulled_when_either_way_is_used_up(up: int, down: int,
                                                        allowed: bool) -> None:
    preferences = replace(GlobalPreferences(), max_bytes_sec_up=up, max_bytes_sec_down=down)
    gate = Gate(preferences)
    assert gate.limited is not allowed
    gate.allows(0, 0, 0.0)
    assert gate.allows(1000, 1000, 1.0) is allowed
    assert gate.allows(1000, 1000, 1000.0)
    assert not Gate(None).limited
