"""The screen of a QEMU process: a VNC server with a password, and pictures."""

from __future__ import annotations

import os
import secrets
import shutil
import string
from pathlib import Path
from typing import Any

import anyio.to_thread

from vmjob.errors import HostDiskFull, MachineError
from vmjob.machine.contract import ConsoleAddress
from vmjob.machine.qemu.monitor import Monitor

__all__ = ["Display"]

LOOPBACK = "127.0.0.1"
#: Characters of a VNC password that count (RFC 6143, 7.2.2: the key of DES).
PASSWORD_LENGTH = 8
PASSWORD_LETTERS = string.ascii_letters + string.digits
#: QEMU writes a picture here first, in the machine's directory.
PICTURE = "screen.png"
#: Bytes: twice what noise on the largest screen takes (`argv.DISPLAY`).
MAX_PICTURE = 32 << 20


class Display:
    """Made by `opened`; ``address`` is where it can be seen."""

    def __init__(self, monitor: Monitor, directory: Path, address: ConsoleAddress) -> None:
        self._monitor = monitor
        self._picture = directory / PICTURE
        self.address = address

    @classmethod
    async def opened(cls, monitor: Monitor, directory: Path) -> Display:
        """Give QEMU's VNC server a password, then any free port of loopback."""
        password = "".join(secrets.choice(PASSWORD_LETTERS) for _ in range(PASSWORD_LENGTH))
        await monitor.execute("set_password", protocol="vnc", password=password)
        await monitor.execute("display-update", type="vnc", addresses=[
            {"type": "inet", "host": LOOPBACK, "port": "0"}])
        told: dict[str, Any] = await monitor.execute("query-vnc")
        if told.get("host") != LOOPBACK or told.get("auth") != "vnc":
            raise MachineError("QEMU's display is not where it was put")
        return cls(monitor, directory, ConsoleAddress(LOOPBACK, int(told["service"]), password))

    async def screenshot(self, path: Path) -> None:
        """See `vmjob.machine.contract.Machine.screenshot`."""
        try:
            await self._monitor.execute("screendump", filename=str(self._picture), format="png")
            await anyio.to_thread.run_sync(_move, self._picture, path)
        except OSError as error:
            raise HostDiskFull(f"cannot keep a picture of the screen: {error.strerror}") from error
        finally:
            self._picture.unlink(missing_ok=True)


def _move(picture: Path, path: Path) -> None:
    """Give a picture its place, which may be on another disk."""
    size = picture.stat().st_size
    if not 0 < size <= MAX_PICTURE:
        raise MachineError(f"QEMU made a picture of {size} bytes")
    beside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        shutil.copyfile(picture, beside)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
