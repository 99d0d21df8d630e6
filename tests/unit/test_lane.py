"""The host's end of a lane against a peer that does what it likes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable

import anyio
import pytest

from vmjob.errors import (
    AgentLost,
    AgentProtocol,
    AgentSilent,
    GuestRefused,
    ImageOutdated,
    VmjobError,
)
from vmjob.guest.agent import wire
from vmjob.guest.lane import Lane, refusal

pytestmark = pytest.mark.anyio

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def answered(script: Script, *, deadline: float = 5.0, requests: int = 1) -> bytes:
    """The body of the last answer when the peer follows ``script``."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    peer = asyncio.ensure_future(script(reader, writer))
    lane = Lane(ours, "test")
    try:
        for _ in range(requests):
            answer = await lane.request("GET", "/v1/x", deadline=deadline)
        return answer.body
    finally:
        peer.cancel()
        await asyncio.wait([peer])
        writer.close()
        lane.close()


async def synchronise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                      before: bytes = b"") -> None:
    while not (line := await reader.readline()).startswith(wire.SYNC):
        assert line == b"\n"
    writer.write(before + wire.SYNC_ACK + line[len(wire.SYNC):])
    await writer.drain()


async def request(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n")


def answer(body: bytes, **fields: str) -> bytes:
    return wire.response_head(200, {"content-length": str(len(body)), **fields}) + body


async def test_stale_bytes_before_the_resynchronisation_are_dropped() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await synchronise(reader, writer, before=answer(b"old") * 1000 + b"SYNC-ACK ")
        await request(reader)
        writer.write(answer(b"new"))

    assert await answered(script) == b"new"


@pytest.mark.parametrize(("said", "error"), [
    (b"garbage\r\n\r\n", AgentProtocol),
    (b"\xff" * 20_000, AgentProtocol),
    (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, AgentProtocol),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n", AgentProtocol),
    (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", AgentProtocol),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", AgentProtocol),
    (answer(b"one") + b"more", AgentProtocol),
    (wire.response_head(404, {"content-length": "4"}) + b"nope", AgentProtocol),
    (wire.response_head(404, {"content-length": "2"}) + b"{}", GuestRefused),
    (wire.response_head(404, {"content-length": "27"}) + b'{"error":"unknown-request"}',
     ImageOutdated),
])
async def test_an_answer_that_breaks_the_protocol_is_an_error(
        said: bytes, error: type[VmjobError]) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await synchronise(reader, writer)
        await request(reader)
        writer.write(said)

    with pytest.raises(error):
        await answered(script)


async def test_a_refusal_cannot_command_the_terminal() -> None:
    said = {"error": "i\x1bo", "message": "\x1b]52;c;eA==\x07no\nroom\x9b2J \u202eleft \u00e9"}
    error = refusal(400, json.dumps(said).encode())
    assert error.message == ("the machine refused: \ufffd]52;c;eA==\ufffdno room\ufffd2J "
                             "\ufffdleft \u00e9")
    assert error.context["reason"] == "i\ufffdo"


async def test_a_header_without_end_costs_no_memory() -> None:
    taken = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        await synchronise(reader, writer)
        await request(reader)
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            taken += 65536

    with pytest.raises(AgentProtocol, match="head"):
        await answered(script)
    assert taken < 4_000_000


async def test_silence_ends_at_the_deadline() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await synchronise(reader, writer)
        await reader.read()

    with pytest.raises(AgentSilent, match=r"no answer to GET /v1/x within 0\.2"):
        await answered(script, deadline=0.2)


async def test_a_peer_that_hangs_up_is_lost() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await synchronise(reader, writer)
        writer.close()

    with pytest.raises(AgentLost):
        await answered(script)


async def test_after_a_cancelled_request_the_next_one_gets_its_own_answer() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    lane = Lane(ours, "test")
    asked = asyncio.Event()

    async def script() -> None:
        await synchronise(reader, writer)
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
        asked.set()
        await synchronise(reader, writer, before=b"ngth: 5\r\n\r\nwrong")
        await request(reader)
        writer.write(answer(b"right"))

    peer = asyncio.ensure_future(script())
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(lane.request, "GET", "/v1/first")
            await asked.wait()
            scope.cancel()
    assert (await lane.request("GET", "/v1/second")).body == b"right"
    await peer
    writer.close()
    lane.close()


async def test_two_callers_of_one_lane_get_their_own_answers() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    lane = Lane(ours, "test")

    async def script() -> None:
        await synchronise(reader, writer)
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(answer(json.dumps({"target": head.split(b" ")[1].decode()}).encode()))

    peer = asyncio.ensure_future(script())
    found: dict[str, object] = {}

    async def ask(target: str) -> None:
        found[target] = (await lane.request("GET", target)).json()["target"]

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(ask, f"/v1/{number}")
    assert found == {f"/v1/{number}": f"/v1/{number}" for number in range(20)}
    peer.cancel()
    await asyncio.wait([peer])
    writer.close()
    lane.close()
