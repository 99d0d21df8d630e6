"""The screen of a machine: a VNC server with a password, and pictures."""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread

from vmjob.errors import HostDiskFull
from vmjob.machine.contract import ConsoleAddress
from vmjob.machine.ports import LOOPBACK, free_port
from vmjob.machine.screen import keep_picture, new_password
from vmjob.machine.virtualbox import definition
from vmjob.machine.virtualbox.manage import Manage

__all__ = ["chosen", "screenshot", "words"]

#: VirtualBox's own server speaks RDP and is no free software; the extension of this name is, and
#: speaks VNC.
EXTENSION = "VNC"


def chosen() -> ConsoleAddress:
    """A free port of loopback and a new password."""
    return ConsoleAddress(LOOPBACK, free_port(LOOPBACK, 0), new_password())


def words(address: ConsoleAddress) -> list[str]:
    """Show the screen there, to who knows the password."""
    return ["modifyvm", definition.NAME, "--vrde", "on", "--vrde-extpack", EXTENSION,
            "--vrde-address", address.host, "--vrde-port", str(address.port),
            "--vrde-property", f"VNCPassword={address.password}"]


async def screenshot(manage: Manage, directory: Path, path: Path) -> None:
    """See `vmjob.machine.contract.Machine.screenshot`."""
    picture = directory / "screen.png"
    try:
        await manage.run("controlvm", definition.NAME, "screenshotpng", str(picture))
        await anyio.to_thread.run_sync(keep_picture, picture, path)
    except OSError as error:
        raise HostDiskFull(f"cannot keep a picture of the screen: {error.strerror}") from error
    finally:
        picture.unlink(missing_ok=True)
