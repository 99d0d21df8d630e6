"""What surviving costs: checkpoints, restores, suspending; and what a busy machine costs others."""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import vmjob
from bench.starts import MEMORY, from_archive
from vmjob.home import Home
from vmjob.image.initrd import Entry, newc
from vmjob.image.store import Image
from vmjob.machine.qemu import argv, programs

#: What a job touches between two checkpoints, MiB.
TOUCHED = 20
#: Seconds between two checkpoints that a volunteer's job makes.
INTERVAL = 60.0
#: Rounds of the guest's busy loop: some seconds under TCG.
ROUNDS = 500_000

TOUCHING = f"""
import os, time
held = bytearray({TOUCHED} << 20)
for number in range(1000):
    while not os.path.exists(f"go{{number}}"):
        time.sleep(0.05)
    for at in range(0, len(held), 4096):
        held[at] = number & 255
    open(f"done{{number}}", "w").close()
"""
BUSY = f"i=0; while [ $i -lt {ROUNDS} ]; do i=$((i+1)); done"
#: A program of the host that computes, and one that waits for short times; what they print.
COMPUTING = """
import time
began = time.perf_counter()
x = 0
for i in range(12_000_000): x += i * i
print(time.perf_counter() - began)
"""
WAKING = """
import time
late = []
for _ in range(1500):
    began = time.perf_counter()
    time.sleep(0.003)
    late.append(time.perf_counter() - began - 0.003)
print(sorted(late)[int(len(late) * 0.99)] * 1000)
"""


async def checkpoints(home: Home, place: Path, runs: int) -> dict[str, float]:
    """Of a machine whose job touches memory between them; then restores of it."""
    slot = place / "slot"
    kept, took = [], []
    async with vmjob.AsyncMachine.create(memory_mb=MEMORY, accel="tcg", home=home.root,
                                         slot=slot) as machine:
        await machine.start(["python3", "-c", TOUCHING])
        for number in range(runs + 1):
            await machine.mkdir(f"go{number}")
            await machine.run(["sh", "-c", f"while [ ! -e done{number} ]; do sleep 0.05; done"])
            began = time.perf_counter()
            kept.append(await machine.checkpoint())
            took.append(time.perf_counter() - began)
        suspends, resumes = [], []
        for _ in range(5 * runs):
            began = time.perf_counter()
            await machine.suspend()
            suspends.append(time.perf_counter() - began)
            began = time.perf_counter()
            await machine.resume()
            resumes.append(time.perf_counter() - began)
    restores = []
    for _ in range(runs):
        began = time.perf_counter()
        async with vmjob.AsyncMachine.restore(slot, home=home.root):  # its agent has answered
            restores.append(time.perf_counter() - began)
    shutil.rmtree(slot)
    later = kept[1:]  # the first one holds all since the template
    return {
        "checkpoint: guest stands still ms": statistics.median(
            each.still_seconds for each in later) * 1000,
        "checkpoint: guest stands still, longest ms": max(
            each.still_seconds for each in later) * 1000,
        f"checkpoint: written, {TOUCHED} MiB touched MB": statistics.median(
            each.written_bytes for each in later) / 1e6,
        "checkpoint: first one, written MB": kept[0].written_bytes / 1e6,
        "checkpoint: seconds until safe s": statistics.median(took[1:]),
        "restore to first answer s": statistics.median(restores),
        "suspend ms": statistics.median(suspends) * 1000,
        "resume, clock set ms": statistics.median(resumes) * 1000,
    }


