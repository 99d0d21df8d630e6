"""A lane of short exchanges, served by the loop: whole requests in, answers out, never blocking."""

from __future__ import annotations

import os
from collections.abc import Callable

from . import wire
from .channel import PAGE, PORT_WRITE, READ_VECTOR
from .loop import READ, WRITE, Loop
from .request import Request


class Parser:
    """Bytes to requests. After anything odd it hunts for a resynchronisation.

    `feed` returns complete requests and, as bytes, the nonces of resynchronisations. Everything
    before a resynchronisation is void, so requests that came with it are not returned.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._lost = False

    def feed(self, data: bytes) -> list[Request | bytes]:
        self._buffer += data
        found: list[Request | bytes] = []
        while (one := self._next()) is not None:
            if isinstance(one, bytes):
                found.clear()
            found.append(one)
        return found

    def lose(self) -> None:
        """Trust nothing until the next resynchronisation."""
        self._lost = True

    def _next(self) -> Request | bytes | None:
        while True:
            skip = len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))
            del self._buffer[:skip]
            end = self._buffer.find(b"\n", 0, wire.MAX_HEAD)
            if end < 0:
                if len(self._buffer) >= wire.MAX_HEAD:
                    self._lost = True
                    self._buffer.clear()
                return None
            line = bytes(self._buffer[:end])
            if nonce := sync_nonce(line):
                del self._buffer[:end + 1]
                self._lost = False
                return nonce
            if self._lost:
                del self._buffer[:end + 1]
                continue
            try:
                return self._request()
            except wire.ProtocolError:
                self._lost = True

    def _request(self) -> Request | None:
        end = self._buffer.find(b"\r\n\r\n", 0, wire.MAX_HEAD)
        if end < 0:
            if len(self._buffer) >= wire.MAX_HEAD:
                raise wire.ProtocolError("a head without end")
            return None
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        method, target = wire.parse_request_line(lines[0])
        fields = wire.parse_fields(lines[1:])
        length = wire.parse_length(fields, wire.MAX_REQUEST_PIECE)
        if length is None:
            raise wire.ProtocolError("a chunked body where none is taken")
        if len(self._buffer) < end + 4 + length:
            return None
        body = bytes(self._buffer[end + 4:end + 4 + length])
        del self._buffer[:end + 4 + length]
        return Request(method, target, fields, body)


def sync_nonce(line: bytes) -> bytes | None:
    """The nonce of a ``SYNC`` line, or None for any other line."""
    line = line.removesuffix(b"\r")
    if line.startswith(wire.SYNC) and len(line) == len(wire.SYNC) + wire.NONCE_LENGTH:
        return line[len(wire.SYNC):]
    return None


class Lane:
    """Joins a descriptor to a handler of requests.

    ``handle(request)`` returns the whole answer, or None when it will call `answer` later. When
    the host speaks before it got its answer, ``abandon()`` is called: it no longer wants it.
    """

    def __init__(self, loop: Loop, fd: int, handle: Callable[[Request], bytes | None],
                 abandon: Callable[[], None], closed: Callable[[], None]) -> None:
        self._loop = loop
        self._fd = fd
        self._handle = handle
        self._abandon = abandon
        self._closed = closed
        self._parser = Parser()
        self._out = bytearray()
        self._answering = False
        self._blocked = False
        # Pages, because virtio-serial returns one page per buffer (see `channel`).
        self._pages = [bytearray(PAGE) for _ in range(READ_VECTOR // 2)]
        os.set_blocking(fd, False)
        loop.watch(fd, READ, self._ready)

    def answer(self, data: bytes) -> None:
        """Send the answer to the last request."""
        self._answering = False
        self._out += data
        self._flush()

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if not events & ~WRITE:
            return
        try:
            data = self._read()
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._loop.unwatch(self._fd)
            self._closed()
            return
        for one in self._parser.feed(data):
            if self._answering or self._out:
                # No pipelining: the host has given up on the exchange that is under way.
                self._answering = False
                self._out.clear()
                self._abandon()
                if isinstance(one, Request):
                    self._parser.lose()
                    return
            if isinstance(one, Request):
                self._answering = True
                answer = self._handle(one)
                if answer is not None:
                    self.answer(answer)
            else:
                self.answer(wire.SYNC_ACK + one + b"\n")

    def _read(self) -> bytes:
        """What has come, b"" for the end: mostly a page or less, for which no vector is set up."""
        data = os.read(self._fd, PAGE)
        if len(data) < PAGE:
            return data
        try:
            got = os.readv(self._fd, self._pages)
        except BlockingIOError:
            return data
        return b"".join([data, *self._pages[:-(-got // PAGE)]])[:PAGE + got]

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[:os.write(self._fd, self._out[:PORT_WRITE])]
        except BlockingIOError:
            pass
        except ConnectionError:
            self._out.clear()
        if self._blocked != bool(self._out):
            self._blocked = not self._blocked
            self._loop.watch(self._fd, READ | (WRITE if self._blocked else 0), self._ready)
