"""What is measured on a running machine: commands, transfers, idling."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

import vmjob
from bench.starts import MEMORY
from vmjob.home import Home
from vmjob.machine.qemu.driver import QemuMachine

#: Seconds for which idle machines are watched.
WATCHED = 20.0


async def repeated(action: Callable[[], Awaitable[object]], count: int) -> float:
    """Median milliseconds."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        await action()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


async def one_machine(home: Home, place: Path, runs: int, size: int) -> dict[str, float]:
    """Commands and transfers, ``size`` in MiB."""
    found: dict[str, float] = {}
    async with vmjob.AsyncMachine.create(memory_mb=MEMORY, accel="tcg", home=home.root) as machine:
        for name, command in (("exec", ["true"]), ("exec python", ["python3", "-c", "pass"])):
            run = functools.partial(machine.run, command)
            await repeated(run, 5)
            found[f"{name} ms"] = await repeated(run, runs * 10)
        found["ping ms"] = await repeated(machine.ping, 100)
        big = place / "big"
        block = os.urandom(1 << 20)
        with big.open("wb") as file:
            for _ in range(size):
                file.write(block)
        began = time.perf_counter()
        await machine.put(big, "big")
        found["put MB/s"] = size * (1 << 20) / 1e6 / (time.perf_counter() - began)
        big.unlink()
        began = time.perf_counter()
        await machine.get("big", big)
        found["get MB/s"] = size * (1 << 20) / 1e6 / (time.perf_counter() - began)
        big.unlink()
        await machine.delete("big")
        me = psutil.Process()
        running = asyncio.ensure_future(machine.run(["sleep", str(WATCHED)]))
        await asyncio.sleep(0.5)
        before = me.cpu_times()
        await running
        after = me.cpu_times()
        found["own CPU of a silent job %"] = max(0.0, 100 * (
            after.user + after.system - before.user - before.system) / WATCHED)
    return found


def host_memory(home: Home, place: Path, size: int) -> float:
    """Peak memory of a process that puts and gets a large file, MB (its own, QEMU's not)."""
    # VmHWM: ru_maxrss would be that of this process, which starts the other by vfork.
    script = ("import sys, vmjob; from pathlib import Path\n"
              "with vmjob.Machine.create(memory_mb=256, accel='tcg', home=sys.argv[1]) as m:\n"
              "  m.put(sys.argv[2], 'big'); m.get('big', sys.argv[2] + '2')\n"
              "status = Path('/proc/self/status').read_text()\n"
              "print(int(status.partition('VmHWM:')[2].split()[0]) / 1024)\n")
    big = place / "large"
    with big.open("wb") as file:
        for _ in range(size):
            file.write(os.urandom(1 << 20))
    done = subprocess.run([sys.executable, "-c", script, str(home.root), str(big)],
                          capture_output=True, text=True, check=True)
    big.unlink()
    Path(f"{big}2").unlink()
    return float(done.stdout)


def private_mb(pid: int) -> float:
    """Memory that belongs to one process alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def process_of(machine: vmjob.AsyncMachine) -> int:
    """Pid of the QEMU that is the machine."""
    session = machine._session  # noqa: SLF001 - the API has no use for it
    assert session is not None
    assert isinstance(session.machine, QemuMachine)
    assert session.machine.pid is not None
    return session.machine.pid


async def many_machines(home: Home, count: int, memory: int) -> dict[str, float]:
    """Start them one after another, keep them, look at what they cost."""
    found: dict[str, float] = {}
    async with vmjob.AsyncMachine.create(memory_mb=memory, accel="tcg", home=home.root):
        pass  # its template is there now
    async with contextlib.AsyncExitStack() as stack:
        machines, times = [], []
        for _ in range(count):
            began = time.perf_counter()
            machines.append(await stack.enter_async_context(vmjob.AsyncMachine.create(
                memory_mb=memory, accel="tcg", home=home.root)))
            times.append(time.perf_counter() - began)
        pids = [process_of(machine) for machine in machines]
        found[f"{count} machines: private MB each, started"] = statistics.median(
            map(private_mb, pids))
        tenth = max(1, count // 10)
        found[f"{count} machines: last tenth / first tenth to start"] = (
            statistics.median(times[-tenth:]) / statistics.median(times[:tenth]))
        await asyncio.sleep(2)
        processes = [psutil.Process(pid) for pid in pids]

        def spent() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in processes)

        before = spent()
        await asyncio.sleep(WATCHED)
        found[f"{count} machines: CPU of all together, idle %"] = 100 * (spent() - before) / WATCHED
        results = await asyncio.gather(*(machine.run(["true"]) for machine in machines))
        found[f"{count} machines: that answer"] = sum(each.exit_code == 0 for each in results)
        found[f"{count} machines: private MB each, after a command"] = statistics.median(
            map(private_mb, pids))
    return found