async def slowdown(home: Home, place: Path, runs: int) -> dict[str, float]:
    """Of a job that only computes: run times with many checkpoints and without, in turn."""
    slot = place / "slot"
    with_them, without, made = [], [], 0
    async with vmjob.AsyncMachine.create(memory_mb=MEMORY, accel="tcg", home=home.root,
                                         slot=slot) as machine:
        for _ in range(runs):
            without.append((await machine.run(["sh", "-c", BUSY])).end.wall_seconds)
            running = asyncio.ensure_future(machine.run(["sh", "-c", BUSY]))
            while not running.done():
                await machine.checkpoint()
                made += 1
                await asyncio.wait([running], timeout=2.0)
            with_them.append(running.result().end.wall_seconds)
    shutil.rmtree(slot)
    each = (sum(with_them) - sum(without)) / made
    return {"checkpoint: costs a computing job s": each,
            f"slowdown with one every {INTERVAL:g} s %": 100 * each / INTERVAL}


async def against_bare(home: Home, image: Image, place: Path, runs: int) -> dict[str, float]:
    """CPU seconds of a job by its own count, against QEMU started by hand, in turn."""
    busybox = from_archive(image.initrd.read_bytes(), "bin/busybox")
    (place / "busybox").write_bytes(busybox)
    (place / "busybox").chmod(0o755)
    source = place / "busy-initrd"
    script = (f"#!/bin/busybox sh\n/bin/busybox mount -t proc proc /proc\n{BUSY}\n"
              "/bin/busybox cat /proc/1/stat\n/bin/busybox poweroff -f\n")
    source.write_bytes(newc([
        *(Entry(name, 0o40755) for name in ("bin", "dev", "proc")),
        Entry("dev/console", 0o20600, device=(5, 1)), Entry("bin/busybox", 0o100755, busybox),
        Entry("init", 0o100755, script.encode())]))
    command = [programs.find(programs.system_binary()), "-machine", "q35", "-accel",
               "tcg,thread=multi", "-cpu", argv.CPU_MODELS["tcg"], "-m", str(MEMORY),
               "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
               "-serial", "stdio", "-kernel", str(image.kernel), "-initrd", str(source),
               "-append", "console=ttyS0 quiet panic=-1 mitigations=off norandmaps"]
    ours, bare = [], []
    async with vmjob.AsyncMachine.create(memory_mb=MEMORY, accel="tcg", home=home.root) as machine:
        await machine.put(place / "busybox", "busybox")
        for _ in range(runs):
            done = await machine.run(["./busybox", "sh", "-c", BUSY])
            ours.append(done.end.rusage["ru_utime"] + done.end.rusage["ru_stime"])
            said = await asyncio.to_thread(
                subprocess.run, command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
            fields = said.stdout.decode().split("(init)")[1].split()
            bare.append((int(fields[11]) + int(fields[12])) / 100)  # user and system, in ticks
    return {"job CPU time / bare QEMU": statistics.median(ours) / statistics.median(bare)}


async def intrusion(home: Home, runs: int) -> dict[str, float]:
    """What other programs of this computer notice of a machine that is busy on every core."""
    quiet: dict[str, list[float]] = {"computing": [], "waking": []}
    busy: dict[str, list[float]] = {"computing": [], "waking": []}
    cores = os.cpu_count() or 1
    async with vmjob.AsyncMachine.create(memory_mb=MEMORY, cpus=cores, accel="tcg",
                                         home=home.root) as machine:
        tasks = [await machine.start(["sh", "-c", "while :; do :; done"]) for _ in range(cores)]
        for _ in range(runs):
            for name, program in (("computing", COMPUTING), ("waking", WAKING)):
                await machine.suspend()
                quiet[name].append(await _printed(program))
                await machine.resume()
                busy[name].append(await _printed(program))
        for task in tasks:
            await machine.stop(task, number=9)
    slower = statistics.median(busy["computing"]) / statistics.median(quiet["computing"])
    return {"intrusion: host program slowed %": 100 * (slower - 1),
            "intrusion: p99 wake-up, idle host ms": statistics.median(quiet["waking"]),
            "intrusion: p99 wake-up, busy machine ms": statistics.median(busy["waking"])}


async def _printed(program: str) -> float:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program,
                                                   stdout=subprocess.PIPE)
    said, _ = await process.communicate()
    return float(said)
