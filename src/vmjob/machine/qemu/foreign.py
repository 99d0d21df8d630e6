"""Disks that a user brings: looked at before QEMU opens them.

An image can name other files (a backing file, a file for its data, extents), which QEMU would open
with this user's rights and show to the guest; tools that guess a format open them as well. So the
format is told here, from the first bytes, and given to QEMU; what names other files is refused.
"""

from __future__ import annotations

import json
import stat
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmjob.errors import DiskUnusable, MachineStartFailed, UsageError
from vmjob.machine.contract import Foreign
from vmjob.machine.qemu import programs

__all__ = ["Disk", "Media", "format_of", "is_vdi", "look_at", "size_of"]

#: Bytes that tell a format.
HEAD = 512
SECTOR = 512
#: Seconds for qemu-img to read a header: milliseconds, unless the disk is overloaded.
DEADLINE = 30.0

QCOW2, VDI = b"QFI\xfb", b"\x7f\x10\xda\xbe"
#: Where VDI has its mark (VirtualBox, ``VDICore.h``); qcow2 begins with its own.
VDI_AT = 64
#: Formats that are not taken: they can name other files, or nobody has asked for them.
REFUSED = {b"KDMV": "VMDK", b"COWD": "VMDK", b"# Disk Desc": "VMDK", b"vhdxfile": "VHDX",
           b"conectix": "VHD", b"QED\0": "QED", b"LUKS\xba\xbe": "LUKS", b"WithoutFreeSpace": "HDD",
           b"WithouFreSpacExt": "HDD", b"Bochs Virtual HD": "Bochs"}
#: Features of qcow2 that a reader must know (QEMU, ``docs/interop/qcow2.txt``): left dirty,
#: compression type, extended entries. Not: corrupt (2), data in another file (4).
KNOWN_FEATURES = 1 | 8 | 16


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


def format_of(head: bytes) -> str:
    """The format of an image that begins so: ``qcow2``, ``vdi`` or ``raw``.

    Raises `DiskUnusable` for other formats, and for what names other files or is encrypted.
    """
    if head.startswith(QCOW2):
        _check_qcow2(head)
        return "qcow2"
    if head[VDI_AT:VDI_AT + len(VDI)] == VDI:
        return "vdi"
    for mark, name in REFUSED.items():
        if head.startswith(mark):
            raise DiskUnusable(f"is a {name} image")
    return "raw"


def _check_qcow2(head: bytes) -> None:
    try:
        version, backing = struct.unpack_from(">IQ", head, 4)
        encrypted, = struct.unpack_from(">I", head, 32)
        features = struct.unpack_from(">Q", head, 72)[0] if version == 3 else 0
    except struct.error:
        raise DiskUnusable("ends within its header") from None
    if version not in (2, 3):
        raise DiskUnusable(f"is of version {version} of its format")
    if backing:
        raise DiskUnusable("lies on another file")
    if encrypted:
        raise DiskUnusable("is encrypted")
    if features & ~KNOWN_FEATURES:
        raise DiskUnusable("has its data in another file, is damaged, or of a newer format")


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
    iso = None if foreign.iso is None else _opened(foreign.iso)
    if iso and iso.format != "raw":
        raise DiskUnusable(f"{iso.path} is no image of a CD")
    return Media(None if foreign.disk is None else _opened(foreign.disk),
                 None if foreign.cache_disk is None else _opened(foreign.cache_disk),
                 iso, foreign.iso_first)


def _opened(given: Path) -> Disk:
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
