"""BOINC's logical names: what a job calls a file, and which file of this computer that is."""

from __future__ import annotations

import os
from pathlib import Path

from vmjob.errors import BadPath
from vmjob.job.links import resolved
from vmjob.job.reading import Surroundings

__all__ = ["is_there", "resolve"]

#: Where a slot's links lead when nobody says where its project is: ../../projects/URL/FILE.
_FROM_SLOT = ("..", "..", "projects")


def resolve(name: str, where: Surroundings) -> Path:
    """The file that ``name`` stands for in a slot; it need not exist.

    A symbolic link, and a file that is no link, stand for themselves; a link file for what it
    names. Raises `BadPath` where that is neither in the slot nor in the project: the guest writes
    into slots too, and must not be able to point at the rest of this computer.
    """
    path = where.directory / name
    if _is_symlink(path):
        return path
    target = resolved(path, where.directory)
    if target == path:
        return path
    plain = Path(os.path.normpath(target))
    directory = Path(os.path.normpath(where.directory))
    if plain.is_relative_to(directory):
        return plain
    if where.project is not None:
        allowed = plain.is_relative_to(os.path.normpath(where.project))
    else:
        parts = Path(os.path.relpath(plain, directory)).parts
        allowed = parts[:3] == _FROM_SLOT and len(parts) > 4 and ".." not in parts[3:]
    if not allowed:
        raise BadPath(f"the link {name!r} leads out of the slot and its project: {str(target)!r}",
                      advice="Links of a slot name files of its project.")
    return plain


def is_there(name: str, where: Surroundings) -> bool:
    """Whether there is a file, or a link file, of this name; whether it leads anywhere or not."""
    try:
        return os.path.lexists(where.directory / name)
    except ValueError:  # a NUL
        return False


def _is_symlink(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False
