"""The byte stream of a lane: bounded, complete, and never waiting for ever."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.guest.agent.channel import Channel, Closed, Interrupted, TimedOut
from vmjob.guest.agent.wire import MAX_HEAD, ProtocolError

CAPACITY = 64 * 1024


@contextmanager
def joined(**options: object) -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours.fileno(), CAPACITY, **{"patience": 5.0, **options}), theirs  # type: ignore[arg-type]


@contextmanager
def flooding(sock: socket.socket, data: bytes) -> Iterator[None]:
    """A peer that sends ``data`` for ever."""
    def send() -> None:
        try:
            while True:
                sock.sendall(data)
        except OSError:
            pass

    thread = threading.Thread(target=send)
    thread.start()
    yield
    sock.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    assert not thread.is_alive()


def within(seconds: float, call: Callable[[], object]) -> BaseException | None:
    """What ``call`` raised; a call that does not end in time fails the test."""
    caught: list[BaseException | None] = [None]

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            caught[0] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it does not end"
    return caught[0]


@given(st.lists(st.binary(max_size=20_000).map(lambda b: b.replace(b"\n", b" ")), max_size=8))
def test_lines_and_bodies_arrive_as_they_were_sent_in_whatever_pieces(bodies: list[bytes]) -> None:
    with joined() as (channel, peer):
        def send() -> None:
            for body in bodies:
                peer.sendall(b"%x\r\n" % len(body) + body + b"\r\n" if body else b"\n")

        thread = threading.Thread(target=send)
        thread.start()
        for body in bodies:
            if body:
                assert channel.chunk(CAPACITY) == body
            else:
                assert channel.line() == b""
        thread.join()


def test_a_line_without_end_is_refused_before_it_costs_memory() -> None:
    with joined() as (channel, peer), flooding(peer, b"x" * 65536):
        with pytest.raises(ProtocolError, match="line without end"):
            channel.line()
        assert len(channel._buffer) < 2 * (CAPACITY + MAX_HEAD)


def test_a_head_of_endless_lines_is_refused() -> None:
    with joined() as (channel, peer), flooding(peer, b"a: b\r\n" * 1000), \
            pytest.raises(ProtocolError, match="head without end"):
        channel.head()


@pytest.mark.parametrize("sent", [b"10001\r\n", b"-1\r\n", b"0x5\r\n", b"\r\n", b"1_0\r\n",
                                  b"ffffffffffff\r\n", b"2\r\nabXX"])
def test_a_chunk_that_lies_is_refused(sent: bytes) -> None:
    with joined() as (channel, peer):
        peer.sendall(sent)
        with pytest.raises(ProtocolError):
            channel.chunk(0x10000)


def test_silence_in_the_middle_of_a_line_times_out() -> None:
    with joined(patience=0.05) as (channel, peer):
        peer.sendall(b"half")
        with pytest.raises(TimedOut):
            channel.line()


def test_a_peer_that_hangs_up_is_told_from_one_that_is_silent() -> None:
    with joined() as (channel, peer):
        peer.close()
        with pytest.raises(Closed):
            channel.line()


def test_a_peer_that_takes_nothing_times_out() -> None:
    with joined(patience=0.05) as (channel, _), pytest.raises(TimedOut):
        channel.write(b"x" * 10_000_000)


def test_an_agent_stops_answering_when_the_host_speaks() -> None:
    with joined(interruptible=True) as (channel, peer):
        peer.sendall(b"SYNC")
        with pytest.raises(Interrupted):
            channel.write(b"x" * 10_000_000)


def test_the_proof_is_found_wherever_it_is_cut() -> None:
    proof = b"SYNC-ACK 0123456789\n"
    for cut in range(len(proof)):
        with joined() as (channel, peer):
            peer.sendall(b"SYNC-ACK " * 30 + proof[:cut])
            timer = threading.Timer(0.001, peer.sendall, [proof[cut:] + b"next\n"])
            timer.start()
            channel.discard_until(proof)
            assert channel.line() == b"next"
            timer.join()


def test_a_flood_without_the_proof_ends_as_silence_does() -> None:
    with joined(patience=0.2) as (channel, peer), flooding(peer, b"x" * 65536):
        error = within(5, lambda: channel.discard_until(b"never sent"))
    assert isinstance(error, TimedOut)


def test_data_that_is_always_there_does_not_keep_a_read_from_being_cancelled() -> None:
    reader, writer = os.pipe()
    with joined(cancel=reader) as (channel, peer):
        peer.sendall(b"x" * CAPACITY)
        os.write(writer, b"x")
        with pytest.raises(Interrupted):
            channel.exactly(CAPACITY)
    os.close(reader)
    os.close(writer)


def test_a_peer_that_takes_everything_does_not_keep_a_write_from_being_cancelled() -> None:
    reader, writer = os.pipe()
    with joined(cancel=reader) as (channel, _):
        os.write(writer, b"x")
        with pytest.raises(Interrupted):
            channel.write(b"x")
    os.close(reader)
    os.close(writer)
