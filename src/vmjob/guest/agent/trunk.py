"""All lanes over one serial line and a small disk, for hypervisors without virtio-serial.

A UART carries 50 to 120 KB/s and each of its bytes costs an exit of the guest; a disk that both
sides have open carries 65 MB/s (measured, VirtualBox's interpreter). So what is short goes over the
line, what is long is laid into a slot of the disk, and the line only says that it is there.

Frames are numbered, checksummed and acknowledged; what is not acknowledged in time is sent again,
and no lane sends more than its reader has room for. The host begins each session with a reset:
what was under way is then forgotten on both sides. One class for both ends, so that a test of one
is a test of the other.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
import zlib
from collections import deque
from collections.abc import Sequence

#: Mark of a frame, kind, lane, number, length, checksum of the content, checksum of the head.
HEAD = struct.Struct(">2sBBIIII")
HEAD_CHECKED = HEAD.size - 4
MARK = b"\xa5V"
INLINE, SLOT, ACK, RESET, RESET_DONE = range(1, 6)
#: Longest content that goes over the line, bytes: what a disk's answer (3 ms) takes as well.
MAX_INLINE = 512
#: One slot of the disk, bytes; and how many each side may fill.
SLOT_SIZE = 128 * 1024
SLOTS = 8
#: The disk begins with this, so that the guest knows it; then the host's slots, then the guest's.
EXCHANGE_MARK = b"vmjob-exchange-1\n"
EXCHANGE_HEAD = 4096
EXCHANGE_SIZE = EXCHANGE_HEAD + 2 * SLOTS * SLOT_SIZE
#: What a disk reads and writes at least.
SECTOR = 4096
#: Bytes of a lane that may be under way to a reader that does not take them.
WINDOW = 256 * 1024
#: Frames that may be under way.
MOST_FRAMES = 64
#: Seconds without an acknowledgement after which everything that lacks one is sent again. The
#: line itself loses nothing; a machine that continues elsewhere lost what was on it.
PATIENCE = 3.0
#: Seconds between resets until the other side answers.
RESET_PERIOD = 0.5
#: Bytes of the line that are read, and lie ready to be written, at most.
LINE = 4096
ACKED = struct.Struct(">I")
NONCE = 8


class Broken(Exception):
    """The other side sends what it may not, or is gone."""


class Exchange:
    """The disk's slots: ours to write, the other side's to read. ``fd`` may be opened O_DIRECT."""

    def __init__(self, fd: int, *, host: bool) -> None:
        self._fd = fd
        half = SLOTS * SLOT_SIZE
        self._ours = EXCHANGE_HEAD + (0 if host else half)
        self._theirs = EXCHANGE_HEAD + (half if host else 0)
        self._buffer = mmap.mmap(-1, SLOT_SIZE)  # aligned, as O_DIRECT wants it
        self._view = memoryview(self._buffer)

    def put(self, number: int, data: bytes | memoryview) -> None:
        """Fill the ``number``-th slot since the session's start."""
        self._view[:len(data)] = data
        whole = self._view[:-(-len(data) // SECTOR) * SECTOR]
        os.pwritev(self._fd, [whole], self._ours + number % SLOTS * SLOT_SIZE)

    def get(self, number: int, length: int) -> bytes:
        """What is in the other side's ``number``-th slot."""
        whole = self._view[:-(-length // SECTOR) * SECTOR]
        os.preadv(self._fd, [whole], self._theirs + number % SLOTS * SLOT_SIZE)
        return bytes(self._view[:length])


class Trunk:
    """One end. ``serve`` blocks until it is stopped, the line ends, or all lanes are closed.

    ``line`` is the serial line, ``lanes`` the descriptors of this side's lanes, in the order that
    both sides know; all become non-blocking. The host's end begins sessions.
    """

    def __init__(self, line: int, exchange: Exchange, lanes: Sequence[int], *, host: bool) -> None:
        self._line = line
        self._exchange = exchange
        self._lanes = list(lanes)
        self._host = host
        self._in = bytearray()
        self._out = bytearray()
        self._poll = select.poll()
        self._watched: dict[int, int] = {}
        self._nonce = os.urandom(NONCE) if host else b""
        self._open = not host
        self._reset_due = 0.0
        #: Lanes that nobody on this side reads and writes any more.
        self._closed: set[int] = set()
        self._begin()
        for fd in (line, *lanes):
            os.set_blocking(fd, False)

    def _begin(self) -> None:
        """Forget what was under way."""
        count = len(self._lanes)
        self._sent = [0] * count  # bytes of each lane, since the session's start
        self._taken = [0] * count  # of those, what its reader has taken
        self._got = [0] * count
        self._given = [0] * count
        self._pending = [bytearray() for _ in self._lanes]
        self._next = self._expected = 0
        self._filled = self._emptied = 0
        self._under_way: deque[tuple[int, bytes, bool]] = deque()
        self._heard = time.monotonic()
        self._ack_due = False

    # -- the loop ------------------------------------------------------------------------------

    def serve(self, stop: int | None = None) -> None:
        """Carry until ``stop`` (a descriptor) can be read; raises `Broken`."""
        if stop is not None:
            self._poll.register(stop, select.POLLIN)
        while True:
            self._tend()
            ready = dict(self._poll.poll(self._wait()))
            if stop is not None and stop in ready:
                return
            events = ready.get(self._line, 0)
            if events & ~select.POLLOUT:
                self._hear()
            for number, fd in enumerate(self._lanes):
                events = ready.get(fd, 0)
                if events & select.POLLOUT:
                    self._give(number)
                # Asked again: the lanes before it may have filled the last slot just now.
                if events & ~select.POLLOUT and self._may_send(number):
                    self._take(number)
            if len(self._closed) == len(self._lanes) and not self._out and not self._under_way:
                return

    def _wait(self) -> int:
        """Milliseconds until something is due that nobody announces."""
        if not self._open:
            return int(RESET_PERIOD * 1000)
        return int(PATIENCE * 1000) if self._under_way else 3_600_000

    def _tend(self) -> None:
        """Send what is due, and listen to whom there is something to say or hear."""
        now = time.monotonic()
        if not self._open and now >= self._reset_due and not self._out:
            self._reset_due = now + RESET_PERIOD
            self._say(RESET, 0, 0, self._nonce)
        if self._under_way and now - self._heard >= PATIENCE and not self._out:
            self._heard = now
            for _, frame, _ in self._under_way:
                self._out += frame
        if self._ack_due and len(self._out) < LINE:
            self._ack_due = False
            given = b"".join(ACKED.pack(count & 0xffffffff) for count in self._given)
            self._say(ACK, 0, self._expected, given)
        self._write()
        self._watch(self._line, select.POLLIN | (select.POLLOUT if self._out else 0))
        for number, fd in enumerate(self._lanes):
            events = 0
            if number not in self._closed:
                if self._pending[number]:
                    events |= select.POLLOUT
                if self._may_send(number):
                    events |= select.POLLIN
            self._watch(fd, events)

    def _watch(self, fd: int, events: int) -> None:
        if self._watched.get(fd) != events:
            if events:
                self._poll.register(fd, events)
            elif fd in self._watched:
                self._poll.unregister(fd)
            self._watched[fd] = events
            if not events:
                del self._watched[fd]

    # -- from our lanes to the line ------------------------------------------------------------

    def _may_send(self, number: int) -> bool:
        # Half a line stays free for acknowledgements, and so that what is said soon is said now.
        return (self._open and bool(self._room(number)) and len(self._under_way) < MOST_FRAMES
                and len(self._out) < LINE
                and sum(slot for _, _, slot in self._under_way) < SLOTS)

    def _room(self, number: int) -> int:
        return WINDOW - (self._sent[number] - self._taken[number])

    def _take(self, number: int) -> None:
        """Send what a lane has to say."""
        try:
            data = os.read(self._lanes[number], min(self._room(number), SLOT_SIZE))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._closed.add(number)
            return
        self._sent[number] += len(data)
        in_slot = len(data) > MAX_INLINE
        if in_slot:
            self._exchange.put(self._filled, data)
            self._filled += 1
            frame = _frame(SLOT, number, self._next, len(data), zlib.crc32(data))
        else:
            frame = _frame(INLINE, number, self._next, len(data), zlib.crc32(data)) + data
        if not self._under_way:
            self._heard = time.monotonic()
        self._under_way.append((self._next, frame, in_slot))
        self._next += 1
        self._out += frame

    def _say(self, kind: int, lane: int, number: int, data: bytes) -> None:
        self._out += _frame(kind, lane, number, len(data), zlib.crc32(data)) + data

    def _write(self) -> None:
        try:
            while self._out:
                del self._out[:os.write(self._line, self._out[:LINE])]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Broken(f"the line is gone: {error.strerror}") from None

    # -- from the line to our lanes ------------------------------------------------------------

    def _hear(self) -> None:
        try:
            data = os.read(self._line, LINE)
        except BlockingIOError:
            return
        except OSError as error:
            raise Broken(f"the line is gone: {error.strerror}") from None
        if not data:
            raise Broken("the line has ended")
        self._in += data
        while self._frame():
            pass

    def _frame(self) -> bool:
        """Obey the next whole frame, if there is one."""
        at = self._in.find(MARK)
        if at < 0:
            del self._in[:max(0, len(self._in) - 1)]  # its last byte may begin a mark
            return False
        del self._in[:at]
        if len(self._in) < HEAD.size:
            return False
        _, kind, lane, number, length, checksum, of_head = HEAD.unpack_from(self._in)
        inline = 0 if kind == SLOT else length
        if zlib.crc32(self._in[:HEAD_CHECKED]) != of_head or inline > MAX_INLINE:
            del self._in[:1]  # no frame begins here
            return True
        if len(self._in) < HEAD.size + inline:
            return False
        data = bytes(self._in[HEAD.size:HEAD.size + inline])
        if kind != SLOT and zlib.crc32(data) != checksum:
            del self._in[:1]
            return True
        del self._in[:HEAD.size + inline]
        if kind in (RESET, RESET_DONE):
            self._reset(kind, data)
        elif not self._open:
            pass  # of a session that is over
        elif kind == ACK:
            self._acknowledged(number, data)
        elif number == self._expected:
            self._arrived(kind, lane, length, checksum, data)
        else:
            self._ack_due = True  # again, or too early: it will come again
        return True

    def _reset(self, kind: int, nonce: bytes) -> None:
        if self._host:
            if kind == RESET_DONE and nonce == self._nonce and not self._open:
                self._open = True
                self._begin()
        elif kind == RESET:
            if nonce != self._nonce:
                self._nonce = nonce
                self._begin()
                self._out.clear()
            self._say(RESET_DONE, 0, 0, nonce)

    def _acknowledged(self, number: int, data: bytes) -> None:
        if len(data) != ACKED.size * len(self._lanes):
            raise Broken("an acknowledgement of other lanes")
        while self._under_way and (number - self._under_way[0][0]) & 0xffffffff < 1 << 31 \
                and number != self._under_way[0][0]:
            self._under_way.popleft()
            self._heard = time.monotonic()
        for lane, (count,) in enumerate(ACKED.iter_unpack(data)):
            taken = self._taken[lane] + ((count - self._taken[lane]) & 0xffffffff)
            if taken - self._taken[lane] >= 1 << 31:
                continue  # an older one than the last
            if taken > self._sent[lane]:
                raise Broken("an acknowledgement of what was never sent")
            self._taken[lane] = taken

    def _arrived(self, kind: int, lane: int, length: int, checksum: int, data: bytes) -> None:
        if kind == SLOT and 0 < length <= SLOT_SIZE:
            data = self._exchange.get(self._emptied, length)
            if zlib.crc32(data) != checksum:
                return  # not there yet, or not any more: it will be said again
            self._emptied += 1
        elif kind != INLINE:
            raise Broken("a frame of an unknown kind")
        if lane >= len(self._lanes) or self._got[lane] + length - self._given[lane] > WINDOW:
            raise Broken("more than there is room for")
        self._expected += 1
        self._got[lane] += length
        self._ack_due = True
        self._pending[lane] += data
        self._give(lane)

    def _give(self, number: int) -> None:
        """Let a lane's reader have what has come for it."""
        pending = self._pending[number]
        try:
            while pending:
                count = os.write(self._lanes[number], pending)
                del pending[:count]
                self._given[number] += count
                self._ack_due = True
        except BlockingIOError:
            pass
        except OSError:
            self._given[number] += len(pending)
            pending.clear()
            self._closed.add(number)
            self._ack_due = True


def _frame(kind: int, lane: int, number: int, length: int, checksum: int) -> bytes:
    head = HEAD.pack(MARK, kind, lane, number & 0xffffffff, length, checksum, 0)[:HEAD_CHECKED]
    return head + zlib.crc32(head).to_bytes(4, "big")
