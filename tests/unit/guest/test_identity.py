"""What the agent does to a machine before it is frozen, as far as it can be computed."""

from __future__ import annotations

import pytest

from vmjob.guest.agent.identity import LEFT_FREE, left_free

MIB = 1 << 20


@pytest.mark.parametrize(("memory_mb", "least_kb", "reserved_mb"), [
    (128, 1400, 0.5), (256, 2000, 1), (512, 2800, 2), (1024, 4000, 4), (2048, 5700, 8),
    (8192, 11500, 32)])
def test_clearing_memory_stops_before_the_kernel_gives_up_anything_else(
        memory_mb: int, least_kb: int, reserved_mb: float) -> None:
    """Least: 4 times the root of the memory in KiB; where it begins: Linux, mm/page_alloc.c."""
    left = left_free(memory_mb * MIB, least_kb * 1024)
    assert left > 1.5 * least_kb * 1024 + reserved_mb * MIB
    assert LEFT_FREE <= left < memory_mb * MIB / 16
