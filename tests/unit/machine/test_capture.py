"""Packets are counted by what the hypervisor says, however its words are cut."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import open_descriptors
from vmjob.machine import capture as capture_module
from vmjob.machine.capture import FILE_HEADER, MOST_PACKET, Capture, CapturePipe


def capture(lengths: list[int], kept: int) -> bytes:
    return bytes(FILE_HEADER) + b"".join(
        struct.pack("=IIII", 1, 2, min(kept, length), length) + content(length)[:kept]
        for length in lengths)


def content(length: int) -> bytes:
    return (length.to_bytes(4) * (length // 4 + 1))[:length]


class Found(list[tuple[int, bytes]]):
    """What was told of packets."""

    def packet(self, length: int, head: bytes) -> None:
        self.append((length, head))


@given(st.lists(st.integers(0, 3000), max_size=30), st.integers(1, 4000), st.integers(0, 60),
       st.data())
def test_each_packet_is_told_however_the_stream_is_cut(
        lengths: list[int], kept: int, head: int, data: st.DataObject) -> None:
    whole, found = capture(lengths, kept), Found()
    stream = Capture(found.packet, head=head)
    while whole:
        size = data.draw(st.integers(1, len(whole)))
        stream.feed(whole[:size])
        whole = whole[size:]
    assert found == [(length, content(length)[:min(kept, head)]) for length in lengths]


@given(st.lists(st.binary(max_size=100)), st.integers(0, 60))
def test_any_bytes_are_taken_or_refused(pieces: list[bytes], head: int) -> None:
    found = Found()
    stream = Capture(found.packet, head=head)
    refused = False
    for piece in pieces:
        try:
            stream.feed(piece)
        except ValueError:
            refused = True
        else:
            assert not refused, "what came after it was taken for packets"
    assert all(length <= MOST_PACKET and len(start) <= head for length, start in found)


@pytest.mark.parametrize("numbers", [(1, 1 << 30), (1 << 30, 1)])
def test_a_length_that_no_packet_has_is_refused(numbers: tuple[int, int]) -> None:
    found = Found()
    stream = Capture(found.packet)
    with pytest.raises(ValueError, match="long"):
        stream.feed(bytes(FILE_HEADER) + struct.pack("=IIII", 0, 0, *numbers))
    with pytest.raises(ValueError, match="before"):
        stream.feed(capture([1], 1))
    assert found == []


@pytest.mark.anyio
async def test_a_pipe_is_read_at_once_and_to_its_end() -> None:
    before, found = open_descriptors(), Found()
    pipe = CapturePipe(Capture(found.packet))
    theirs = os.dup(pipe.theirs)
    pipe.given()
    pipe.given()
    os.write(theirs, capture([7], 7))
    await until(lambda: found == [(7, b"")])
    os.close(theirs)
    await anyio.sleep(0.01)  # its end is not looked at for ever
    pipe.close()
    pipe.close()
    assert found == [(7, b"")]
    assert open_descriptors() <= before


@pytest.mark.anyio
async def test_what_came_last_counts_when_a_pipe_is_closed() -> None:
    found = Found()
    pipe = CapturePipe(Capture(found.packet))
    os.write(pipe.theirs, capture([50] * 100, 50))
    pipe.close()
    assert len(found) == 100


@pytest.mark.anyio
async def test_who_writes_for_ever_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0

    def read(fd: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        return bytes(size)

    pipe = CapturePipe(Capture(Found().packet))
    monkeypatch.setattr(capture_module.os, "read", read)
    pipe.close()
    assert reads < 100


@pytest.mark.anyio
async def test_what_is_no_capture_is_read_all_the_same() -> None:
    """A pipe that nobody empties would stop the machine."""
    pipe = CapturePipe(Capture(Found().packet))
    os.set_blocking(pipe.theirs, False)
    written = 0
    with anyio.fail_after(10):
        while written < 3 << 20:
            try:
                written += os.write(pipe.theirs, b"\xff" * 65536)
            except BlockingIOError:
                await anyio.lowlevel.checkpoint()
    pipe.close()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - a pipe tells nobody
            await anyio.sleep(0.001)
