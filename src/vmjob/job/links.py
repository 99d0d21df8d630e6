"""BOINC's link files: a file in a slot that only names another, ``<soft_link>../../x</soft_link>``.

The client makes them for every file of a job that is not to be copied into its slot.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["exists", "read_bounded", "resolved"]

#: A link file holds one path; the client reads no more of one than this.
_MOST = 4096
_LINK = re.compile(r"[ \t]*<soft_link>([^<>\0\r\n]+)</soft_link>")


def resolved(path: Path, base: Path | None = None) -> Path:
    """The file that ``path`` stands for: where its link leads, or itself. Never raises.

    A link's path is relative to ``base``: the slot, also for a link in a sub-directory of it
    (measured with the client 7.20); by default the directory that holds the link. One link is
    followed, as BOINC does; the target need not exist.
    """
    data = read_bounded(path, _MOST)
    match = _LINK.match(data.decode("utf-8", "replace")) if data is not None else None
    return (base or path.parent) / match[1].strip() if match else path


def exists(path: Path) -> bool:
    """Whether there is a file; one that cannot be asked for is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_bounded(path: Path, most: int) -> bytes | None:
    """What a file begins with, at most ``most`` bytes; None where there is none to be read."""
    if not exists(path):  # a pipe or a device would not return
        return None
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError:
        return None
