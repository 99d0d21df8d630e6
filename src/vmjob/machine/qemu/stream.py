"""The stream in which QEMU writes a machine's state: taken apart, and put together again.

The format is that of QEMU's migration (``migration/savevm.c`` and ``migration/ram.c``, version 3 of
the file, version 4 of the memory's section; unchanged from QEMU 2.x to 9.x for what is used here):

    file       magic, version, CONFIGURATION: the machine's type
    START      of "ram": the names and sizes of all blocks of memory
    PART...    pages: 8 bytes of offset and flags, the block's name when it changes, the bytes
    END        the last pages
    FULL...    one section per device, then the end: kept as they are

Pages may come several times; the last one counts. Why the stream is taken apart at all:
docs/decisions/008-checkpoints.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

__all__ = ["PAGE", "Block", "Reader", "StreamError", "write"]

#: Bytes of a page of x86.
PAGE = 4096
MAGIC = b"QEVM"
VERSION = 3
CONFIGURATION, START, PART, END, FOOTER = 0x07, 0x01, 0x02, 0x03, 0x7e
FLAG_ZERO, FLAG_MEM_SIZE, FLAG_PAGE, FLAG_EOS, FLAG_CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
FLAGS = PAGE - 1
#: Longest head and tail, bytes: measured 0.3 KB and 0.4 MB; devices with memory of their own are
#: not part of any machine here.
MAX_HEAD = 64 * 1024
MAX_TAIL = 64 * 1024 * 1024
#: Most blocks, and largest of them, that a machine here may have.
MAX_BLOCKS = 64
MAX_BLOCK = 1 << 44
#: Pages joined to one piece of a written stream.
BATCH = 256

_QUAD = struct.Struct(">Q")
_LONG = struct.Struct(">I")


TakePage = Callable[[int, int, memoryview | None], None]


class StreamError(ValueError):
    """The stream is not what this module knows."""


@dataclass(frozen=True)
class Block:
    """One block of a machine's memory; ``size`` in bytes."""

    name: bytes
    size: int


class _Short(Exception):
    """More bytes are needed."""


