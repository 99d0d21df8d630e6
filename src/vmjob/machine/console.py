"""The guest's console: read all the time, kept within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

__all__ = ["Console"]

#: Bytes of console output on disk per machine; a guest that prints for ever fills no disk.
MAX_FILE = 1024 * 1024
#: The last bytes, in memory, for error messages.
TAIL = 16 * 1024


class Console:
    """Reads ``sock`` in a task of its own; the first `MAX_FILE` bytes go to ``path``
    while there is room."""

    def __init__(self, sock: socket.socket, path: Path) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._path = path
        self._tail = bytearray()
        self._task = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        room = MAX_FILE
        with contextlib.ExitStack() as stack:
            file = None
            with contextlib.suppress(OSError):  # what is read is worth more than what is kept
                file = stack.enter_context(self._path.open("wb", buffering=0))
            while True:
                try:
                    data = await loop.sock_recv(self._sock, 65536)
                except OSError:
                    return
                if not data:
                    return
                self._tail += data
                del self._tail[:-TAIL]
                if file is not None and room:
                    try:
                        room -= file.write(data[:room])
                    except OSError:  # the disk is full: it is read on all the same
                        room = 0

    def text(self) -> str:
        """The last output, without carriage returns and control characters."""
        text = self._tail.decode("utf-8", "replace").replace("\r", "")
        return "".join(c for c in text if c.isprintable() or c in "\n\t")

    async def close(self) -> None:
        """Read what is left (the machine has ended) and close."""
        await asyncio.wait([self._task], timeout=1.0)
        self._task.cancel()
        self._sock.close()
