"""Ports that lead to a fake machine: bytes are carried to the same computer's port."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from vmjob.errors import NotSupported, PortTaken, UsageError
from vmjob.machine.contract import MachineSpec

__all__ = ["Relays", "listen"]

LOOPBACK = "127.0.0.1"
#: Bytes that are carried at a time.
PIECE = 65536


def listen(spec: MachineSpec, host_port: int, guest_port: int, *, remote: bool) -> socket.socket:
    """Open a port for a machine; raises as `vmjob.machine.contract.Machine.forward` does."""
    if spec.network == "none":
        raise NotSupported("the machine has no network")
    if not 0 <= host_port <= 65535 or not 1 <= guest_port <= 65535:
        raise UsageError(f"{host_port}:{guest_port} are not two TCP ports")
    try:
        return socket.create_server(("" if remote else LOOPBACK, host_port))
    except OSError as error:
        raise PortTaken(f"port {host_port} of this computer is in use", port=host_port) from error


class Relays:
    """The forwards of one machine."""

    def __init__(self) -> None:
        self._servers: dict[int, asyncio.Server] = {}
        self._carrying: set[asyncio.Task[None]] = set()
        self._plugged = asyncio.Event()
        self._plugged.set()

    def plug(self, available: bool) -> None:
        """Let bytes pass, or hold them back until they may."""
        if available:
            self._plugged.set()
        else:
            self._plugged.clear()

    async def add(self, listener: socket.socket, guest_port: int) -> int:
        """Carry what comes to ``listener``; returns its port."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._carrying.add(task)
            try:
                await _join(reader, writer, guest_port, self._plugged)
            finally:
                self._carrying.discard(task)

        port = int(listener.getsockname()[1])
        self._servers[port] = await asyncio.start_server(serve, sock=listener)
        return port

    async def remove(self, port: int) -> None:
        """Take no more connections; those that there are go on."""
        if server := self._servers.pop(port, None):
            server.close()

    async def close(self) -> None:
        """End all of it."""
        for port in list(self._servers):
            await self.remove(port)
        for task in list(self._carrying):
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                guest_port: int, plugged: asyncio.Event) -> None:
    """Carry bytes both ways until both sides have ended."""
    with contextlib.suppress(OSError):
        try:
            theirs, to_them = await asyncio.open_connection(LOOPBACK, guest_port)
            try:
                await asyncio.gather(_carry(reader, to_them, plugged),
                                     _carry(theirs, writer, plugged))
            finally:
                to_them.close()
        finally:
            writer.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                 plugged: asyncio.Event) -> None:
    while data := await reader.read(PIECE):
        await plugged.wait()
        writer.write(data)
        await writer.drain()
    writer.write_eof()
