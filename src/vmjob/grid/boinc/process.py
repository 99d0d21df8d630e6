"""What an app does with what the client hands down to it, before anything else."""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["clean_environment", "close_inherited"]

_LIBRARIES = "LD_LIBRARY_PATH"


def close_inherited() -> None:
    """Close every descriptor above 2; call it first of all in a process that the client started.

    The client lets apps inherit sockets of its HTTP library and a log file. What this process has
    opened itself is closed too.
    """
    os.closerange(3, _last_descriptor() + 1)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what the client put in front of ``LD_LIBRARY_PATH``.

    It adds ``../../projects/X:.:../..``: a program of the system's would load a project's library
    instead of its own. Nothing relative stays in that variable, which is dropped when empty.
    """
    cleaned = dict(environment)
    if _LIBRARIES in cleaned:
        # An empty entry means the working directory, which is the slot.
        kept = [each for each in cleaned[_LIBRARIES].split(":") if each.startswith("/")]
        if kept:
            cleaned[_LIBRARIES] = ":".join(kept)
        else:
            del cleaned[_LIBRARIES]
    return cleaned


def _last_descriptor() -> int:
    for place in ("/proc/self/fd", "/dev/fd"):
        try:
            return max((int(name) for name in os.listdir(place)), default=2)  # noqa: PTH208
        except (OSError, ValueError):
            continue
    return 1 << 16
