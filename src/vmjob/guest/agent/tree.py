"""Files and directory trees as a stream of records: what PUT and GET carry.

A record is one chunk of the body; its first byte is its type:

    E {json}       enter a file, directory or link: {"t": "f|d|l|x", "n": name, "m": mode,
                   "s": size in bytes, "mt": mtime in ns, "l": link target, "k": kind}
    D offset data  bytes of the entered file at a 64-bit offset; what no record covers is a hole
    C              leave the entered file or directory
    Z {json}       the end: {"entries": n, "bytes": n}
    F {json}       the sender gives up: {"error": reason, "message": text}

Names are single path components, so neither ``..`` nor an absolute path can be said.
Only data is sent, so a sparse file stays sparse and costs what it holds. Type ``x``
stands for what has no bytes (devices, sockets, FIFOs): the receiver decides.

Nothing here follows a symbolic link, on either side.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Any

from .wire import MAX_DEPTH

OFFSET = struct.Struct(">Q")
#: Longest file name that is taken, bytes (Linux, NAME_MAX).
MAX_NAME = 255
#: Longest link target that is taken, bytes.
MAX_TARGET = 1024


class TreeError(Exception):
    """A tree cannot be sent or taken; ``reason`` is a stable word."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


# -- sending -----------------------------------------------------------------------------------


def send_tree(path: str | bytes, piece: int) -> Iterator[bytes | memoryview]:
    """Records for the file or directory ``path``, each at most ``piece`` bytes.

    A yielded view is valid until the next record is asked for. Raises `TreeError`
    (``not-found``, ``denied``, ``too-deep``, ``changed``, ``io``) at the place where it happens.
    """
    sender = TreeSender(piece)
    yield from sender.entry(os.fsencode(path), b"", None, 0)
    yield b"Z" + json.dumps({"entries": sender.entries, "bytes": sender.bytes}).encode()


class TreeSender:
    """Makes records, each at most ``piece`` bytes, and counts what it sent."""

    def __init__(self, piece: int) -> None:
        self.entries = 0
        self.bytes = 0
        self._buffer = bytearray(piece)
        self._buffer[0:1] = b"D"

    def entry(self, path: bytes, name: bytes, at: int | None,
              depth: int) -> Iterator[bytes | memoryview]:
        """One entry and what is below it: ``path`` from the descriptor ``at``, sent as ``name``."""
        if depth > MAX_DEPTH:
            raise TreeError("too-deep", f"more than {MAX_DEPTH} directories deep")
        try:
            facts = os.stat(path, dir_fd=at, follow_symlinks=False)
            kind = stat.S_IFMT(facts.st_mode)
            head: dict[str, Any] = {"n": os.fsdecode(name), "m": stat.S_IMODE(facts.st_mode),
                                    "mt": max(0, facts.st_mtime_ns)}  # none is before 1970
            self.entries += 1
            if kind == stat.S_IFREG:
                yield from self._file(path, at, head)
            elif kind == stat.S_IFDIR:
                yield from self._directory(path, at, head, depth)
            elif kind == stat.S_IFLNK:
                target = os.fsdecode(os.readlink(path, dir_fd=at))
                yield record(b"E", {**head, "t": "l", "l": target})
            else:
                yield record(b"E", {**head, "t": "x", "k": _KINDS.get(kind, "unknown")})
        except OSError as error:
            raise _from_os(error, name or path) from error

    def _file(self, path: bytes, at: int | None,
              head: dict[str, Any]) -> Iterator[bytes | memoryview]:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=at)
        try:
            yield from self.file(fd, head)
        finally:
            os.close(fd)

    def file(self, fd: int, head: dict[str, Any]) -> Iterator[bytes | memoryview]:
        """An open file."""
        # The size is taken once: a file that grows meanwhile is cut there, whole and finite.
        size = os.fstat(fd).st_size
        yield record(b"E", {**head, "t": "f", "s": size})
        view = memoryview(self._buffer)
        room = len(view) - 9
        for start, end in _extents(fd, size):
            where = start
            while where < end:
                got = os.preadv(fd, [view[9:9 + min(room, end - where)]], where)
                if not got:
                    break
                OFFSET.pack_into(self._buffer, 1, where)
                yield view[:9 + got]
                where += got
                self.bytes += got
        yield b"C"

    def _directory(self, path: bytes, at: int | None, head: dict[str, Any],
                   depth: int) -> Iterator[bytes | memoryview]:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        try:
            yield record(b"E", {**head, "t": "d"})
            for name in sorted(map(os.fsencode, os.listdir(fd))):
                yield from self.entry(name, name, fd, depth + 1)
            yield b"C"
        finally:
            os.close(fd)


