"""VirtualBox's own disk format, as far as it is needed: made, read, and layers laid together.

A VDI file is a header, a map of 32-bit block numbers, and blocks of 1 MiB in the order in which
they were first written (VirtualBox, ``VDICore.h``). A layer has the same form: what it does not
hold is in the disk below it, whose UUID its header names. VirtualBox fills a block of a layer from
below when it first writes to it, so a block that is there is whole.
"""

from __future__ import annotations

import itertools
import os
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmjob.errors import DiskUnusable

__all__ = ["BLOCK", "HEAD_SIZE", "Header", "lay_together", "read_header", "write_disk"]

#: Bytes of a block: VirtualBox's own default.
BLOCK = 1 << 20
SIGNATURE = 0xBEDA107F
VERSION = 0x00010001
TEXT = b"<<< Oracle VM VirtualBox Disk Image >>>\n"
#: Kinds of images: one that grows, and a layer.
NORMAL, LAYER = 1, 4
FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
#: Where the map begins; all of VirtualBox's own images have it there.
MAP_AT = 1 << 20
#: The largest disk that is taken, bytes: its map has 64 MiB.
MAX_SIZE = 1 << 44

_PRE = struct.Struct("<64sII")
_HEAD = struct.Struct("<III256sIIIIIIIQIIII16s16s16s16sIIII")
_SECTOR = 512
HEAD_SIZE = 512


@dataclass(frozen=True)
class Header:
    """What a VDI says of itself; sizes in bytes. ``below`` is zero for one that is no layer."""

    kind: int
    map_at: int
    data_at: int
    size: int
    blocks: int
    allocated: int
    own: uuid.UUID
    modified: uuid.UUID
    below: uuid.UUID
    below_modified: uuid.UUID

    def packed(self) -> bytes:
        """The first bytes of the file."""
        heads, sectors = 16, 63
        cylinders = min(self.size // (heads * sectors * _SECTOR), 16383)
        head = _HEAD.pack(400, self.kind, 0, b"", self.map_at, self.data_at, cylinders, heads,
                          sectors, _SECTOR, 0, self.size, BLOCK, 0, self.blocks, self.allocated,
                          self.own.bytes_le, self.modified.bytes_le, self.below.bytes_le,
                          self.below_modified.bytes_le, 0, 0, 0, _SECTOR)
        return (_PRE.pack(TEXT, SIGNATURE, VERSION) + head).ljust(HEAD_SIZE, b"\0")


def read_header(data: bytes) -> Header:
    """Read the first bytes of a VDI; raises `DiskUnusable` for what this module cannot read."""
    try:
        _, signature, version = _PRE.unpack_from(data)
        (_, kind, _, _, map_at, data_at, _, _, _, _, _, size, block, extra, blocks, allocated,
         own, modified, below, below_modified, *_) = _HEAD.unpack_from(data, _PRE.size)
    except struct.error:
        raise DiskUnusable("ends within its header") from None
    if signature != SIGNATURE or version >> 16 != 1:
        raise DiskUnusable("is no VDI image of this version")
    if kind not in (NORMAL, LAYER) or block != BLOCK or extra:
        raise DiskUnusable("is a VDI image of an unusual kind")
    if not 0 < size <= MAX_SIZE or blocks != -(-size // BLOCK) or allocated > blocks:
        raise DiskUnusable("has a damaged header")
    return Header(kind, map_at, data_at, size, blocks, allocated,
                  *(uuid.UUID(bytes_le=each) for each in (own, modified, below, below_modified)))


def write_disk(path: Path, size: int, own: uuid.UUID, content: dict[int, bytes]) -> None:
    """Make a disk of ``size`` bytes with these blocks (number: at most `BLOCK` bytes)."""
    blocks = -(-size // BLOCK)
    data_at = -(-(MAP_AT + 4 * blocks) // BLOCK) * BLOCK
    nobody = uuid.UUID(int=0)
    header = Header(NORMAL, MAP_AT, data_at, size, blocks, len(content), own, own, nobody, nobody)
    table = [FREE] * blocks
    with path.open("xb") as file:
        for place, number in enumerate(sorted(content)):
            table[number] = place
            file.seek(data_at + place * BLOCK)
            file.write(content[number])
        file.truncate(data_at + len(content) * BLOCK)
        _write_head(file, header, table)


def _write_head(file: BinaryIO, header: Header, table: Sequence[int]) -> None:
    file.seek(0)
    file.write(header.packed())
    file.seek(header.map_at)
    file.write(struct.pack(f"<{len(table)}I", *table))


def _table(file: BinaryIO, header: Header) -> Sequence[int]:
    file.seek(header.map_at)
    data = file.read(4 * header.blocks)
    if len(data) != 4 * header.blocks:
        raise DiskUnusable("ends within its map")
    return struct.unpack(f"<{header.blocks}I", data)


def lay_together(layers: Sequence[Path], target: Path) -> None:
    """Make one layer of several that lie on each other, the lowest first; they stay as they are.

    The new one has the UUID of the topmost, so that what lies on that can lie on it, and lies on
    what the lowest lay on. Holes stay holes. Raises `DiskUnusable`, `OSError`.
    """
    opened: list[BinaryIO] = []
    try:
        opened.extend(path.open("rb") for path in layers)
        headers = [read_header(file.read(HEAD_SIZE)) for file in opened]
        for lower, upper in itertools.pairwise(headers):
            if upper.below != lower.own or upper.size != lower.size:
                raise DiskUnusable("does not lie on the layer that was said to be below it")
        tables = [_table(file, header) for file, header in zip(opened, headers, strict=True)]
        top, bottom = headers[-1], headers[0]
        table = [FREE] * top.blocks
        sources: list[tuple[BinaryIO, int]] = []
        for number in range(top.blocks):
            held = next(((file, header, own[number]) for file, header, own in
                         zip(reversed(opened), reversed(headers), reversed(tables), strict=True)
                         if own[number] != FREE), None)
            if held is None:
                continue
            if held[2] == ZERO:
                table[number] = ZERO
                continue
            table[number] = len(sources)
            at = held[1].data_at + held[2] * BLOCK
            if at + BLOCK > os.fstat(held[0].fileno()).st_size:
                raise DiskUnusable("ends before the blocks that its map names")
            sources.append((held[0], at))
        merged = Header(bottom.kind, top.map_at, top.data_at, top.size, top.blocks, len(sources),
                        top.own, top.modified, bottom.below, bottom.below_modified)
        with target.open("xb") as file:
            for place, (source, at) in enumerate(sources):
                _copy_block(source, at, file, merged.data_at + place * BLOCK)
            file.truncate(merged.data_at + len(sources) * BLOCK)
            _write_head(file, merged, table)
    finally:
        for each in opened:
            each.close()


def _copy_block(source: BinaryIO, at: int, target: BinaryIO, to: int) -> None:
    """Copy a block without its holes."""
    end = at + BLOCK
    while at < end:
        try:
            begin = os.lseek(source.fileno(), at, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end of the file
            return
        if begin >= end:
            return
        stop = min(os.lseek(source.fileno(), begin, os.SEEK_HOLE), end)
        data = os.pread(source.fileno(), stop - begin, begin)
        if not data:
            return
        target.seek(to + begin - (end - BLOCK))
        target.write(data)
        at = begin + len(data)
