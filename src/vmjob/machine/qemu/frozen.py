"""A frozen machine on disk, and what a copy of it opens.

    memory          the guest's memory, sparse; copies map it privately (copy on write)
    devices         the state of all devices, as QEMU's migration wrote it
    overlay.qcow2   what the machine had written to its disk; lies below the disks of its copies
    blank.qcow2     an empty disk to lie above it, copied for each machine: making one with qemu-img
                    takes as long as starting QEMU

QEMU is given open descriptors (``/proc/self/fd/N``): it would create a missing memory file, empty
and without a word (measured with 7.2).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmjob.errors import HostDiskFull, MachineStartFailed, TemplateUnusable
from vmjob.host.standstill import run_tool
from vmjob.machine.qemu import argv, programs
from vmjob.machine.qemu.argv import MEMORY_FILE as MEMORY

__all__ = ["BLANK", "DEVICES", "FILES", "MEMORY", "OVERLAY", "Opened", "copy_blank",
           "dig_holes", "make_disk", "opened"]

DEVICES = "devices"
OVERLAY = "overlay.qcow2"
BLANK = "blank.qcow2"
FILES = [MEMORY, DEVICES, OVERLAY, BLANK]

#: Seconds for qemu-img and fallocate: milliseconds, unless the disk is overloaded.
TOOL_DEADLINE = 60.0


@dataclass(frozen=True)
class Opened:
    """Descriptors of a template's files."""

    memory: int
    devices: int
    layers: tuple[int, ...]


@contextlib.contextmanager
def opened(template: Path, memory_mb: int) -> Iterator[Opened]:
    """Open a template's files for QEMU to inherit; raises `TemplateUnusable`."""
    with contextlib.ExitStack() as stack:

        def take(name: str) -> int:
            try:
                fd = os.open(template / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError as error:
                raise TemplateUnusable(f"a template's {name} cannot be opened: "
                                       f"{error.strerror}") from error
            stack.callback(os.close, fd)
            return fd

        found = Opened(take(MEMORY), take(DEVICES), (take(OVERLAY),))
        if os.fstat(found.memory).st_size != memory_mb << 20:
            raise TemplateUnusable("a template's memory has another size than its machine's")
        yield found


def make_disk(path: Path, size: int) -> None:
    """Make an empty overlay of so many bytes; raises `HostDiskFull`, `MachineStartFailed`."""
    command = argv.overlay_command(programs.find("qemu-img"), path, size)
    try:
        done = run_tool(command, TOOL_DEADLINE, text=True, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineStartFailed(f"cannot make the machine's disk: {error}") from error
    if done.returncode != 0:
        text = done.stderr.strip()
        if "No space left" in text:
            raise HostDiskFull(f"no room for a machine's disk: {text}")
        raise MachineStartFailed(f"cannot make the machine's disk: {text}")


def copy_blank(template: Path, overlay: Path) -> None:
    """Make the disk of one copy."""
    try:
        shutil.copyfile(template / BLANK, overlay)
    except FileNotFoundError as error:
        raise TemplateUnusable(f"a template's {BLANK} cannot be opened: "
                               f"{error.strerror}") from error
    except OSError as error:
        raise HostDiskFull(f"no room for a machine's disk: {error.strerror}") from error


def dig_holes(memory: Path) -> None:
    """Give back the disk blocks of zero pages; without the tool the file is just larger."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        run_tool(["fallocate", "--dig-holes", str(memory)], TOOL_DEADLINE)
