"""A stream taken apart and put together is the same; what is not a stream is refused."""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmjob.machine.qemu import stream
from vmjob.machine.qemu.stream import PAGE, Block, Reader, StreamError, write

SECTION = struct.pack(">I", 2)
#: A page of memory in a test: its block's place, its number, one byte that fills it (0: zeros).
Told = tuple[int, int, int]


def head(blocks: list[Block], total: int | None = None) -> bytes:
    """What QEMU writes before the pages."""
    size = sum(block.size for block in blocks) if total is None else total
    return b"".join([
        b"QEVM", struct.pack(">I", 3), b"\x07", struct.pack(">I", 6), b"pc-q35",
        b"\x01", SECTION, b"\x03ram", struct.pack(">IIQ", 0, 4, size | 0x04),
        *(bytes([len(block.name)]) + block.name + struct.pack(">Q", block.size)
          for block in blocks), struct.pack(">Q", 0x10), b"\x7e", SECTION])


def content(byte: int) -> bytes | None:
    return bytes([byte]) * PAGE if byte else None


def stream_of(blocks: list[Block], told: list[Told], tail: bytes) -> bytes:
    pages = ((block, number, content(byte)) for block, number, byte in told)
    return b"".join(write(head(blocks), SECTION, blocks, pages, tail))


@dataclass
class Memory:
    """What a reader tells, kept as a driver would."""

    blocks: list[Block] = field(default_factory=list)
    pages: dict[tuple[int, int], bytes | None] = field(default_factory=dict)
    told: int = 0
    views: list[memoryview] = field(default_factory=list)
    keep_views: bool = False

    def begin(self, blocks: list[Block]) -> stream.TakePage:
        self.blocks = blocks
        return self.page

    def page(self, block: int, number: int, data: memoryview | None) -> None:
        self.told += 1
        self.pages[block, number] = None if data is None else bytes(data)
        if self.keep_views and data is not None:
            self.views.append(data)


def read(data: bytes, cuts: list[int] | None = None) -> tuple[Memory, Reader]:
    memory = Memory()
    reader = Reader(memory.begin)
    edges = [0, *sorted(cuts or []), len(data)]
    for start, end in pairwise(edges):
        reader.feed(data[start:end])
    reader.finish()
    return memory, reader