_KINDS = {stat.S_IFIFO: "fifo", stat.S_IFCHR: "character device", stat.S_IFBLK: "block device",
          stat.S_IFSOCK: "socket"}


def record(kind: bytes, content: dict[str, Any]) -> bytes:
    """A record of JSON."""
    return kind + json.dumps(content).encode()


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that hold data, as (start, end); the whole where nobody can tell."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            start, end = at, size
        yield start, min(end, size)
        at = end


def _from_os(error: OSError, name: bytes) -> TreeError:
    reason = {errno.ENOENT: "not-found", errno.ENOTDIR: "not-found", errno.EACCES: "denied",
              errno.EPERM: "denied", errno.ELOOP: "changed", errno.ENOSPC: "no-space",
              errno.EDQUOT: "no-space", errno.EEXIST: "exists"}.get(error.errno or 0, "io")
    return TreeError(reason, f"{os.fsdecode(name)!r}: {error.strerror}")


# -- taking ------------------------------------------------------------------------------------

#: Decides on a symbolic link: (directories above it within the tree, target) -> take it or not.
LinkRule = Callable[[int, str], bool]


def inside_tree(depth: int, target: str) -> bool:
    """Whether a link ``depth`` directories below the top stays inside the tree that holds it.

    ``..`` may only come first: the directories above a link are real ones, but behind a name may
    be another link, and what lies above *that* cannot be told from the text (``d/up/..`` leaves
    the tree when ``d/up`` is a link to ``..``).
    """
    if target.startswith("/") or "\0" in target:
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
    return ups <= depth and ".." not in parts[ups:]


def check_name(name: str) -> str:
    """A name that is safe as one path component on the taking side; raises `TreeError`."""
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        raise TreeError("unsafe-name", f"{name!a} is not UTF-8") from None
    if name in ("", ".", "..") or "/" in name or len(encoded) > MAX_NAME:
        raise TreeError("unsafe-name", f"{name[:80]!r} is no file name")
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise TreeError("unsafe-name", f"{name!r} has control characters")
    return name


