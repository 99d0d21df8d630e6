"""The console is read whatever becomes of the file that it is kept in."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from vmjob.machine.console import MAX_FILE, Console

pytestmark = pytest.mark.anyio


async def told(path: Path, data: bytes) -> str:
    """What is known of a console that said this."""
    ours, theirs = socket.socketpair()
    console = Console(ours, path)
    theirs.setblocking(False)
    async with asyncio.timeout(30):
        await asyncio.get_running_loop().sock_sendall(theirs, data)
    theirs.close()
    await console.close()
    return console.text()


async def test_what_a_console_says_is_kept_up_to_a_bound(tmp_path: Path) -> None:
    data = bytes(range(32, 127)) * 20_000
    assert (await told(tmp_path / "console", data)).encode() == data[-16384:]
    assert (tmp_path / "console").read_bytes() == data[:MAX_FILE]


@pytest.mark.parametrize("place", ["/dev/full", "nowhere/console"])
async def test_it_is_read_on_where_it_cannot_be_kept(tmp_path: Path, place: str) -> None:
    assert (await told(tmp_path / place, b"x" * (1 << 20) + b"Kernel panic")).endswith("panic")
