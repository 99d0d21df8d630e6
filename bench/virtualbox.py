"""Machines on VirtualBox, where there is one: starts, standing still, checkpoints, commands.

With its kernel driver where that is there (``hm``), else in its interpreter: the figures' names say
which, as nothing of one is true of the other.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from unittest import mock

import vmjob
from bench.starts import MEMORY
from vmjob.errors import ProgramMissing
from vmjob.home import Home
from vmjob.machine.virtualbox import device, programs
from vmjob.machine.virtualbox.driver import VirtualBoxMachine

#: Bytes put and got: seconds in the interpreter.
PIECE = 2 << 20


async def figures(home: Home, runs: int) -> dict[str, float]:
    """Seconds, and MB/s; nothing where there is no VirtualBox.

    The first machine of this shape boots and is frozen, which takes minutes in the interpreter.
    """
    try:
        programs.find()
    except ProgramMissing:
        return {}
    accel = "interpreter" if device.why_not() else "hm"
    times: dict[str, list[float]] = {}

    async def timed(name: str, action: Callable[[], Awaitable[object]]) -> None:
        began = time.perf_counter()
        await action()
        times.setdefault(name, []).append(time.perf_counter() - began)

    started: list[float] = []
    real = VirtualBoxMachine.start

    async def start(self: VirtualBoxMachine) -> object:
        began = time.perf_counter()
        lanes = await real(self)
        started.append(time.perf_counter() - began)
        return lanes

    with (mock.patch.object(VirtualBoxMachine, "start", start),
          tempfile.TemporaryDirectory(dir=home.cache) as name):
        place = Path(name)
        (place / "piece").write_bytes(os.urandom(PIECE))
        for number in range(runs):
            slot = place / f"slot-{number}"
            async with vmjob.AsyncMachine.create(
                    memory_mb=MEMORY, network="nat", hypervisor="virtualbox", accel=accel,
                    slot=slot, home=home.root) as machine:
                session = machine._session  # noqa: SLF001 - the API has no use for this moment
                assert session is not None
                times.setdefault("until its agent has answered", []).append(
                    time.monotonic() - session.started)
                times.setdefault("a copy, from the start until it runs", []).append(started[-1])
                await timed("ping", machine.ping)
                await timed("true", partial(machine.run, ["true"]))
                await timed("python3 -c", partial(
                    machine.run, ["python3", "-c", "pass"]))
                await timed("suspend", machine.suspend)
                await timed("resume", machine.resume)
                await timed("checkpoint", machine.checkpoint)
                await timed("put", partial(machine.put, place / "piece", "piece"))
                (place / "got").unlink(missing_ok=True)
                await timed("get", partial(machine.get, "piece", place / "got"))
    found = {f"VirtualBox {accel}: {what} s": statistics.median(each)
             for what, each in times.items()}
    for what in ("put", "get"):
        found[f"VirtualBox {accel}: {what} MB/s"] = (
            PIECE / 1e6 / found.pop(f"VirtualBox {accel}: {what} s"))
    return found
