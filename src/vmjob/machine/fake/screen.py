"""The screen of a fake machine: one grey dot, and a server that says no more than what it is."""

from __future__ import annotations

import asyncio
import base64
import secrets
from pathlib import Path

from vmjob.errors import NotSupported
from vmjob.machine.contract import ConsoleAddress, MachineSpec

__all__ = ["Screen"]

LOOPBACK = "127.0.0.1"
#: What every VNC server says first (RFC 6143, 7.1.1).
BANNER = b"RFB 003.008\n"
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")


class Screen:
    """The screen of one machine, if it is to have one."""

    def __init__(self, spec: MachineSpec) -> None:
        self._wanted = spec.display
        self._server: asyncio.Server | None = None
        self._password = secrets.token_hex(4)

    async def open(self) -> None:
        """Let it be seen."""
        if self._wanted:
            self._server = await asyncio.start_server(_greet, LOOPBACK, 0)

    def close(self) -> None:
        """Let it be seen no more."""
        if self._server:
            self._server.close()

    def address(self) -> ConsoleAddress:
        """See `vmjob.machine.contract.Machine.console_address`."""
        if self._server is None:
            raise NotSupported("the machine has no display")
        port = self._server.sockets[0].getsockname()[1]
        return ConsoleAddress(LOOPBACK, int(port), self._password)

    def picture(self, path: Path) -> None:
        """See `vmjob.machine.contract.Machine.screenshot`."""
        if self._server is None:
            raise NotSupported("the machine has no display")
        path.write_bytes(PICTURE)


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(BANNER)
    writer.close()