class Reader:
    """Takes a stream apart: `feed` it as it comes, then `finish`; after an error it is of no use.

    ``begin(blocks)`` is called once and returns what is called for each page, ``page(block, number,
    data)``: the block's place in ``blocks``, the page's number in it, its bytes (valid until it
    returns) or None for one of zeros. What these two raise comes out of `feed`. ``head`` and
    ``tail`` are what is before and behind the pages.
    """

    def __init__(self, begin: Callable[[list[Block]], TakePage]) -> None:
        self._begin = begin
        self._page: TakePage = _no_page
        self.head = b""
        self.blocks: list[Block] = []
        self.machine_type = ""
        self._places: dict[bytes, int] = {}
        self._section = b""
        self._block = -1
        self._rest = bytearray()
        self._tail = bytearray()
        self._state = self._read_head

    @property
    def tail(self) -> bytes:
        return bytes(self._tail)

    @property
    def section(self) -> bytes:
        """The number of the memory's section, as it is written."""
        return self._section

    def feed(self, data: bytes | memoryview) -> None:
        """The next bytes; raises `StreamError`."""
        if self._state == self._read_tail:
            self._tail += data
            if len(self._tail) > MAX_TAIL:
                raise StreamError("devices without end")
            return
        self._rest += data
        view = memoryview(self._rest)
        at = 0
        try:
            while self._state != self._read_tail:
                at = self._state(view, at)
        except _Short as short:
            at = max(at, *short.args)
            if self._state == self._read_head and len(view) > MAX_HEAD:
                raise StreamError("a head without end") from None
        if self._state == self._read_tail:
            self._tail += view[at:]
            at = len(view)
        # Not shortened in place: whoever still holds a view of it would make that fail.
        self._rest = self._rest[at:]

    def finish(self) -> None:
        """There are no more bytes; raises `StreamError` when some are missing."""
        if self._state != self._read_tail or not self._tail:
            raise StreamError("the stream ends in the middle")

    # -- the states; each returns how far it has read ------------------------------------------

    def _read_head(self, view: memoryview, at: int) -> int:
        """All up to and with the memory's START, at once."""
        cursor = _Cursor(view[:MAX_HEAD], at)
        if bytes(cursor.take(4)) != MAGIC or cursor.number(_LONG) != VERSION:
            raise StreamError("not a stream of QEMU's")
        kind = cursor.byte()
        if kind == CONFIGURATION:
            self.machine_type = _text(cursor.take(cursor.number(_LONG)))
            kind = cursor.byte()
        if kind != START:
            raise StreamError(f"an unknown section {kind:#x} before the memory's")
        section = bytes(cursor.take(4))
        if bytes(cursor.take(cursor.byte())) != b"ram":
            raise StreamError("the first section is not the memory's")
        cursor.take(8)  # instance and version
        total = cursor.number(_QUAD)
        if total & FLAGS != FLAG_MEM_SIZE:
            raise StreamError("the memory's section begins with something else than its size")
        total &= ~FLAGS
        blocks: list[Block] = []
        while total > 0 and len(blocks) < MAX_BLOCKS:
            block = Block(bytes(cursor.take(cursor.byte())), cursor.number(_QUAD))
            if not 0 < block.size <= min(total, MAX_BLOCK) or block.size % PAGE:
                raise StreamError("a block of memory of a size that cannot be")
            blocks.append(block)
            total -= block.size
        if total or cursor.number(_QUAD) != FLAG_EOS:
            raise StreamError("blocks of memory that do not add up")
        if len({block.name for block in blocks}) != len(blocks):
            raise StreamError("two blocks of memory of one name")
        self._footer(cursor, section)
        self._section, self.blocks = section, blocks
        self._places = {block.name: place for place, block in enumerate(blocks)}
        self.head = bytes(view[at:cursor.at])
        self._page = self._begin(blocks)
        self._state = self._read_section
        return cursor.at

    def _read_section(self, view: memoryview, at: int) -> int:
        cursor = _Cursor(view, at)
        kind = cursor.byte()
        if kind not in (PART, END) or bytes(cursor.take(4)) != self._section:
            raise StreamError(f"an unknown section {kind:#x} among the memory's")
        self._last = kind == END
        self._state = self._read_pages
        return cursor.at

    def _read_pages(self, view: memoryview, at: int) -> int:
        """As many pages as there are: one call for each would take longer than all the rest."""
        unpack, page, end = _QUAD.unpack_from, self._page, len(view)
        while end - at >= 8:
            head, = unpack(view, at)
            start, flags = at + 8, head & FLAGS
            if head == FLAG_EOS:
                return self._read_end(view, at, start)
            kind = flags & ~FLAG_CONTINUE
            if kind not in (FLAG_PAGE, FLAG_ZERO):
                raise StreamError(f"a page with flags {flags:#x}")
            if kind == flags:
                if end <= start or end < start + 1 + view[start]:
                    break
                name = bytes(view[start + 1:start + 1 + view[start]])
                if name not in self._places:
                    raise StreamError("a page of an unknown block")
                place = self._places[name]
                start += 1 + view[start]
            else:
                place = self._block
                if place < 0:
                    raise StreamError("a page of no block")
            if head >= self.blocks[place].size:
                raise StreamError("a page outside its block")
            if kind == FLAG_PAGE:
                if end < start + PAGE:
                    break
                page(place, head >> 12, view[start:start + PAGE])
                at = start + PAGE
            else:
                if end <= start:
                    break
                if view[start]:
                    raise StreamError("a page of one byte that is not zero")
                page(place, head >> 12, None)
                at = start + 1
            self._block = place
        raise _Short(at)

    def _read_end(self, view: memoryview, at: int, start: int) -> int:
        if len(view) - start < 5:
            raise _Short(at)
        cursor = _Cursor(view, start)
        self._footer(cursor, self._section)
        self._state = self._read_tail if self._last else self._read_section
        return cursor.at

    def _read_tail(self, view: memoryview, at: int) -> int:
        raise AssertionError("the tail is not read")

    def _footer(self, cursor: _Cursor, section: bytes) -> None:
        if cursor.byte() != FOOTER or bytes(cursor.take(4)) != section:
            raise StreamError("a section without its end")


class _Cursor:
    """Reads from a view; raises `_Short` when it ends."""

    def __init__(self, view: memoryview, at: int) -> None:
        self._view = view
        self._began = at
        self.at = at

    def take(self, count: int) -> memoryview:
        if len(self._view) - self.at < count:
            raise _Short(self._began)
        self.at += count
        return self._view[self.at - count:self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, kind: struct.Struct) -> int:
        found: int = kind.unpack(self.take(kind.size))[0]
        return found


def _no_page(block: int, number: int, data: memoryview | None) -> None:
    raise AssertionError("a page before the blocks")


def _text(data: memoryview) -> str:
    return bytes(data).decode("ascii", "replace")


def write(head: bytes, section: bytes, blocks: list[Block],
          pages: Iterable[tuple[int, int, bytes | memoryview | None]],
          tail: bytes) -> Iterator[bytes]:
    """A stream of some pages (block, number, bytes or None for zeros), in pieces.

    What a page does not mention stays as it is in the memory that it is loaded into.
    """
    yield head + bytes([PART]) + section
    names = [bytes([len(block.name)]) + block.name for block in blocks]
    parts: list[bytes | memoryview] = []
    last = -1
    for count, (place, number, data) in enumerate(pages, 1):
        flags = FLAG_ZERO if data is None else FLAG_PAGE
        if place == last:
            parts.append(_QUAD.pack(number * PAGE | flags | FLAG_CONTINUE))
        else:
            parts.append(_QUAD.pack(number * PAGE | flags) + names[place])
            last = place
        parts.append(b"\0" if data is None else data)
        if count % BATCH == 0:
            yield b"".join(parts)
            parts.clear()
    end = _QUAD.pack(FLAG_EOS) + bytes([FOOTER]) + section
    yield b"".join([*parts, end, bytes([END]), section, end, tail])
