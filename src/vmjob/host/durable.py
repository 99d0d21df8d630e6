"""The few ways in which something is made to survive a power cut.

A file's bytes are safe after `sync`; its name, and the absence of a removed one, after `sync` of
its directory. Everything that must be found again after a crash is written through here, so a test
can cut the power after each step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["remove", "replace", "sync", "sync_all", "write"]


def write(path: Path, data: bytes) -> None:
    """A new file whose bytes are safe when this returns; its name is not yet."""
    with path.open("wb") as file:
        file.write(data)
    sync(path)


def sync(path: Path) -> None:
    """Return when a file's bytes, or a directory's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_all(paths: Iterable[Path]) -> None:
    """The same for files and whole directories, with their names; no link is followed.

    What is not there, or may not be read, is left out.
    """
    above: set[Path] = set()
    for path in paths:
        above.add(path.parent)
        if path.is_symlink():
            continue
        found = [path]
        for place, _, names in os.walk(path):
            above.add(Path(place))
            found += [Path(place) / name for name in names]
        for each in found:
            if each.is_file() and not each.is_symlink():
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    sync(each)
    for directory in above:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            sync(directory)


def replace(source: Path, target: Path) -> None:
    """Give a file another name at once, over what had it before."""
    source.replace(target)


def remove(path: Path) -> None:
    """Remove a file; a missing one is fine."""
    path.unlink(missing_ok=True)
