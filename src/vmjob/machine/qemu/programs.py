"""Finding QEMU's programs and knowing their version."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from vmjob.errors import ProgramMissing, QemuTooOld
from vmjob.host.standstill import run_tool

__all__ = ["OLDEST", "VARIABLE", "find", "identity", "parse_version", "system_binary", "version"]

#: The oldest QEMU this driver was run with; older ones lack options that it gives.
OLDEST = (7, 2)
#: Seconds for a program to print its version.
DEADLINE = 10.0

#: A directory with QEMU's programs in ``bin/``: the bundle for volunteers, or one's own build.
VARIABLE = "VMJOB_QEMU"

PACKAGES = {"qemu-img": "qemu-utils", "setpriv": "util-linux"}


def system_binary() -> str:
    """The emulator's name for this computer's kind of processor."""
    machine = platform.machine().lower()
    return f"qemu-system-{'x86_64' if machine in ('x86_64', 'amd64') else machine}"


def find(name: str) -> str:
    """Path of a program; raises `ProgramMissing` with the package that has it.

    QEMU's own are those of ``$VMJOB_QEMU`` when it is set, and never a mixture: qemu-img must know
    what the emulator reads.
    """
    if name.startswith("qemu-") and (given := os.environ.get(VARIABLE)):
        path = Path(given).absolute() / "bin" / name
        if not os.access(path, os.X_OK):
            raise ProgramMissing(f"{VARIABLE} is {given}, and there is no program {path}",
                                 advice=f"Unset {VARIABLE}, or set it to the directory above bin.",
                                 program=name)
        return str(path)
    if found := shutil.which(name):
        return found
    package = PACKAGES.get(name, "qemu-system-x86" if name.startswith("qemu-system") else name)
    raise ProgramMissing(f"the program {name} is not installed",
                         advice=f"Install it, on Debian and Ubuntu: apt install {package}",
                         program=name, package=package)


def parse_version(text: str) -> tuple[int, ...] | None:
    """``QEMU emulator version 7.2.22 (...)`` -> (7, 2, 22)."""
    found = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in found.groups(default="0")) if found else None


def identity(binary: str) -> str:
    """What changes when a program is upgraded; asking it for its version takes 30 ms."""
    facts = Path(binary).stat()
    return f"{binary}:{facts.st_size}:{facts.st_mtime_ns}"


@functools.cache
def version(binary: str) -> str:
    """Version of a QEMU program, as ``7.2.22``; raises `QemuTooOld`."""
    try:
        text = run_tool([binary, "--version"], DEADLINE, text=True).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramMissing(f"{binary} does not run: {error}") from error
    numbers = parse_version(text)
    if numbers is None:
        raise ProgramMissing(f"{binary} does not say its version")
    shown = ".".join(map(str, numbers))
    if numbers < OLDEST:
        raise QemuTooOld(f"QEMU {shown} is older than {'.'.join(map(str, OLDEST))}",
                         found=shown)
    return shown
