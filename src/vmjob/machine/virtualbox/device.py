"""VirtualBox's kernel driver, seen from outside: quickly told, before anything of it is loaded."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["DEVICE", "identity", "why_not"]

#: What the driver is spoken to by, on Linux. Users open it by VBoxHeadless only, which is
#: set-user-id root: whether that works, a boot tells.
DEVICE = Path("/dev/vboxdrv")


def why_not() -> str | None:
    """Why the driver cannot be used; None when that may well be."""
    if DEVICE.exists():
        return None
    return f"VirtualBox's kernel driver is not loaded (there is no {DEVICE})"


def identity() -> str:
    """What tells this driver's device from another's."""
    try:
        return f"{DEVICE.stat().st_rdev}:{platform.release()}"
    except OSError:
        return "none"
