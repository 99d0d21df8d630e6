"""Parcels: many files of a folder in one transfer, each whole or not at all.

What goes out is a directory of files named 0, 1, 2... in the order asked for; a file that is not
(or does not stay) what the host asked for is named in the last record. What comes in is a tree; its
files are renamed into place one by one, unless another one than the host knows is there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any

from .folders import Stamp, check_path, open_below, stamp
from .tree import TreeError, TreeReceiver, TreeSender, record

#: Expectation of a file that may replace whatever is there.
ANYTHING = "any"


def send_parcel(path: str, names: list[Any], piece: int) -> Iterator[bytes | memoryview]:
    """Records for the files ``[name, size, mtime_ns, inode]`` of a folder; see `tree.send_tree`."""
    sender = TreeSender(piece)
    changed = []
    yield record(b"E", {"t": "d", "n": "", "m": 0o700, "mt": 0})
    for number, (name, *wanted) in enumerate(names):
        check_path(name)
        above, _, last = name.rpartition("/")
        try:
            fd = open_below(path, above, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            changed.append(number)
            continue
        try:
            if not _is_still(fd, last, wanted):
                changed.append(number)
                continue
            yield from sender.entry(os.fsencode(last), b"%d" % number, fd, 1)
            # What was written while it was read has another time now.
            if not _is_still(fd, last, wanted):
                changed.append(number)
        except TreeError as error:
            if error.reason not in ("not-found", "changed", "denied"):
                raise
            changed.append(number)
        finally:
            os.close(fd)
    yield b"C"
    yield record(b"Z", {"entries": sender.entries, "bytes": sender.bytes, "changed": changed})


def _is_still(fd: int, name: str, wanted: list[int]) -> bool:
    try:
        found = stamp(os.stat(name, dir_fd=fd, follow_symlinks=False))
    except OSError:
        return False
    return found is not None and found[0] == "f" and [found[1], found[3], found[4]] == wanted


class ParcelReceiver(TreeReceiver):
    """Takes a parcel; remembers what is to be where, and what may be there before."""

    def __init__(self, parent: int, name: str, *, limit: int, entries: int,
                 owner: tuple[int, int] | None = None) -> None:
        super().__init__(parent, name, limit=limit, entries=entries, owner=owner,
                         take_link=lambda depth, target: False)
        #: (path in the tree, is it a directory, expectation), parents before children.
        self.contents: list[tuple[str, bool, Any]] = []
        self._names: list[str] = []

    def _enter(self, head: dict[str, Any]) -> None:
        top = not self._started
        super()._enter(head)
        if not top:
            self._names.append(head["n"])
            self.contents.append(("/".join(self._names), head["t"] == "d", head.get("w")))

    def _leave(self) -> None:
        super()._leave()
        if self._names:
            self._names.pop()


def unpack(parent: int, staged: str, contents: list[tuple[str, bool, Any]],
           owner: tuple[int, int] | None) -> list[int]:
    """Put a parcel's files where they belong, below the open directory that it was staged in.

    Returns their new inodes in order, 0 for what was left as it was.
    """
    top = f"/proc/self/fd/{parent}"
    inodes = []
    for path, is_directory, expected in contents:
        above, _, last = path.rpartition("/")
        try:
            target = _open_above(parent, above)
        except OSError:
            inodes.append(0)  # something else is in the way
            continue
        try:
            if is_directory:
                inodes.append(_make(target, last, owner))
            else:
                source = open_below(f"{top}/{staged}", above, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    inodes.append(_move(source, target, last, expected))
                finally:
                    os.close(source)
        except OSError:
            inodes.append(0)
        finally:
            os.close(target)
    return inodes


def _open_above(parent: int, above: str) -> int:
    fd = os.dup(parent)
    try:
        for part in above.split("/") if above else []:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                            dir_fd=fd)
            os.close(fd)
            fd = inner
    except BaseException:
        os.close(fd)
        raise
    return fd


def _make(target: int, name: str, owner: tuple[int, int] | None) -> int:
    try:
        os.mkdir(name, 0o755, dir_fd=target)
        if owner:
            os.chown(name, *owner, dir_fd=target, follow_symlinks=False)
    except FileExistsError:
        pass
    found = os.stat(name, dir_fd=target, follow_symlinks=False)
    return found.st_ino if stat.S_ISDIR(found.st_mode) else 0


def _move(source: int, target: int, name: str, expected: Any) -> int:
    inode = os.stat(name, dir_fd=source, follow_symlinks=False).st_ino
    if expected != ANYTHING:
        found: Stamp | None = None
        try:
            found = stamp(os.stat(name, dir_fd=target, follow_symlinks=False))
            if found is None:
                return 0  # a link or the like: the guest's own business
        except FileNotFoundError:
            pass
        if (None if found is None else list(found)) != expected:
            return 0
        if found is not None and found[0] == "d":
            os.rmdir(name, dir_fd=target)
    os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
    return inode
