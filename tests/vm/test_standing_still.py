"""Machines that stand still, now and then or often: no byte, limit or clock suffers."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import psutil
import pytest

from tests.clocks import Clocks
from vmjob.engine.session import open_session
from vmjob.guest.client import Stream
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec, Priority
from vmjob.machine.qemu.driver import QemuDriver

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

#: Seconds of each part of the throttling, and how often.
ON = OFF = 0.2
TIMES = 12
TICKS = "import time\nfor n in range(30):\n print(n, flush=True)\n time.sleep(0.1)\n"


async def test_throttling_breaks_no_stream_timer_or_clock(vm_home: Home, vm_shape: MachineSpec,
                                                          clocks: Clocks) -> None:
    async with open_session(vm_home, QemuDriver(), vm_shape) as session:
        client = session.client
        got = b""

        async def take(stream: Stream, data: bytes) -> None:
            nonlocal got
            got += data

        task = await client.start(["python3", "-c", TICKS])

        async def throttle() -> None:
            for _ in range(TIMES):
                await session.suspend()
                await anyio.sleep(OFF)  # this is what the test is about
                await session.resume()
                await anyio.sleep(ON)

        began = time.monotonic()
        async with anyio.create_task_group() as group:
            group.start_soon(throttle)
            end = await client.follow(task, take)
        assert got.split() == [b"%d" % n for n in range(30)]
        stood = OFF * TIMES
        assert time.monotonic() - began > stood
        assert end.wall_seconds < time.monotonic() - began - stood * 0.9, "still time counted"
        assert await clocks.wrong(client) < 0.1


async def test_the_time_of_day_is_right_after_a_long_stand(vm_home: Home, vm_shape: MachineSpec,
                                                           clocks: Clocks) -> None:
    async with open_session(vm_home, QemuDriver(), vm_shape) as session:
        assert isinstance(session.machine.pid, int)  # type: ignore[attr-defined]
        qemu = psutil.Process(session.machine.pid)  # type: ignore[attr-defined]
        await session.suspend()
        used = qemu.cpu_times()
        await anyio.sleep(1.5)
        assert sum(qemu.cpu_times()[:2]) - sum(used[:2]) <= 0.05
        await session.resume()
        assert await clocks.wrong(session.client) < 0.1


async def test_a_machine_has_low_priority_until_it_is_given_more(vm_home: Home,
                                                                 vm_shape: MachineSpec) -> None:
    import os

    async with open_session(vm_home, QemuDriver(), vm_shape) as session:
        pid = session.machine.pid  # type: ignore[attr-defined]

        def idle() -> int:
            return sum(os.sched_getscheduler(int(thread.name)) == os.SCHED_IDLE
                       for thread in Path(f"/proc/{pid}/task").iterdir())

        assert idle() == vm_shape.cpus
        await session.machine.set_priority(Priority.NORMAL)
        assert idle() == 0
        await session.client.ping()
