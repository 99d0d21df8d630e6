"""What has to outlive each process that carries a job.

The client remembers the processor time of the last checkpoint that it heard of; at its own end it
hears nothing any more. So it is written down here as well, and the larger counts.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

__all__ = ["FILE", "Totals", "read", "write"]

#: In the slot; names that begin with ``vmjob_`` are kept from the job.
FILE = "vmjob_totals.json"
#: Bytes; nothing of ours is longer.
MAX_SIZE = 64 << 10


class Totals(msgspec.Struct):
    """Of one job, over all its processes.

    ``cpu_seconds``: processor time on this computer. ``run_seconds``: time that its tasks ran.
    ``starts``: processes that carried it; ``checkpoints``: how many there were. ``faults``: how
    often something was in the way since the last checkpoint, by the error's code. ``bytes_sent``,
    ``bytes_received``: by its machines, over the network. ``fraction``: the job's last word on how
    much of it is done.
    """

    cpu_seconds: float = 0.0
    run_seconds: float = 0.0
    starts: int = 0
    checkpoints: int = 0
    faults: dict[str, int] = {}
    bytes_sent: int = 0
    bytes_received: int = 0
    fraction: float | None = None


def read(directory: Path) -> Totals:
    """What is written down in a slot; nothing where it cannot be read."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        with (directory / FILE).open("rb") as file:
            found = msgspec.json.decode(file.read(MAX_SIZE), type=Totals)
        if 0 <= found.cpu_seconds < 1e12 and 0 <= found.run_seconds < 1e12:
            return found
    return Totals()


def write(directory: Path, totals: Totals) -> None:
    """Write it down, whole or not at all. A full disk is no reason to stop: it is tried again."""
    new = directory / f"{FILE}.new"
    with contextlib.suppress(OSError):
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW,
                     0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(totals))
        new.replace(directory / FILE)
