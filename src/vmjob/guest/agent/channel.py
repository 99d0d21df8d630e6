"""One lane seen as a byte stream that can be resynchronised.

Used by the agent on its virtio-serial ports and by the host for bulk transfers.
The descriptor is non-blocking; every wait has a deadline.
"""

from __future__ import annotations

import os
import select
import time

from .wire import MAX_HEAD, ProtocolError, parse_chunk_size

#: virtio-serial hands out input in buffers of one page; a read into a longer buffer still
#: returns one page, but a vector of page-sized buffers is filled in a single system call
#: (measured under TCG: 4 times fewer turns for a 64 KiB chunk).
PAGE = 4096
#: A write to a virtio-serial port takes at most this much at once (Linux, virtio_console.c).
PORT_WRITE = 32 * 1024
#: The most one vectored read asks for.
READ_VECTOR = 64


class Interrupted(Exception):
    """The peer spoke while we were answering: it has given up on this exchange."""


class Closed(Exception):
    """The other end is gone."""


class TimedOut(Exception):
    """The peer was silent for too long."""


class Channel:
    """Buffered reads and complete writes on a non-blocking descriptor.

    ``capacity`` bounds the largest piece that can be read at once. ``interruptible``
    writes raise `Interrupted` when the peer speaks meanwhile (the agent's side).
    ``patience`` is how many seconds the peer may be silent within an exchange (None:
    for ever, as for an agent that waits for its next request). Waits end with `Interrupted`
    when the descriptor ``cancel`` becomes readable (the host's side).
    """

    def __init__(self, fd: int, capacity: int, *, interruptible: bool = False,
                 patience: float | None = None, cancel: int | None = None) -> None:
        self.fd = fd
        self.patience = patience
        #: While the peer is known to stand still, its silence means nothing.
        self.peer_stands_still = False
        self._cancel = cancel
        self._interruptible = interruptible
        self._buffer = bytearray(capacity + MAX_HEAD + PAGE)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._poll = select.poll()
        if cancel is not None:
            self._poll.register(cancel, select.POLLIN)
        os.set_blocking(fd, False)

    # -- reading ------------------------------------------------------------------------

    def _fill(self, wait: float | None) -> None:
        """Read what there is, waiting for the first byte at most ``wait`` seconds."""
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._buffer) - self._end < PAGE:
            length = self._end - self._start
            self._buffer[:length] = self._buffer[self._start:self._end]
            self._start, self._end = 0, length
        room = min(len(self._buffer) - self._end, READ_VECTOR * PAGE)
        pieces = [self._view[at:min(at + PAGE, self._end + room)]
                  for at in range(self._end, self._end + room, PAGE)]
        deadline = None if wait is None else time.monotonic() + wait
        self._check_cancelled()
        while True:
            try:
                got = os.readv(self.fd, pieces)
            except BlockingIOError:
                got = -1
            except ConnectionError:
                got = 0
            if got > 0:
                self._end += got
                return
            if got == 0:
                raise Closed
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                if not self.peer_stands_still:
                    raise TimedOut
                assert wait is not None
                left, deadline = wait, time.monotonic() + wait
            self._wait(select.POLLIN, None if left is None else left + 0.001)

    def _wait(self, events: int, seconds: float | None) -> int:
        self._poll.register(self.fd, events)
        ready = dict(self._poll.poll(None if seconds is None else int(seconds * 1000)))
        if self._cancel in ready:
            raise Interrupted
        return ready.get(self.fd, 0)

    def _check_cancelled(self) -> None:
        """A peer that never lets us wait does not keep us from being cancelled."""
        if self._cancel is not None and self._cancel in dict(self._poll.poll(0)):
            raise Interrupted

    def line(self) -> bytes:
        """The next line without its end (CRLF or LF); at most `MAX_HEAD` bytes."""
        scanned = self._start
        while True:
            at = self._buffer.find(b"\n", scanned, self._end)
            if at >= 0:
                text = bytes(self._view[self._start:at])
                self._start = at + 1
                return text[:-1] if text.endswith(b"\r") else text
            if self._end - self._start > MAX_HEAD:
                raise ProtocolError("a line without end")
            unscanned = self._end - self._start
            self._fill(self.patience)
            scanned = self._start + unscanned

    def exactly(self, count: int) -> memoryview:
        """The next ``count`` bytes; the view is valid until the next read."""
        while self._end - self._start < count:
            if len(self._buffer) - self._start < count:
                length = self._end - self._start
                self._buffer[:length] = self._buffer[self._start:self._end]
                self._start, self._end = 0, length
            self._fill(self.patience)
        self._start += count
        return self._view[self._start - count:self._start]

    def skip_newlines(self) -> None:
        """Pass over empty lines between messages, waiting for ever for a message."""
        while True:
            rest = bytes(self._view[self._start:self._end]).lstrip(b"\r\n")
            self._start = self._end - len(rest)
            if rest:
                return
            self._fill(None)

    def head(self) -> list[bytes]:
        """The lines of a message's head, its first line included."""
        lines: list[bytes] = []
        total = 0
        while line := self.line():
            total += len(line)
            if total > MAX_HEAD:
                raise ProtocolError("a head without end")
            lines.append(line)
        return lines

    def chunk(self, most: int) -> memoryview | None:
        """The next chunk of a chunked body, or None at its end; valid until the next read."""
        size = parse_chunk_size(self.line(), most)
        piece = self.exactly(size + 2)
        if bytes(piece[size:]) != b"\r\n":
            raise ProtocolError("a chunk without its end")
        return piece[:size] if size else None

    def discard_until(self, proof: bytes) -> None:
        """Drop everything up to and with ``proof``; a flood without it ends as silence does."""
        deadline = None if self.patience is None else time.monotonic() + self.patience
        while (at := self._buffer.find(proof, self._start, self._end)) < 0:
            if deadline is not None and time.monotonic() > deadline and not self.peer_stands_still:
                raise TimedOut
            self._start = max(self._start, self._end - len(proof))
            self._fill(self.patience)
        self._start = at + len(proof)

    def drop(self) -> None:
        """Forget what was read and not used."""
        self._start = self._end

    # -- writing ------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data``; raises `Interrupted`, `Closed` or `TimedOut`."""
        view = memoryview(data)
        at = 0
        self._check_cancelled()
        while at < len(view):
            try:
                at += os.write(self.fd, view[at:at + PORT_WRITE])
            except BlockingIOError:
                wanted = select.POLLOUT | (select.POLLIN if self._interruptible else 0)
                ready = self._wait(wanted, self.patience)
                if not ready and not self.peer_stands_still:
                    raise TimedOut from None
                if ready & select.POLLIN and self._interruptible:
                    raise Interrupted from None
            except (ConnectionError, BrokenPipeError):
                raise Closed from None

    def interrupted(self) -> bool:
        """Whether the peer has said something that nobody has read yet."""
        return self._start < self._end or bool(self._wait(select.POLLIN, 0) & select.POLLIN)
