"""Lanes over one line and a small disk: nothing is lost, mixed up, or held up by another."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.guest.agent import trunk
from vmjob.guest.agent.trunk import EXCHANGE_SIZE, HEAD, MARK, Broken, Exchange, Trunk

LANES = 3


@dataclass
class Ends:
    """Our ends of the lanes on both sides, and the two threads' stops."""

    host: list[socket.socket]
    guest: list[socket.socket]


class Wire:
    """A line between two trunks on which a test can do harm."""

    def __init__(self) -> None:
        self.host, self._to_host = socket.socketpair()
        self.guest, self._to_guest = socket.socketpair()
        self.harm = lambda data: data
        self._threads = [
            threading.Thread(target=self._pass, args=pair, daemon=True)
            for pair in ((self._to_host, self._to_guest), (self._to_guest, self._to_host))]
        for thread in self._threads:
            thread.start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(4096):
                target.sendall(self.harm(data))
        except OSError:
            pass
        for each in (source, target):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        for each in (self.host, self.guest, self._to_host, self._to_guest):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join()
        for each in (self.host, self.guest, self._to_host, self._to_guest):
            each.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


@pytest.fixture
def ends(wire: Wire, tmp_path: Path) -> Iterator[Ends]:
    """Two trunks that carry."""
    disk = os.open(tmp_path / "exchange", os.O_RDWR | os.O_CREAT)
    os.ftruncate(disk, EXCHANGE_SIZE)
    stops, threads, pairs = [], [], []
    for line, host in ((wire.host, True), (wire.guest, False)):
        own = [socket.socketpair() for _ in range(LANES)]
        pairs.append(own)
        stop, told = os.pipe()
        stops.append((stop, told))
        threads.append(threading.Thread(target=_serve, daemon=True, args=(
            Trunk(line.fileno(), Exchange(disk, host=host), [each[1].fileno() for each in own],
                  host=host), stop)))
        threads[-1].start()
    made = Ends(*([pair[0] for pair in own] for own in pairs))
    for each in (*made.host, *made.guest):
        each.settimeout(20)
    made.host[0].sendall(b"begun")  # what a guest says before a session begins is forgotten
    receive(made.guest[0], 5)
    yield made
    for _, told in stops:
        os.close(told)
    for thread in threads:
        thread.join()
    for stop, _ in stops:
        os.close(stop)
    for own in pairs:
        for pair in own:
            pair[0].close()
            pair[1].close()
    os.close(disk)


def _serve(one: Trunk, stop: int) -> None:
    try:
        one.serve(stop)
    except (Broken, OSError):
        pass


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, "the lane ended"
        data += piece
    return data


def test_short_words_and_long_pieces_arrive_whole_in_order_on_their_lane(ends: Ends) -> None:
    chance = random.Random(1)
    said = {lane: [chance.randbytes(chance.choice((1, 7, 512, 513, 4096, 100_000, 300_000)))
                   for _ in range(12)] for lane in range(LANES)}
    for here, there in ((ends.host, ends.guest), (ends.guest, ends.host)):
        senders = [threading.Thread(target=lambda lane=lane, here=here: [
            here[lane].sendall(each) for each in said[lane]], daemon=True) for lane in said]
        for sender in senders:
            sender.start()
        for lane, pieces in said.items():
            assert receive(there[lane], sum(map(len, pieces))) == b"".join(pieces)
        for sender in senders:
            sender.join()


def test_no_slot_is_filled_again_before_it_was_read() -> None:
    """Not even when all lanes have something to say at once; the other side is silent here."""
    stop, told = os.pipe()
    filled: list[int] = []

    class Slots(Exchange):
        def __init__(self) -> None:
            pass

        def put(self, number: int, data: bytes | memoryview) -> None:
            filled.append(number)
            if len(filled) == trunk.SLOTS:
                os.write(told, b"enough")  # heard when all lanes had their turn

    line = socket.socketpair()
    lanes = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(LANES)]
    for ours, _ in lanes:
        for _ in range(trunk.SLOTS):
            ours.send(bytes(trunk.MAX_INLINE + 1))
    Trunk(line[0].fileno(), Slots(), [each.fileno() for _, each in lanes], host=False).serve(stop)
    for fd in (stop, told):
        os.close(fd)
    for each in (*line, *(each for lane in lanes for each in lane)):
        each.close()
    assert filled == list(range(trunk.SLOTS))


