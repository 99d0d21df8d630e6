"""The host's end of one lane: requests with deadlines on an asyncio socket.

The guest is hostile: every length is bounded (`wire`), every wait has a deadline, and
what does not parse is an error, never a guess. A request that is cancelled or fails
half-way leaves the lane *dirty*; the next one begins with a resynchronisation.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import socket
from collections.abc import Mapping
from typing import Any

import anyio

from vmjob.errors import (
    AgentLost,
    AgentProtocol,
    AgentSilent,
    GuestRefused,
    ImageOutdated,
    UsageError,
)
from vmjob.guest.agent import wire

__all__ = ["DEADLINE", "Answer", "Lane", "parse_object", "printable", "refusal", "resync_message"]

#: Seconds for an answer that needs no more than the agent's attention. Under TCG on a busy
#: computer an answer takes milliseconds; a minute without one is a machine that hangs.
DEADLINE = 60.0
#: Bytes asked from the socket at once.
RECEIVE = 256 * 1024
_HALF = re.compile("[\ud800-\udfff]")


class Answer:
    """A complete response: ``body`` is at most `wire.MAX_RESPONSE_BODY` bytes."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body

    def json(self, *, names: bool = False) -> dict[str, Any]:
        return parse_object(self.body, names=names)


def parse_object(body: bytes, *, names: bool = False) -> dict[str, Any]:
    """A JSON object from the guest; raises `AgentProtocol` for anything else.

    Half surrogates, which no text can hold that is written down, become U+FFFD; not with ``names``
    of files, in which they stand for bytes that are no UTF-8.
    """
    try:
        text = body.decode()
        content = json.loads(text)
        if not names and re.search(r"\\u[dD]", text):  # in hardly any answer
            content = json.loads(_HALF.sub("\ufffd", json.dumps(content, ensure_ascii=False)))
    except (ValueError, RecursionError):
        raise AgentProtocol("the agent's answer is not JSON") from None
    if not isinstance(content, dict):
        raise AgentProtocol("the agent's answer is not an object")
    return content


def printable(text: str) -> str:
    """Words of a guest on one line, without what would command the terminal that shows them."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}"
                   for c in text)


def refusal(status: int, body: bytes) -> GuestRefused | ImageOutdated:
    """The error that an answer other than 200 stands for.

    An agent that does not know a request is older than it: of an image that was built before.
    """
    said = parse_object(body)
    reason = printable(str(said.get("error", ""))[:40])
    message = printable(str(said.get("message", ""))[:500])
    if reason == "unknown-request":
        return ImageOutdated("the image was built by an older vmjob, whose agent lacks something "
                             "that this job needs")
    return GuestRefused(f"the machine refused: {message or reason}", reason=reason, status=status)


def resync_message() -> tuple[bytes, bytes]:
    """What ends any exchange that was cut off, and the answer that proves it."""
    nonce = os.urandom(wire.NONCE_LENGTH // 2).hex().encode()
    return (wire.RESYNC_FILLER + wire.SYNC + nonce + b"\n", wire.SYNC_ACK + nonce + b"\n")


class Lane:
    """Requests on one lane, one at a time; callers queue."""

    def __init__(self, sock: socket.socket, name: str, *, clean: bool = False,
                 slowness: float = 1.0) -> None:
        sock.setblocking(False)
        self._slowness = slowness
        self.name = name
        self.received = 0
        self.sent = 0
        self._sock = sock
        self._buffer = bytearray()
        self._dirty = not clean
        self._lock = anyio.Lock()
        self._scope: anyio.CancelScope | None = None
        #: Seconds that the exchange under way may still take, while the machine stands still.
        self._left: float | None = None
        self._still = False

    def stand_still(self) -> None:
        """The machine is suspended: from now on no deadline comes nearer."""
        if self._still:
            return
        self._still = True
        if self._scope is not None:
            self._left = self._scope.deadline - anyio.current_time()
            self._scope.deadline = math.inf

    def go_on(self) -> None:
        """The machine runs again."""
        self._still = False
        if self._scope is not None and self._left is not None:
            self._scope.deadline = anyio.current_time() + self._left
        self._left = None

    async def request(self, method: str, target: str, body: bytes | Mapping[str, Any] = b"", *,
                      deadline: float = DEADLINE) -> Answer:
        """Ask, and wait at most ``deadline`` seconds for the whole answer; longer in slow machines.

        Raises `AgentSilent`, `AgentProtocol`, `AgentLost`, or `GuestRefused` when the agent
        answers with an error; `UsageError` for more than it would read.
        """
        deadline *= self._slowness
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if len(data) > wire.MAX_REQUEST_PIECE:
            raise UsageError(
                f"{len(data)} bytes of arguments, environment or message: a machine takes "
                f"{wire.MAX_REQUEST_PIECE} at once",
                advice="Put long lists into a file, and give the machine that (--in FILE).")
        head = wire.request_head(method, target, {"content-length": str(len(data))})
        async with self._lock:
            try:
                with anyio.fail_after(None if self._still else deadline) as self._scope:
                    self._left = deadline if self._still else None
                    if self._dirty:
                        await self._resynchronise()
                    self._dirty = True
                    await self._send(head + data)
                    answer = await self._receive_answer()
                    self._dirty = False
            except TimeoutError:
                raise AgentSilent(f"no answer to {method} {target.partition('?')[0]} within "
                                  f"{deadline:g} seconds") from None
            finally:
                self._scope = None
        if answer.status != 200:
            raise refusal(answer.status, answer.body)
        return answer

    def close(self) -> None:
        self._sock.close()

    async def _resynchronise(self) -> None:
        message, proof = resync_message()
        self._buffer.clear()
        # The filler fits into the socket's buffer, so this never waits for an agent that sends.
        await self._send(message)
        while (at := self._buffer.find(proof)) < 0:
            del self._buffer[:max(0, len(self._buffer) - len(proof))]
            await self._receive()
        if at + len(proof) != len(self._buffer):
            raise AgentProtocol("the agent speaks without being asked")
        self._buffer.clear()
        self._dirty = False

    async def _send(self, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._sock, data)
        except OSError as error:
            raise AgentLost("the machine closed its end") from error
        self.sent += len(data)

    async def _receive(self) -> None:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, RECEIVE)
        except OSError as error:
            raise AgentLost("the machine closed its end") from error
        if not data:
            raise AgentLost("the machine closed its end")
        self.received += len(data)
        self._buffer += data

    async def _receive_answer(self) -> Answer:
        while (end := self._buffer.find(b"\r\n\r\n", 0, wire.MAX_HEAD)) < 0:
            if len(self._buffer) > wire.MAX_HEAD:
                raise AgentProtocol("the agent's answer has a head without end")
            await self._receive()
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        try:
            status = wire.parse_status_line(lines[0])
            length = wire.parse_length(wire.parse_fields(lines[1:]), wire.MAX_RESPONSE_BODY)
            if length is None:
                raise wire.ProtocolError("a chunked answer where none is taken")
        except wire.ProtocolError as error:
            raise AgentProtocol(f"the agent broke the protocol: {error}") from None
        total = end + 4 + length
        while len(self._buffer) < total:
            await self._receive()
        if len(self._buffer) > total:
            raise AgentProtocol("the agent speaks without being asked")
        body = bytes(self._buffer[end + 4:total])
        self._buffer.clear()
        return Answer(status, body)