class TreeReceiver:
    """Builds a tree below ``parent`` (a directory descriptor) from records.

    The top entry gets the name ``name`` there, which must not exist; the caller
    renames it into place when `done`. ``limit`` bounds the sum of the sizes, bytes,
    and ``entries`` the number of entries. ``owner`` is the (uid, gid) that everything
    gets, where given. ``take_link`` decides on links; a link as the top entry is never
    taken. Raises `TreeError` for whatever must not be taken.
    """

    def __init__(self, parent: int, name: str, *, limit: int, entries: int,
                 owner: tuple[int, int] | None = None, take_link: LinkRule = inside_tree) -> None:
        self.done = False
        self.bytes = 0
        self._entries_left = entries
        self._room = limit
        self._limit = limit
        self._owner = owner
        self._take_link = take_link
        self._parent = parent
        self._top = name
        self._stack: list[tuple[int, dict[str, Any]]] = []
        self._file: tuple[int, dict[str, Any]] | None = None
        self._started = False

    def feed(self, record: bytes | memoryview) -> None:
        """Take one record."""
        kind = bytes(record[:1])
        try:
            if kind == b"D":
                self._data(record)
            elif kind == b"E":
                self._enter(_content(record))
            elif kind == b"C":
                self._leave()
            elif kind == b"Z":
                if not self._started or self._stack or self._file:
                    raise TreeError("malformed", "the tree ends before its last entry does")
                self.done = True
            elif kind == b"F":
                said = _content(record)
                raise TreeError(str(said.get("error", "io"))[:40],
                                str(said.get("message", "the sender gave up"))[:500])
            else:
                raise TreeError("malformed", "a record of an unknown type")
        except OSError as error:
            raise _from_os(error, os.fsencode(self._top)) from error

    def close(self) -> None:
        """Close what is still open; for every path out of a transfer."""
        if self._file:
            os.close(self._file[0])
            self._file = None
        while self._stack:
            os.close(self._stack.pop()[0])

    def _enter(self, head: dict[str, Any]) -> None:
        if self.done or self._file or (self._started and not self._stack):
            raise TreeError("malformed", "an entry in the wrong place")
        self._entries_left -= 1
        if self._entries_left < 0:
            raise TreeError("too-many", "too many files and directories")
        top = not self._started
        self._started = True
        name = self._top if top else check_name(_text(head, "n"))
        at = self._parent if top else self._stack[-1][0]
        kind = head.get("t")
        if kind == "f":
            size = _number(head, "s")
            if size > self._room:
                raise TreeError("too-large", f"more than {self._limit} bytes in all")
            self._room -= size
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = (os.open(name, flags, 0o600, dir_fd=at), head)
        elif kind == "d":
            if len(self._stack) >= MAX_DEPTH:
                raise TreeError("too-deep", f"more than {MAX_DEPTH} directories deep")
            os.mkdir(name, 0o700, dir_fd=at)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._stack.append((os.open(name, flags, dir_fd=at), head))
        elif kind == "l" and not top:
            target = _text(head, "l")
            try:
                short = len(target.encode("utf-8")) <= MAX_TARGET
            except UnicodeEncodeError:
                short = False
            if not short or not self._take_link(len(self._stack) - 1, target):
                raise TreeError("unsafe-link", f"{name!r} is a link that leaves its directory")
            os.symlink(target, name, dir_fd=at)
            if self._owner:
                os.chown(name, *self._owner, dir_fd=at, follow_symlinks=False)
        elif kind == "l":
            raise TreeError("unsafe-link", "it is a symbolic link")
        else:
            said = head.get("k")
            what = said if said in _KINDS.values() else "of no known type"
            raise TreeError("unsafe-type", f"{name!r} is a {what}" if said in _KINDS.values()
                            else f"{name!r} is {what}")

    def _data(self, record: bytes | memoryview) -> None:
        # A sender has no reason for an empty record, or for more data than files have room; without
        # these bounds it could send for ever.
        if not self._file or len(record) <= 9:
            raise TreeError("malformed", "data in the wrong place")
        fd, head = self._file
        (where,) = OFFSET.unpack_from(record, 1)
        data = memoryview(record)[9:]
        if where + len(data) > head["s"]:
            raise TreeError("malformed", "data behind the end of its file")
        self.bytes += len(data)
        if self.bytes > self._limit:
            raise TreeError("too-large", f"more than {self._limit} bytes in all")
        while data:
            wrote = os.pwrite(fd, data, where)
            where += wrote
            data = data[wrote:]

    def _leave(self) -> None:
        if self._file:
            fd, head = self._file
            try:
                os.ftruncate(fd, head["s"])
                self._finish(fd, head)
            finally:
                self._file = None
                os.close(fd)
        elif self._stack:
            fd, head = self._stack.pop()
            try:
                self._finish(fd, head)
            finally:
                os.close(fd)
        else:
            raise TreeError("malformed", "it leaves what it never entered")

    def _finish(self, fd: int, head: dict[str, Any]) -> None:
        # Set-user-id and its kin are dropped: what comes out of a machine runs with no one's rights
        # but its reader's. Read and write stay with the owner, or a tree could not be removed.
        mode = _number(head, "m") & 0o777
        os.fchmod(fd, mode | (0o700 if head["t"] == "d" else 0o600))
        if self._owner:
            os.fchown(fd, *self._owner)
        moment = _number(head, "mt")
        os.utime(fd, ns=(moment, moment))


def _content(record: bytes | memoryview) -> dict[str, Any]:
    try:
        content = json.loads(bytes(record[1:]))
    except (ValueError, RecursionError):
        raise TreeError("malformed", "a record that is not JSON") from None
    if not isinstance(content, dict):
        raise TreeError("malformed", "a record that is no object")
    return content


def _text(head: dict[str, Any], key: str) -> str:
    value = head.get(key)
    if not isinstance(value, str):
        raise TreeError("malformed", f"an entry without {key!r}")
    return value


def _number(head: dict[str, Any], key: str) -> int:
    value = head.get(key)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TreeError("malformed", f"an entry without {key!r}")
    return value
