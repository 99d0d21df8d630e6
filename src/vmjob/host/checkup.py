"""Findings about this computer that need no machine: programs, memory, disk, namespaces."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vmjob.host import facts

__all__ = ["Finding", "disk", "memory", "namespaces"]

#: Memory that a job of the default size needs, with QEMU's own share, bytes.
WANTED_MEMORY = 768 * 1024 * 1024
#: Disk that building an image and a small job need, bytes.
WANTED_DISK = 2 * 1024 * 1024 * 1024


@dataclass(frozen=True)
class Finding:
    """One line of a checkup.

    ``state``: ``ok``; ``note``, which stops no job; ``problem``, which stops every job.
    ``advice`` is one line, given with each problem and with each note that can be mended.
    """

    what: str
    state: Literal["ok", "note", "problem"]
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def memory() -> Finding:
    """Whether there is memory for a job of the default size."""
    found = facts.memory()
    text = f"{found.available / 1e9:.1f} GB free of {found.total / 1e9:.1f} GB"
    if found.available < WANTED_MEMORY:
        return Finding("memory", "note", text,
                       "Close other programs, or run jobs with --memory 256.")
    return Finding("memory", "ok", text)


def disk(home: Path) -> Finding:
    """Whether there is disk space for an image and a job's writes."""
    free = facts.disk_free(home)
    text = f"{free / 1e9:.1f} GB free for {home}"
    if free < WANTED_DISK:
        return Finding("disk", "note", text,
                       "Free some space, or point VMJOB_HOME at a larger disk.")
    return Finding("disk", "ok", text)


def namespaces() -> Finding:
    """Whether images can be built by this user."""
    missing = facts.user_namespaces()
    if missing is None:
        return Finding("building images", "ok", "possible for this user")
    return Finding("building images", "note", f"not possible for this user: {missing}",
                   "Ask the administrator for subordinate ids (usermod --add-subuids), or build "
                   "the image as another user and point VMJOB_HOME at it.")
