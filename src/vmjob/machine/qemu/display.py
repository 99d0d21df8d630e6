"""The screen of a QEMU process: a VNC server with a password, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.to_thread

from vmjob.errors import HostDiskFull, MachineError
from vmjob.machine.contract import ConsoleAddress
from vmjob.machine.ports import LOOPBACK
from vmjob.machine.qemu.monitor import Monitor
from vmjob.machine.screen import keep_picture, new_password

__all__ = ["Display"]

#: QEMU writes a picture here first, in the machine's directory.
PICTURE = "screen.png"


class Display:
    """Made by `opened`; ``address`` is where it can be seen."""

    def __init__(self, monitor: Monitor, directory: Path, address: ConsoleAddress) -> None:
        self._monitor = monitor
        self._picture = directory / PICTURE
        self.address = address

    @classmethod
    async def opened(cls, monitor: Monitor, directory: Path) -> Display:
        """Give QEMU's VNC server a password, then any free port of loopback."""
        password = new_password()
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
            await anyio.to_thread.run_sync(keep_picture, self._picture, path)
        except OSError as error:
            raise HostDiskFull(f"cannot keep a picture of the screen: {error.strerror}") from error
        finally:
            self._picture.unlink(missing_ok=True)
