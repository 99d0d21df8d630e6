"""The memory of a machine's checkpoints: what differs from its template, each page once.

    NAME.pages      pages that changed with the checkpoint NAME, one after the other
    NAME.index      of the checkpoint NAME: which page of memory is where, and its digest

A checkpoint needs its index and every file of pages that the index mentions; none is changed once
it was written. A page that is not in the index is as it is in the template (in a machine that was
booted: zeros). Files of pages in which little is needed any more are given up: their last pages
are written anew, so all files together are at most twice as large as what they are for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

import msgspec

from vmjob.machine.qemu.stream import MAX_BLOCK, PAGE, Block

__all__ = ["PageTable", "PageWriter", "read_index"]

#: Bytes of a page's digest: half of SHA-256, still beyond anybody's means to forge.
DIGEST = 16
#: Most files of pages that one checkpoint is made of, besides the newest.
MAX_FILES = 8
#: Bytes gathered before they are written.
GATHERED = 1 << 20
#: Where a page is, besides in a file: as the template has it, or zeros.
AS_IN_TEMPLATE, ZEROS, IN_FILE = 0, 1, 2


class _IndexedBlock(msgspec.Struct, frozen=True):
    name: bytes
    size: int
    numbers: bytes
    places: bytes
    digests: bytes


class _Index(msgspec.Struct, frozen=True):
    """On disk; all arrays are little-endian."""

    files: list[str]
    blocks: list[_IndexedBlock]


class PageTable:
    """Where each page of a machine's memory was found by its last checkpoint."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        #: Per block and page: one of the constants above, or IN_FILE + file * 2^32 + place in it.
        self.places = [array("Q", bytes(8 * (block.size // PAGE))) for block in blocks]
        self.digests = [bytearray(DIGEST * (block.size // PAGE)) for block in blocks]
        #: Files of pages by number; None for one that is given up.
        self.files: list[str | None] = []

    def copy(self) -> PageTable:
        """For the next checkpoint, which may fail."""
        other = PageTable([])
        other.blocks = self.blocks
        other.places = [places[:] for places in self.places]
        other.digests = [digests[:] for digests in self.digests]
        other.files = self.files[:]
        return other

    def used(self) -> Counter[int]:
        """How many pages are needed of each file, by number."""
        found: Counter[int] = Counter()
        for places in self.places:
            found.update(place >> 32 for place in places if place >= IN_FILE)
        return found

    def given_up(self, directory: Path) -> set[int]:
        """Files whose pages the next checkpoint writes anew."""
        used = self.used()
        held = [number for number, name in enumerate(self.files) if name is not None]
        small = {number for number in held
                 if used[number] * PAGE * 2 < (directory / str(self.files[number])).stat().st_size}
        rest = sorted((number for number in held if number not in small),
                      key=lambda number: used[number])
        return small | set(rest[:max(0, len(rest) - MAX_FILES)])

    def drop_unused(self) -> None:
        """Forget files of which nothing is needed."""
        used = self.used()
        self.files = [name if used[number] else None for number, name in enumerate(self.files)]

    def names(self) -> list[str]:
        """The files of pages that are needed."""
        return [name for name in self.files if name is not None]

    def write_index(self, path: Path) -> None:
        """Write the index; raises `OSError`."""
        renumbered = {number: new for new, number in enumerate(
            number for number, name in enumerate(self.files) if name is not None)}
        blocks = []
        for block, places, digests in zip(self.blocks, self.places, self.digests, strict=True):
            numbers = array("Q", (n for n, place in enumerate(places) if place))
            moved = array("Q", (_move(places[n], renumbered) for n in numbers))
            kept = b"".join(digests[n * DIGEST:(n + 1) * DIGEST] for n in numbers)
            blocks.append(_IndexedBlock(block.name, block.size, numbers.tobytes(), moved.tobytes(),
                                        kept))
        index = msgspec.msgpack.encode(_Index(self.names(), blocks))
        path.write_bytes(zlib.compress(index, 1))

    def stored(self, directory: Path) -> Generator[tuple[int, int, bytes | None], None, None]:
        """Every page of the index, file by file: block, number, bytes or None for zeros.

        Raises `OSError`, and `ValueError` for a page that is not there or not what it was.
        """
        found = sorted((place, block, number) for block, places in enumerate(self.places)
                       for number, place in enumerate(places) if place)
        with contextlib.ExitStack() as files:
            opened = fd = -1
            for place, block, number in found:
                if place == ZEROS:
                    yield block, number, None
                    continue
                file, at = place >> 32, ((place & 0xffffffff) - IN_FILE) * PAGE
                if file != opened:
                    files.close()
                    path = directory / str(self.files[file])
                    opened, fd = file, files.enter_context(path.open("rb", buffering=0)).fileno()
                # Not mapped: there, what a disk cannot read would be this process's end.
                data = os.pread(fd, PAGE, at)
                if len(data) != PAGE:
                    raise ValueError("a page is missing")
                kept = self.digests[block][number * DIGEST:(number + 1) * DIGEST]
                if hashlib.sha256(data).digest()[:DIGEST] != kept:
                    raise ValueError("a page is not what it was")
                yield block, number, data


def _move(place: int, renumbered: dict[int, int]) -> int:
    return place if place < IN_FILE else renumbered[place >> 32] << 32 | place & 0xffffffff


def read_index(path: Path) -> PageTable:
    """The table of a checkpoint; raises `OSError`, `ValueError`."""
    try:
        index = msgspec.msgpack.decode(zlib.decompress(path.read_bytes()), type=_Index)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise ValueError(f"an index that cannot be read: {error}") from error
    if any(not 0 < block.size <= MAX_BLOCK or block.size % PAGE for block in index.blocks):
        raise ValueError("an index of memory of a size that cannot be")
    if any("/" in name or "\0" in name for name in index.files):
        raise ValueError("an index that names files elsewhere")
    table = PageTable([Block(block.name, block.size) for block in index.blocks])
    table.files = list(index.files)
    most = len(table.files) << 32
    for block, all_places, all_digests in zip(index.blocks, table.places, table.digests,
                                              strict=True):
        numbers, places = array("Q"), array("Q")
        numbers.frombytes(block.numbers)
        places.frombytes(block.places)
        if len(block.digests) != len(numbers) * DIGEST:
            raise ValueError("an index without all digests")
        if numbers and max(numbers) >= len(all_places):
            raise ValueError("an index of pages outside the memory")
        for at, (number, place) in enumerate(zip(numbers, places, strict=True)):
            if place != ZEROS and not (place < most and place & 0xffffffff >= IN_FILE):
                raise ValueError("an index that mentions files which it does not name")
            all_places[number] = place
            all_digests[number * DIGEST:(number + 1) * DIGEST] = \
                block.digests[at * DIGEST:(at + 1) * DIGEST]
    return table


class _Template:
    """The memory that a machine began with."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._fd = self._file.fileno()
        self.size = os.fstat(self._fd).st_size
        #: Per page: 0 where the file has a hole. Most is holes; to look into each costs more than
        #: all else that is done for a page of zeros.
        self._has_data = _pages_with_data(self._fd, self.size)

    def is_zeros(self, number: int) -> bool:
        return not self._has_data[number] or self.page(number) == _ZERO_PAGE

    def is_like(self, number: int, data: memoryview) -> bool:
        """Whether a page has just these bytes, which are not all zeros."""
        return bool(self._has_data[number]) and self.page(number) == bytes(data)

    def page(self, number: int) -> bytes:
        return os.pread(self._fd, PAGE, number * PAGE)

    def close(self) -> None:
        self._file.close()


def _pages_with_data(fd: int, size: int) -> bytearray:
    found = bytearray(size // PAGE)
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                break
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        first, behind = start // PAGE, -(-at // PAGE)
        found[first:behind] = b"\1" * (behind - first)
    return found


class PageWriter:
    """Takes the pages of one checkpoint and writes those that changed since the last.

    ``table`` is changed; ``template`` is the memory file that the machine is a copy of, if any:
    that of the first block of its size.
    """

    def __init__(self, table: PageTable, template: Path | None, directory: Path,
                 name: str) -> None:
        self._table = table
        self._path = directory / f"{name}.pages"
        self._number = len(table.files)
        self._given_up = table.given_up(directory)
        self._template = _Template(template) if template else None
        self._templated = -1
        if self._template:
            size = self._template.size
            self._templated = next((i for i, each in enumerate(table.blocks)
                                    if each.size == size), -1)
        try:
            self._file: BinaryIO = self._path.open("xb", buffering=0)
        except OSError:
            if self._template:
                self._template.close()
            raise
        self._gathered = bytearray()
        self._written = 0  # bytes in the file, those gathered not counted
        table.files.append(self._path.name)

    @property
    def written_bytes(self) -> int:
        return self._written + len(self._gathered)

    def page(self, block: int, number: int, data: memoryview | None) -> None:
        """One page as it is now; the last word on a page counts."""
        places = self._table.places[block]
        place = places[number]
        if data is None:
            if place != ZEROS:
                places[number] = self._zeros(block, number)
            return
        if (place == AS_IN_TEMPLATE and block == self._templated and self._template
                and self._template.is_like(number, data)):
            return
        digests, at = self._table.digests[block], number * DIGEST
        digest = hashlib.sha256(data).digest()[:DIGEST]
        if place >= IN_FILE:
            file = place >> 32
            if digests[at:at + DIGEST] == digest and file not in self._given_up:
                return
            if file == self._number:
                digests[at:at + DIGEST] = digest
                self._write((place & 0xffffffff) - IN_FILE, data)
                return
        digests[at:at + DIGEST] = digest
        slot = (self._written + len(self._gathered)) // PAGE
        places[number] = self._number << 32 | slot + IN_FILE
        self._write(slot, data)

    def _zeros(self, block: int, number: int) -> int:
        """Where a page of zeros is."""
        if self._template is None:
            # The main memory of a new machine is zeros; firmware's own blocks are not.
            return AS_IN_TEMPLATE if self._table.blocks[block].size > MAIN_MEMORY else ZEROS
        if block == self._templated and self._template.is_zeros(number):
            return AS_IN_TEMPLATE
        return ZEROS

    def _write(self, slot: int, data: memoryview) -> None:
        at = slot * PAGE - self._written
        if at == len(self._gathered):
            self._gathered += data
            if len(self._gathered) >= GATHERED:
                self.flush()
        elif at >= 0:
            self._gathered[at:at + PAGE] = data
        else:
            _write_all(self._file.fileno(), data, slot * PAGE)

    def flush(self) -> None:
        """Write what was gathered; raises `OSError`."""
        _write_all(self._file.fileno(), self._gathered, self._written)
        self._written += len(self._gathered)
        self._gathered = bytearray()

    def close(self) -> None:
        """No more pages; the file is complete, but not yet on the disk; none, if not needed."""
        try:
            self.flush()
        finally:
            self._file.close()
            if self._template:
                self._template.close()
        self._table.drop_unused()
        if self._table.files[self._number] is None:
            self._path.unlink()


#: Bytes: every block of firmware is smaller, every machine's memory is larger.
MAIN_MEMORY = 16 << 20
_ZERO_PAGE = bytes(PAGE)


def _write_all(fd: int, data: bytearray | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count
