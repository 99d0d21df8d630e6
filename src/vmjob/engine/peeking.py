"""Looking at a small file of a machine while its job runs."""

from __future__ import annotations

import contextlib
import os

from vmjob.engine.session import Session
from vmjob.errors import JobError

__all__ = ["peek"]

#: Its copy, in the machine's own directory on the host; one look at a time.
PEEKED = "peeked"


async def peek(session: Session, path: str, limit: int) -> bytes | None:
    """What a file of the machine holds; None when it is not there, or longer than ``limit`` bytes.

    It may be half written: who needs whole files has a `Mirror`.
    """
    target = session.machine.spec.directory / PEEKED
    try:
        await session.client.get(path, target, limit=limit)
        fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            return file.read(limit)
    except (JobError, OSError):
        return None
    finally:
        with contextlib.suppress(OSError):
            target.unlink()