@st.composite
def memories(draw: st.DrawFn) -> tuple[list[Block], list[Told]]:
    names = draw(st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=4, unique=True))
    blocks = [Block(name, PAGE * draw(st.integers(1, 5))) for name in names]
    places = [(at, number) for at, block in enumerate(blocks)
              for number in range(block.size // PAGE)]
    told = draw(st.lists(st.tuples(st.sampled_from(places), st.integers(0, 3)), max_size=12))
    return blocks, [(*place, byte) for place, byte in told]


@given(memories(), st.binary(min_size=1, max_size=50), st.data())
def test_a_stream_is_read_as_it_was_written_however_it_comes_in_pieces(
        memory: tuple[list[Block], list[Told]], tail: bytes, more: st.DataObject) -> None:
    blocks, told = memory
    data = stream_of(blocks, told, tail)
    cuts = more.draw(st.lists(st.integers(0, len(data)), max_size=8))
    found, reader = read(data, cuts)
    assert found.blocks == blocks
    # A page that came twice counts as it came last.
    assert found.pages == {(block, number): content(byte) for block, number, byte in told}
    assert found.told == len(told)
    assert (reader.head, reader.section, reader.tail) == (head(blocks), SECTION, tail)
    assert reader.machine_type == "pc-q35"
    again = b"".join(write(reader.head, reader.section, reader.blocks,
                           ((block, number, content(byte)) for block, number, byte in told),
                           reader.tail))
    assert again == data


@given(memories(), st.integers(1, 7))
def test_a_stream_is_read_byte_by_byte(memory: tuple[list[Block], list[Told]], step: int) -> None:
    data = stream_of(*memory, b"devices")
    whole, _ = read(data)
    pieces, reader = read(data, list(range(0, len(data), step)))
    assert pieces.pages == whole.pages
    assert reader.tail == b"devices"


def test_pages_come_in_several_sections() -> None:
    blocks = [Block(b"pc.ram", 4 * PAGE)]
    end = struct.pack(">Q", 0x10) + b"\x7e" + SECTION
    parts = [b"\x02" + SECTION + struct.pack(">Q", number * PAGE | 0x08) + b"\x06pc.ram"
             + bytes([number + 1]) * PAGE + end for number in range(3)]
    last = b"\x03" + SECTION + struct.pack(">Q", 3 * PAGE | 0x22) + b"\0" + end
    memory, _ = read(head(blocks) + b"".join(parts) + last + b"devices")
    assert memory.pages == {(0, 0): content(1), (0, 1): content(2), (0, 2): content(3),
                            (0, 3): None}


def test_many_pages_are_written_in_many_pieces() -> None:
    blocks = [Block(b"pc.ram", 1000 * PAGE)]
    pieces = list(write(head(blocks), SECTION, blocks,
                        ((0, number, content(1)) for number in range(1000)), b"tail"))
    assert max(map(len, pieces)) <= (stream.BATCH + 1) * (PAGE + 16)
    assert len(read(b"".join(pieces))[0].pages) == 1000


@given(memories(), st.data())
def test_a_stream_that_is_cut_off_is_refused(memory: tuple[list[Block], list[Told]],
                                             more: st.DataObject) -> None:
    data = stream_of(*memory, b"devices")
    cut = more.draw(st.integers(0, len(data) - len(b"devices")))
    with pytest.raises(StreamError):
        read(data[:cut])


@settings(max_examples=400)
@given(memories(), st.data())
def test_whatever_comes_is_read_or_refused_and_nothing_else(
        memory: tuple[list[Block], list[Told]], more: st.DataObject) -> None:
    data = bytearray(stream_of(*memory, b"devices"))
    # Where the structure is, not only in the midst of pages.
    near = st.one_of(st.integers(0, 200), st.integers(0, len(data)))
    for _ in range(more.draw(st.integers(1, 3))):
        at = min(more.draw(near), len(data))
        how = more.draw(st.sampled_from(["replace", "insert", "remove"]))
        piece = more.draw(st.binary(min_size=1, max_size=9))
        data[at:at + (0 if how == "insert" else len(piece))] = b"" if how == "remove" else piece
    cuts = more.draw(st.lists(st.integers(0, len(data)), max_size=4))
    with suppress(StreamError):
        found, _ = read(bytes(data), cuts)
        sizes = [block.size // PAGE for block in found.blocks]
        assert all(number < sizes[block] for block, number in found.pages)


@given(st.binary(max_size=400))
def test_noise_is_no_stream(noise: bytes) -> None:
    with pytest.raises(StreamError):
        read(noise)


RAM = [Block(b"pc.ram", 4 * PAGE)]


def page(flags: int, number: int = 0, name: bytes = b"\x06pc.ram", data: bytes = b"") -> bytes:
    return head(RAM) + b"\x02" + SECTION + struct.pack(">Q", number * PAGE | flags) + name + data


def test_what_cannot_be_is_refused_by_name() -> None:
    other = struct.pack(">I", 3)
    wrong = {
        "not a stream": b"QEVN" + head(RAM)[4:],
        "section 0x4 before": head(RAM)[:19] + b"\x04",
        "not the memory's": head(RAM).replace(b"\x03ram", b"\x03rom"),
        "something else than its size": head(RAM, 4 * PAGE | 0x08),
        "a size that cannot be": head([Block(b"pc.ram", PAGE + 1)], 4 * PAGE),
        "do not add up": head([Block(b"b%d" % n, PAGE) for n in range(65)]),
        "of one name": head([RAM[0], RAM[0]]),
        "without its end": head(RAM)[:-4] + other,
        "among the memory's": head(RAM) + b"\x04" + SECTION,
        "unknown block": page(0x08, name=b"\x06pc.rom"),
        "no block": page(0x28, name=b""),
        "outside its block": page(0x08, number=4),
        "byte that is not zero": page(0x02, data=b"\x01"),
        "flags 0x0": page(0),
        "flags 0xa": page(0x0a),
        "flags 0x48": page(0x48),
        "flags 0x18": page(0x18),
    }
    for message, data in wrong.items():
        with pytest.raises(StreamError, match=message):
            read(data)


def taken_before_refusal(reader: Reader, start: bytes, message: str) -> int:
    """How many bytes a reader takes of a stream that goes on with zeros for ever."""
    reader.feed(start)
    taken = len(start)

    def feed_for_ever() -> None:
        nonlocal taken
        while True:
            taken += 1000
            reader.feed(bytes(1000))

    with pytest.raises(StreamError, match=message):
        feed_for_ever()
    return taken


@pytest.mark.parametrize("start", [
    head(RAM)[:40],  # in the midst of the blocks' names
    b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I", 1 << 31)])
def test_a_head_without_end_is_refused_before_it_fills_the_memory(start: bytes) -> None:
    reader = Reader(Memory().begin)
    assert taken_before_refusal(reader, start, ".") <= stream.MAX_HEAD + 1000


def test_devices_without_end_are_refused_before_they_fill_the_memory(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_TAIL", 10_000)
    reader = Reader(Memory().begin)
    start = stream_of(RAM, [], b"devices")
    assert taken_before_refusal(reader, start, "devices without end") <= len(start) + 10_000


def test_no_more_than_one_page_is_held_back() -> None:
    memory = Memory()
    reader = Reader(memory.begin)
    data = stream_of([Block(b"pc.ram", 300 * PAGE)], [(0, n, 1) for n in range(300)], b"devices")
    for at in range(0, len(data), 10_000):
        reader.feed(data[at:at + 10_000])
        assert len(reader._rest) <= PAGE + 8 + 256
        assert memory.told >= (at + 10_000) // (PAGE + 16) - 1 or memory.told == 300


def test_who_keeps_a_view_harms_the_reader_not() -> None:
    memory = Memory(keep_views=True)
    reader = Reader(memory.begin)
    data = stream_of(RAM, [(0, n, n + 1) for n in range(4)], b"devices")
    for at in range(0, len(data), 5000):
        reader.feed(data[at:at + 5000])
    reader.finish()
    assert len(memory.views) == 4


class DiskFull(OSError):
    """What a writer of pages may raise."""


@pytest.mark.parametrize("step", [100, 5000, 1 << 20])
def test_what_goes_wrong_with_a_page_is_what_comes_out(step: int) -> None:
    def page(block: int, number: int, data: memoryview | None) -> None:
        held = data  # a frame of the error holds it
        raise DiskFull(28, f"no room for {held}")

    reader = Reader(lambda blocks: page)
    data = stream_of(RAM, [(0, 1, 1)], b"devices")

    def feed() -> None:
        for at in range(0, len(data), step):
            reader.feed(data[at:at + step])

    with pytest.raises(DiskFull):
        feed()


def test_a_reader_of_nothing_is_not_finished() -> None:
    with pytest.raises(StreamError):
        Reader(Memory().begin).finish()
