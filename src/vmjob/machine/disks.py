"""Formats of disks that a user brings: told from their first bytes, never guessed by a tool.

An image can name other files (a backing file, a file for its data, extents), which a hypervisor
would open with this user's rights and show to the guest. What does is refused.
"""

from __future__ import annotations

import re
import struct

from vmjob.errors import DiskUnusable

__all__ = ["CD_HEAD", "HEAD", "VDI", "VDI_AT", "check_cd", "format_of"]

#: Bytes that tell a format.
HEAD = 512

QCOW2, VDI = b"QFI\xfb", b"\x7f\x10\xda\xbe"
#: Where VDI has its mark (VirtualBox, ``VDICore.h``); qcow2 begins with its own.
VDI_AT = 64
#: Where a CD says what it is: in its 17th sector (ECMA-119, 8.1.2; UDF begins with ECMA-167's
#: sequence), behind a byte of type; the sectors before are zeros or a computer's first program.
CD_AT, CD_HEAD = 0x8001, 0x8006
CD_MARKS = (b"CD001", b"BEA01")
#: What no such program begins with.
_TEXT = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:--|#|[A-Za-z]{3})")
#: Formats that are not taken: they can name other files, or nobody has asked for them.
REFUSED = {b"KDMV": "VMDK", b"COWD": "VMDK", b"vhdxfile": "VHDX", b"conectix": "VHD",
           b"QED\0": "QED", b"LUKS\xba\xbe": "LUKS", b"WithoutFreeSpace": "HDD",
           b"WithouFreSpacExt": "HDD", b"Bochs Virtual HD": "Bochs"}
#: A VMDK that is a text: VirtualBox takes four first lines for one (``vmdkPreprocessDescriptor``),
#: QEMU comments and empty lines before others. No sector that starts a computer begins so.
_DESCRIPTOR = re.compile(rb"\s*#")
#: Features of qcow2 that a reader must know (QEMU, ``docs/interop/qcow2.txt``): left dirty,
#: compression type, extended entries. Not: corrupt (2), data in another file (4).
KNOWN_FEATURES = 1 | 8 | 16


def format_of(head: bytes) -> str:
    """The format of an image that begins so: ``qcow2``, ``vdi`` or ``raw``.

    Raises `DiskUnusable` for other formats, and for what names other files or is encrypted.
    """
    if head.startswith(QCOW2):
        _check_qcow2(head)
        return "qcow2"
    # First: VirtualBox takes a file that could be both for the other.
    for mark, name in REFUSED.items():
        if head.startswith(mark):
            raise DiskUnusable(f"is a {name} image")
    if _DESCRIPTOR.match(head):
        raise DiskUnusable("is a text, as VMDK images can be")
    return "vdi" if head[VDI_AT:VDI_AT + len(VDI)] == VDI else "raw"


def check_cd(head: bytes) -> None:
    """Raise `DiskUnusable` for what is no image of a CD: ISO 9660 or UDF.

    ``head``: its first `CD_HEAD` bytes. For VirtualBox, which can not be told what a file is: it
    takes lists of files of this computer (VISO, cue sheets) for CDs as well, by their first words.
    """
    if _TEXT.match(head):
        raise DiskUnusable("is a text, not an image of a CD")
    if head[CD_AT:CD_HEAD] not in CD_MARKS:
        raise DiskUnusable("is no image of a CD")


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
