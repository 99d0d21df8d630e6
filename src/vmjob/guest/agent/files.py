"""Listing, making and removing files in the machine, as the host asks."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from .wire import MAX_LISTING, MAX_RESPONSE_BODY

TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link",
         stat.S_IFIFO: "fifo", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
         stat.S_IFSOCK: "socket"}


def facts(path: str, name: str) -> dict[str, Any]:
    """What a listing says of one entry: size in bytes, modification time in ns."""
    entry = os.lstat(path)
    return {"name": name, "type": TYPES.get(stat.S_IFMT(entry.st_mode), "unknown"),
            "size": entry.st_size, "mode": stat.S_IMODE(entry.st_mode),
            "mtime_ns": entry.st_mtime_ns}


def listing(path: str) -> dict[str, Any]:
    """The entries of a directory, sorted, or the one entry of a file.

    ``truncated`` when there are more than an answer holds: in number, or in bytes.
    """
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        return {"entries": [facts(path, os.path.basename(path))], "truncated": False}
    names = sorted(os.listdir(path))
    entries: list[dict[str, Any]] = []
    room = MAX_RESPONSE_BODY - 1024
    for name in names[:MAX_LISTING]:
        try:
            entry = facts(os.path.join(path, name), name)
        except FileNotFoundError:
            continue  # it went away meanwhile
        room -= len(json.dumps(entry)) + 2
        if room < 0:
            return {"entries": entries, "truncated": True}
        entries.append(entry)
    return {"entries": entries, "truncated": len(names) > MAX_LISTING}


def make_directory(path: str, owner: tuple[int, int] | None) -> None:
    """Make a directory and its parents; those that are made belong to ``owner``."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for each in reversed(missing):
        os.mkdir(each, 0o755)
        if owner:
            os.chown(each, *owner)


def delete(path: str) -> None:
    """Remove a file, a link (not what it points to) or a whole directory."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        import shutil  # loads three compression libraries: not at start-up

        shutil.rmtree(path)
    else:
        os.unlink(path)
