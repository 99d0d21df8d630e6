"""Servers in machines, and what is exchanged with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from vmjob.guest.client import AgentClient, Stream
from vmjob.machine.contract import Machine

__all__ = ["ENDLESS", "EXCHANGER", "SERVER", "exchange", "server_in"]

#: Seconds for a server to begin, or to answer; under emulation on a loaded computer.
PATIENCE = 120.0

#: Says which port it listens at, then answers every connection with what it was sent, doubled.
SERVER = """
import socket
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
while True:
    connection, _ = server.accept()
    with connection:
        connection.sendall(connection.recv(100) * 2)
"""

#: The same, and the answer is longer than the question, which may be long.
EXCHANGER = """
import socket
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
while True:
    connection, _ = server.accept()
    with connection:
        while connection.recv(65536):
            pass
        connection.sendall(bytes(300000))
"""
#: Whoever connects is sent as much as the line carries.
ENDLESS = """
import socket
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
while True:
    connection, _ = server.accept()
    with connection:
        while True:
            connection.sendall(bytes(65536))
"""


@asynccontextmanager
async def server_in(client: AgentClient, program: str = SERVER) -> AsyncIterator[int]:
    """A server in the machine; its port."""
    told = anyio.Event()
    said = b""

    async def take(stream: Stream, data: bytes) -> None:
        nonlocal said
        said += data
        if b"\n" in said:
            told.set()

    task = await client.start(["python3", "-u", "-c", program])
    async with anyio.create_task_group() as group:
        group.start_soon(client.follow, task, take)
        with anyio.fail_after(PATIENCE):
            await told.wait()
        yield int(said)
        group.cancel_scope.cancel()


async def exchange(machine: Machine, port: int) -> None:
    """Some bytes to the machine and more from it, which it counts."""
    before = machine.traffic()
    with anyio.fail_after(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(bytes(50_000))
        writer.write_eof()
        assert len(await reader.read(-1)) == 300_000
        writer.close()
        await writer.wait_closed()
    sent, received = (now - then for now, then in zip(machine.traffic(), before, strict=True))
    # On a busy computer a guest answers late, and what is under way comes a second time: that has
    # passed the cable, too. Usual are 312,000 and 63,000.
    assert 300_000 < sent < 600_000
    assert 50_000 < received < 300_000
