"""Packets are counted by what the hypervisor says, however its words are cut."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.machine.qemu.traffic import FILE_HEADER, Counter


def capture(lengths: list[int], kept: int) -> bytes:
    return bytes(FILE_HEADER) + b"".join(
        struct.pack("=IIII", 1, 2, min(kept, length), length) + b"\xff" * min(kept, length)
        for length in lengths)


@given(st.lists(st.integers(0, 65536), max_size=30), st.integers(1, 40), st.data())
def test_lengths_add_up_however_the_stream_is_cut(lengths: list[int], kept: int,
                                                  data: st.DataObject) -> None:
    whole, counter = capture(lengths, kept), Counter()
    while whole:
        size = data.draw(st.integers(1, len(whole)))
        counter.feed(whole[:size])
        whole = whole[size:]
    assert counter.total == sum(lengths)


@given(st.lists(st.binary(max_size=100)))
def test_any_bytes_are_counted_or_refused(pieces: list[bytes]) -> None:
    counter = Counter()
    try:
        for piece in pieces:
            counter.feed(piece)
    except ValueError:
        pass


def test_a_length_that_no_packet_has_is_refused() -> None:
    with pytest.raises(ValueError, match="long"):
        Counter().feed(bytes(FILE_HEADER) + struct.pack("=IIII", 0, 0, 1, 1 << 30))