def test_a_lane_whose_reader_sleeps_holds_up_no_other(ends: Ends) -> None:
    ends.guest[0].setblocking(False)
    sent = 0
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # until nothing more is taken for a while
        try:
            sent += ends.guest[0].send(bytes(65536))
        except BlockingIOError:
            ends.guest[1].sendall(b"ping")
            assert receive(ends.host[1], 4) == b"ping"
            try:
                sent += ends.guest[0].send(bytes(65536))
            except BlockingIOError:
                break
    assert sent >= trunk.WINDOW
    ends.guest[0].setblocking(True)
    assert receive(ends.host[0], sent) == bytes(sent)


def test_what_the_line_loses_or_damages_comes_again(ends: Ends, wire: Wire,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "PATIENCE", 0.05)
    chance = random.Random(2)
    harms = [lambda data: data[1:], lambda data: bytes([data[0] ^ 1]) + data[1:],
             lambda data: data + data, lambda data: b"", lambda data: b"noise" + data]

    def harm(data: bytes) -> bytes:
        return chance.choice(harms)(data) if chance.random() < 0.2 else data

    wire.harm = harm  # type: ignore[assignment]
    for _ in range(40):
        piece = chance.randbytes(chance.choice((3, 400, 5000)))
        ends.host[2].sendall(piece)
        assert receive(ends.guest[2], len(piece)) == piece
        ends.guest[2].sendall(piece)
        assert receive(ends.host[2], len(piece)) == piece


def test_a_new_session_begins_with_nothing_of_the_old_one(wire: Wire, tmp_path: Path) -> None:
    """The guest's end stays, as in a machine that continues elsewhere; the host's is another."""
    disk = os.open(tmp_path / "exchange", os.O_RDWR | os.O_CREAT)
    os.ftruncate(disk, EXCHANGE_SIZE)
    guest, theirs = socket.socketpair()
    stop, told = os.pipe()
    thread = threading.Thread(target=_serve, daemon=True, args=(
        Trunk(wire.guest.fileno(), Exchange(disk, host=False), [theirs.fileno()], host=False),
        stop))
    thread.start()
    for word in (b"first", b"second"):
        ours, lane = socket.socketpair()
        ours.settimeout(20)
        end, tell = os.pipe()
        carrier = threading.Thread(target=_serve, daemon=True, args=(
            Trunk(wire.host.fileno(), Exchange(disk, host=True), [lane.fileno()], host=True),
            end))
        carrier.start()
        ours.sendall(word)
        assert receive(guest, len(word)) == word
        guest.sendall(word.upper())
        assert receive(ours, len(word)) == word.upper()
        os.close(tell)
        carrier.join()
        os.close(end)
        ours.close()
        lane.close()
    os.close(told)
    thread.join()
    for each in (guest, theirs):
        each.close()
    os.close(stop)
    os.close(disk)


def lone(tmp_path: Path) -> tuple[Trunk, socket.socket, list[int]]:
    """A host's end with an open session, the other end of its line, and what to close."""
    disk = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE)
    os.ftruncate(disk, EXCHANGE_SIZE)
    line, peer = socket.socketpair()
    lane, ours = socket.socketpair()
    made = Trunk(line.detach(), Exchange(disk, host=True), [lane.detach()], host=True)
    made._open = True
    return made, peer, [disk, made._line, made._lanes[0], ours.detach(), peer.fileno()]


def hear_all(made: Trunk) -> None:
    while True:
        made._hear()


@given(st.lists(st.one_of(
    st.binary(max_size=100),
    st.builds(lambda kind, lane, number, data: trunk._frame(
        kind, lane, number, len(data), trunk.zlib.crc32(data)) + data,
        st.integers(0, 255), st.integers(0, 255), st.integers(0, 3), st.binary(max_size=80)),
    st.builds(lambda length: trunk._frame(trunk.SLOT, 0, 0, length, 0),
              st.integers(0, 1 << 32 - 1)))))
def test_a_guest_that_sends_anything_breaks_no_more_than_its_own_lanes(
        tmp_path_factory: pytest.TempPathFactory, sent: list[bytes]) -> None:
    made, peer, fds = lone(tmp_path_factory.getbasetemp())
    try:
        peer.sendall(b"".join(sent))
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(Broken):
            hear_all(made)
        assert len(made._in) <= HEAD.size + trunk.MAX_INLINE + trunk.LINE
        assert sum(map(len, made._pending)) <= trunk.WINDOW
    finally:
        peer.detach()
        for fd in fds:
            os.close(fd)


def test_a_mark_within_noise_is_no_frame(tmp_path: Path) -> None:
    made, peer, fds = lone(tmp_path)
    try:
        good = trunk._frame(trunk.INLINE, 0, 0, 2, trunk.zlib.crc32(b"ok")) + b"ok"
        peer.sendall(MARK * 40 + b"\0" * 30 + good)
        made._hear()
        assert os.read(fds[3], 10) == b"ok"
    finally:
        peer.detach()
        for fd in fds:
            os.close(fd)
