"""Looking at a small file of a machine while its job runs."""

from __future__ import annotations

from vmjob.engine.session import Session
from vmjob.errors import JobError
from vmjob.home import remove_tree
from vmjob.host import below

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
        found = below.read(target.parent, PEEKED, limit)
    except JobError:
        return None
    finally:
        remove_tree(target)  # it may have been a directory
        below.remove(target.parent, PEEKED)
    return found[1] if found else None
