"""The project's measuring stick: ``script/bench`` runs it, in one go, on one computer.

Every figure is measured in this run and given as a ratio to what it is compared with in the same
run; absolute times drift with the computer. Writes JSON and a table to ``bench/results``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from vmjob.engine.session import open_session
from vmjob.guest.client import SHORT_COMMAND
from vmjob.home import Home
from vmjob.image.initrd import Entry, newc
from vmjob.image.recipe import Recipe
from vmjob.image.store import Image, ImageStore
from vmjob.machine.contract import BootParts, MachineSpec
from vmjob.machine.qemu import argv, programs
from vmjob.machine.qemu.driver import QemuDriver

VMJOB = str(Path(sys.executable).with_name("vmjob"))
MEMORY = 256


def timed(command: list[str], *, until: bytes | None = None, **more: Any) -> float:
    """Seconds until a command ends, or until it has printed ``until``."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, **more)
    with process:
        assert process.stdout is not None
        if until is None:
            process.stdout.read()
            process.wait()
        else:
            while until not in (line := process.stdout.readline()):
                if not line:
                    raise RuntimeError(f"{command[0]} ended without {until!r}")
        return time.perf_counter() - began


def median(measure: Callable[[], float], runs: int) -> float:
    return statistics.median(measure() for _ in range(runs))


def from_archive(archive: bytes, wanted: str) -> bytes:
    """One file of a newc archive."""
    at = 0
    while True:
        fields = [int(archive[at + 6 + 8 * n:at + 14 + 8 * n], 16) for n in range(13)]
        name = archive[at + 110:at + 110 + fields[11] - 1].decode()
        start = at + (110 + fields[11] + 3) // 4 * 4
        if name == wanted:
            return archive[start:start + fields[6]]
        at = start + (fields[6] + 3) // 4 * 4


def bare_boot(image: Image, place: Path) -> list[str]:
    """QEMU with the same kernel and size, to a busybox init that powers off."""
    source = place / "initrd"
    busybox = from_archive(image.initrd.read_bytes(), "bin/busybox")
    init = b"#!/bin/busybox sh\n/bin/busybox poweroff -f\n"
    source.write_bytes(newc([
        *(Entry(name, 0o40755) for name in ("bin", "dev", "proc")),
        Entry("dev/console", 0o20600, device=(5, 1)),
        Entry("bin/busybox", 0o100755, busybox),
        Entry("init", 0o100755, init)]))
    return [programs.find(programs.system_binary()), "-machine", "q35", "-accel",
            "tcg,thread=multi", "-cpu", "max", "-m", str(MEMORY), "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel",
            str(image.kernel), "-initrd", str(source), "-append", "console=ttyS0 quiet panic=-1"]


async def inside(home: Home, image: Image, runs: int, size: int, place: Path) -> dict[str, Any]:
    """What is measured on one running machine."""
    shape = MachineSpec(id="", directory=home.root, memory_mb=MEMORY, accelerator="tcg",
                        boot=BootParts.of(image))
    found: dict[str, Any] = {}
    async with open_session(home, QemuDriver(), shape) as session:
        client = session.client

        async def drop(stream: str, data: bytes) -> None: ...

        async def run(*command: str) -> None:
            task = await client.start(list(command), wait=SHORT_COMMAND)
            await client.follow(task, drop)
            client.forget(task)

        for name, command in (("exec", ("true",)), ("exec python", ("python3", "-c", "pass"))):
            await run(*command)
            times = []
            for _ in range(runs * 10):
                began = time.perf_counter()
                await run(*command)
                times.append(time.perf_counter() - began)
            found[f"{name} ms"] = statistics.median(times) * 1000
        times = []
        for _ in range(100):
            began = time.perf_counter()
            await client.ping()
            times.append(time.perf_counter() - began)
        found["ping ms"] = statistics.median(times) * 1000

        block = os.urandom(1 << 20)
        big = place / "big"
        with big.open("wb") as file:
            for _ in range(size):
                file.write(block)
        began = time.perf_counter()
        await client.put(big, "big")
        found["put MB/s"] = size * (1 << 20) / 1e6 / (time.perf_counter() - began)
        big.unlink()
        began = time.perf_counter()
        await client.get("big", big, limit=1 << 40)
        found["get MB/s"] = size * (1 << 20) / 1e6 / (time.perf_counter() - began)
        big.unlink()
        await client.delete("big")

        me = psutil.Process()
        task = await client.start(["sleep", "20"])
        before = me.cpu_times()
        await client.follow(task, drop)
        after = me.cpu_times()
        found["own CPU of a silent job %"] = 100 * (
            after.user + after.system - before.user - before.system) / 20
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


def peers(runs: int) -> dict[str, float]:
    """Seconds for one command in what is installed of the others; none is installed for this."""
    found = {}
    if shutil.which("vng"):
        found["virtme-ng"] = median(
            lambda: timed(["vng", "--disable-kvm", "--memory", f"{MEMORY}M", "--", "true"]), runs)
    script = ("import asyncio, quicksand\n"
              "async def main():\n"
              "  async with await quicksand.Sandbox.create(accel='tcg') as s:\n"
              "    await s.execute('true')\n"
              "asyncio.run(main())\n")
    if subprocess.run([sys.executable, "-c", "import quicksand"], capture_output=True,
                      check=False).returncode == 0:
        found["quicksand"] = median(lambda: timed([sys.executable, "-c", script]), runs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each (median is given)")
    parser.add_argument("--size", type=int, default=1024, help="size of the file put and got, MiB")
    options = parser.parse_args()
    home = Home()
    store = ImageStore(home)
    store.ensure(Recipe(), lambda fraction, text: None)
    image = store.verified("default")
    runs = options.runs
    with tempfile.TemporaryDirectory(dir=home.cache) as name:
        place = Path(name)
        bare = bare_boot(image, place)
        cold = [VMJOB, "run", "--memory", str(MEMORY), "--accel", "tcg", "--", "echo", "first"]
        timed(cold)
        boots, colds = [], []
        for _ in range(runs):  # in turn, so that a drift of the computer's speed meets both
            boots.append(timed(bare))
            colds.append(timed(cold, until=b"first"))
        figures: dict[str, Any] = {
            "bare QEMU boot s": statistics.median(boots),
            "cold: start to first byte s": statistics.median(colds),
            "cold / bare QEMU": statistics.median(c / b for c, b in zip(colds, boots, strict=True)),
        }
        python = median(lambda: timed([sys.executable, "-c", "pass"]), 4 * runs)
        help_ = median(lambda: timed([VMJOB, "--help"]), 4 * runs)
        figures["--help / python -c pass"] = help_ / python
        figures |= asyncio.run(inside(home, image, runs, options.size, place))
        figures["host memory of 1 put and get MB"] = host_memory(home, place, options.size)
        for peer, seconds in peers(max(1, runs // 2)).items():
            figures[f"{peer}: one command s"] = seconds
            figures[f"cold / {peer}"] = statistics.median(colds) / seconds
    report = {"figures": figures, "runs": runs, "size_mib": options.size,
              "qemu": programs.version(programs.find(programs.system_binary())),
              "kernel": image.manifest.kernel_version, "machine_type": argv.MACHINE,
              "cpu_model": argv.CPU_MODELS["tcg"], "host": platform.platform(),
              "host_cpus": os.cpu_count(), "python": platform.python_version()}
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = [f"| {name} | {value:.3g} |" for name, value in figures.items()]
    table = "\n".join(["| figure | median |", "| --- | --- |", *rows])
    (results / "bench.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
