"""The start of a machine's writable disk, from the image's part: qcow2 in, VDI out.

Read here and not by a program: VirtualBox does not know qcow2's compressed clusters, and a computer
with VirtualBox need not have QEMU. What is read is part of a verified image; it is bounded all the
same. The format is described in QEMU's ``docs/interop/qcow2.txt``.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from pathlib import Path

from vmjob.errors import ImageCorrupt
from vmjob.machine.virtualbox.vdi import BLOCK, write_disk

__all__ = ["make_scratch", "read_clusters"]

_HEAD = struct.Struct(">4sIQIIQIIQ")
MAGIC = b"QFI\xfb"
#: Clusters of 64 KiB are the default; ones larger than a VDI's blocks are refused.
MAX_CLUSTER_BITS = BLOCK.bit_length() - 1
#: Entries of the first table: 512 GiB with the default clusters.
MAX_L1 = 1024
_OFFSET = (1 << 56) - 512
_COMPRESSED = 1 << 62
_SECTOR = 512


def read_clusters(data: bytes) -> tuple[int, dict[int, bytes]]:
    """The size of a qcow2 disk and what is in it: offset -> cluster; zeros are left out.

    Raises `ImageCorrupt` for what an image's part cannot be.
    """
    try:
        magic, _, backing, _, bits, size, encrypted, l1_size, l1_at = _HEAD.unpack_from(data)
        if magic != MAGIC or backing or encrypted or not 9 <= bits <= MAX_CLUSTER_BITS \
                or l1_size > MAX_L1:
            raise ImageCorrupt("the writable disk's start is not what an image has")
        cluster, per_table = 1 << bits, 1 << (bits - 3)
        found: dict[int, bytes] = {}
        for index, (entry,) in enumerate(struct.iter_unpack(">Q", data[l1_at:l1_at + 8 * l1_size])):
            if not (table_at := entry & _OFFSET):
                continue
            for slot, (one,) in enumerate(struct.iter_unpack(
                    ">Q", data[table_at:table_at + cluster])):
                at = (index * per_table + slot) * cluster
                content = _cluster(data, one, bits)
                if content and at < size and content.strip(b"\0"):
                    found[at] = content
    except (struct.error, zlib.error) as error:
        raise ImageCorrupt(f"the writable disk's start cannot be read: {error}") from error
    return size, found


def _cluster(data: bytes, entry: int, bits: int) -> bytes:
    if entry & _COMPRESSED:
        shift = 62 - (bits - 8)
        at = entry & ((1 << shift) - 1)
        sectors = (entry >> shift & ((1 << (bits - 8)) - 1)) + 1
        packed = data[at:at + sectors * _SECTOR]
        return zlib.decompressobj(-12).decompress(packed, 1 << bits)
    at = entry & _OFFSET
    return data[at:at + (1 << bits)] if at and not entry & 1 else b""


def make_scratch(source: Path, target: Path, size: int, own: uuid.UUID) -> None:
    """Make the disk of ``size`` bytes that begins as ``source`` (qcow2) does.

    Raises `ImageCorrupt`, `OSError`.
    """
    _, clusters = read_clusters(source.read_bytes())
    blocks: dict[int, bytearray] = {}
    for at, content in clusters.items():
        if at >= size:
            raise ImageCorrupt("the writable disk's start does not fit on the machine's disk")
        block = blocks.setdefault(at // BLOCK, bytearray(BLOCK))
        block[at % BLOCK:at % BLOCK + len(content)] = content
    write_disk(target, size, own, {number: bytes(block) for number, block in blocks.items()})
