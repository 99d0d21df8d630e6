"""What all screens have: a password for who looks at them, and pictures that are kept."""

from __future__ import annotations

import os
import secrets
import shutil
import string
from pathlib import Path

from vmjob.errors import MachineError

__all__ = ["keep_picture", "new_password"]

#: Characters of a VNC password that count (RFC 6143, 7.2.2: the key of DES).
PASSWORD_LENGTH = 8
PASSWORD_LETTERS = string.ascii_letters + string.digits
#: Bytes: twice what noise on the largest screen takes (1920 x 1080).
MAX_PICTURE = 32 << 20


def new_password() -> str:
    """One that nobody has had before."""
    return "".join(secrets.choice(PASSWORD_LETTERS) for _ in range(PASSWORD_LENGTH))


def keep_picture(picture: Path, path: Path) -> None:
    """Give a picture its place, which may be on another disk; raises `MachineError`, `OSError`."""
    size = picture.stat().st_size
    if not 0 < size <= MAX_PICTURE:
        raise MachineError(f"the hypervisor made a picture of {size} bytes")
    beside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        shutil.copyfile(picture, beside)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
