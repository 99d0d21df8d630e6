"""What is on a disk image: the blocks of a VDI, and partitions. Pure functions from bytes.

An image is the user's and may say anything: every number is bounded, and what makes no sense raises
`ValueError`. It is looked at here, in the machine, where there is nothing to win.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable

SECTOR = 512

#: VirtualBox's ``VDICore.h``: the fields from the mark on, up to the identity of the parent.
VDI_HEADER = struct.Struct("<IIIII256xIIIIIIIQIIII16x16x16x16s")
VDI_AT, VDI_MARK, VDI_VERSION = 64, 0xBEDA107F, 0x00010001
DYNAMIC, STATIC = 1, 2
#: Numbers from here on: of the block there is nothing, or it was given back. Both read as zeros.
NOTHING = 0xFFFFFFFE
#: Bytes of a block: nobody makes others.
BLOCK = 1 << 20
#: Blocks of the largest disk, 4 TiB.
MOST_BLOCKS = 1 << 22

#: Kinds of a partition that holds others, and the one that says that there is another table.
EXTENDED = (0x05, 0x0F, 0x85)
PROTECTIVE = 0xEE
#: The number of the first partition in another.
FIRST_LOGICAL = 5
#: Partitions of one disk that are looked at.
MOST_PARTITIONS = 64

#: Reads so many bytes at an offset; fewer at the end.
Read = Callable[[int, int], bytes]
#: A part of a disk: first sector, number of sectors, and the first sector of where that is
#: in the image (None: nowhere, it is all zeros).
Run = tuple[int, int, "int | None"]


def vdi_runs(read: Read) -> list[Run]:
    """Where the disk in a VDI is, in order and without gaps."""
    head = read(VDI_AT, VDI_HEADER.size)
    if len(head) < VDI_HEADER.size:
        raise ValueError("a VDI that ends within its header")
    (mark, version, _, kind, _, table_at, data_at, _, _, _, _, _, size, block, extra, count, _,
     parent) = VDI_HEADER.unpack(head)
    if mark != VDI_MARK or version != VDI_VERSION:
        raise ValueError("not a VDI of version 1.1")
    if kind not in (DYNAMIC, STATIC) or any(parent):
        raise ValueError("a VDI that lies on another file")
    if (block != BLOCK or extra or count > MOST_BLOCKS or not SECTOR <= size <= count * BLOCK
            or data_at % SECTOR):
        raise ValueError("a VDI with a header that cannot be")
    raw = read(table_at, 4 * count)
    if len(raw) < 4 * count:
        raise ValueError("a VDI that ends within its table")
    numbers = array("I", raw)
    runs: list[Run] = []
    left, per_block = size // SECTOR, BLOCK // SECTOR
    for number in numbers:
        length = min(left, per_block)
        if not length:
            break
        left -= length
        where = None if number >= NOTHING else (data_at + number * BLOCK) // SECTOR
        if runs:
            first, before, at = runs[-1]
            if where is None if at is None else where == at + before:
                runs[-1] = (first, before + length, at)
                continue
        runs.append((runs[-1][0] + runs[-1][1] if runs else 0, length, where))
    return runs


def partitions(read: Read, sectors: int) -> dict[int, tuple[int, int]]:
    """First sector and number of sectors of each partition, by the number that Linux gives it."""
    found: dict[int, tuple[int, int]] = {}
    for number, (kind, first, length) in enumerate(_table(read, 0), 1):
        if kind == PROTECTIVE:
            found |= _gpt(read)
        elif kind in EXTENDED:
            found |= enumerate(_logical(read, first), FIRST_LOGICAL)  # there is but one such
        elif kind:
            found[number] = first, length
    return {number: (first, length) for number, (first, length) in sorted(found.items())
            if first > 0 and length > 0 and first + length <= sectors}


def _table(read: Read, sector: int) -> list[tuple[int, int, int]]:
    """Kind, first sector and number of sectors of the four entries in a boot record."""
    record = read(sector * SECTOR, SECTOR)
    if len(record) < SECTOR or record[510:] != b"\x55\xaa":
        return []
    return [(kind, first, length) for _, kind, first, length in
            struct.iter_unpack("<B3xB3xII", record[446:510])]


def _logical(read: Read, extended: int) -> list[tuple[int, int]]:
    """The partitions in one that holds others: a chain of tables."""
    found: list[tuple[int, int]] = []
    at = extended
    while len(found) < MOST_PARTITIONS:
        entries = _table(read, at)
        if not entries:
            break
        kind, first, length = entries[0]
        if kind:
            found.append((at + first, length))
        kind, first, _ = entries[1]
        # Always forward: a chain that is a ring has no end.
        if kind not in EXTENDED or extended + first <= at:
            break
        at = extended + first
    return found


def _gpt(read: Read) -> dict[int, tuple[int, int]]:
    header = read(SECTOR, 92)
    if len(header) < 92 or not header.startswith(b"EFI PART"):
        return {}
    at, count, size = struct.unpack_from("<QII", header, 72)
    if not 128 <= size <= 4096 or at >= 1 << 40:
        return {}
    found = {}
    for number in range(min(count, MOST_PARTITIONS)):
        entry = read(at * SECTOR + number * size, 48)
        if len(entry) < 48:
            break
        first, last = struct.unpack_from("<QQ", entry, 32)
        if any(entry[:16]):
            found[number + 1] = first, last - first + 1
    return found
