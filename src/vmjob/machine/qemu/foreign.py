"""Disks that a user brings: looked at before QEMU opens them.

An image can name other files (a backing file, a file for its data, extents), which QEMU would open
with this user's rights and show to the guest; tools that guess a format open them as well. So the
format is told here, from the first bytes, and given to QEMU; what names other files is refused.
"""

from __future__ import annotations

import json
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmjob.errors import DiskUnusable, MachineStartFailed, UsageError
from vmjob.machine.contract import Attached, Foreign
from vmjob.machine.disks import HEAD, VDI, VDI_AT, format_of
from vmjob.machine.qemu import programs

__all__ = ["Disk", "Media", "is_vdi", "look_at", "look_at_attached", "size_of"]

SECTOR = 512
#: Seconds for qemu-img to read a header: milliseconds, unless the disk is overloaded.
DEADLINE = 30.0


@dataclass(frozen=True)
class Disk:
    """An image that can be opened; ``size`` in bytes, as the guest sees it."""

    path: Path
    format: str
    size: int


@dataclass(frozen=True)
class Media:
    """What a machine boots from, and what else is in it."""

    disk: Disk | None
    cache: Disk | None
    iso: Disk | None
    iso_first: bool


def is_vdi(path: Path) -> bool:
    """Whether an image is of VirtualBox's own format."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return head[VDI_AT:VDI_AT + len(VDI)] == VDI


def size_of(told: str, kind: str) -> int:
    """The guest's size of an image, from what ``qemu-img info`` says; raises `DiskUnusable`."""
    try:
        facts = json.loads(told)
        size, found = int(facts["virtual-size"]), facts["format"]
        other = facts.get("backing-filename") or facts.get("encrypted") or (
            facts.get("format-specific", {}).get("data", {}).get("data-file"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DiskUnusable("is not understood by qemu-img") from None
    if found != kind or other or size <= 0:
        raise DiskUnusable("is not what its first bytes say")
    return -(-size // SECTOR) * SECTOR


def look_at(foreign: Foreign) -> Media:
    """What a machine is to be made of; blocks. Raises `DiskUnusable`, `UsageError`."""
    if foreign.disk is None and foreign.iso is None:
        raise UsageError("there is neither a disk nor a CD to boot from")
    return Media(None if foreign.disk is None else _look_at_disk(foreign.disk),
                 None if foreign.cache_disk is None else _look_at_disk(foreign.cache_disk),
                 None if foreign.iso is None else _look_at_cd(foreign.iso), foreign.iso_first)


def look_at_attached(attached: Attached) -> dict[str, Disk]:
    """What a machine is to have besides, by the fields' names; blocks. Raises `DiskUnusable`."""
    return {part: _look_at_cd(path) if part == "iso" else _look_at_disk(path)
            for part, path in attached.parts().items()}


def _look_at_cd(given: Path) -> Disk:
    found = _look_at_disk(given)
    if found.format != "raw":
        raise DiskUnusable(f"{found.path} is no image of a CD")
    return found


def _look_at_disk(given: Path) -> Disk:
    """One disk; blocks. Raises `DiskUnusable`."""
    path = given.absolute()  # begins with "/": QEMU takes "nbd:x" for more than a name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DiskUnusable("is not a file")
        with path.open("rb") as file:
            kind = format_of(file.read(HEAD))
        return Disk(path, kind, _ask(path, kind))
    except OSError as error:
        raise DiskUnusable(f"{path} cannot be read: {error.strerror}") from error
    except DiskUnusable as error:
        raise DiskUnusable(f"{path} {error.message}") from None


def _ask(path: Path, kind: str) -> int:
    command = [programs.find("qemu-img"), "info", "--output=json", "-f", kind, str(path)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", timeout=DEADLINE, check=False)
    except subprocess.TimeoutExpired as error:
        raise MachineStartFailed(f"qemu-img takes too long to look at {path}") from error
    if done.returncode != 0:
        raise DiskUnusable(f"cannot be read by qemu-img: {done.stderr.strip()[-200:]}")
    return size_of(done.stdout, kind)
