"""Files and trees between host and machine, with constant memory on both sides.

The data lane is served by one worker thread at a time with blocking calls: bulk data
gains nothing from an event loop, and both ends share one implementation of the byte
stream (`Channel`) and of the records (`tree`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import anyio

from vmjob.errors import (
    AgentLost,
    AgentProtocol,
    AgentSilent,
    BadPath,
    GuestRefused,
    HostDiskFull,
    InputMissing,
    InputUnreadable,
    OutputMissing,
    OutputTooLarge,
    OutputUnsafe,
    VmjobError,
)
from vmjob.guest.agent import wire
from vmjob.guest.agent.channel import Channel, Closed, Interrupted, TimedOut
from vmjob.guest.agent.tree import TreeError, TreeReceiver, send_tree
from vmjob.guest.lane import parse_object, printable, refusal, resync_message

__all__ = ["Progress", "Transfer"]

#: Seconds that the machine may be silent within a transfer: a guest that writes back a full page
#: cache to a slow disk pauses for many seconds.
PATIENCE = 120.0
#: Entries that one output may have.
MAX_ENTRIES = 1_000_000
#: Data from the machine is handed to the disk in pieces of this size.
STAGED_PREFIX = ".vmjob-"

T = TypeVar("T")
#: Called with the bytes transferred so far.
Progress = Callable[[int], None]


class Transfer:
    """Puts and gets on the data lane; one at a time, callers queue."""

    def __init__(self, sock: socket.socket, *, clean: bool = False) -> None:
        self._sock = sock
        self._cancel_reader, self._cancel_writer = os.pipe()
        self._channel = Channel(sock.fileno(), wire.MAX_RESPONSE_PIECE, patience=PATIENCE,
                                cancel=self._cancel_reader)
        self._dirty = not clean
        self._lock = anyio.Lock()

    def close(self) -> None:
        """Close the lane; no transfer may be under way."""
        self._sock.close()
        os.close(self._cancel_reader)
        os.close(self._cancel_writer)

    def stand_still(self) -> None:
        """The machine is suspended: from now on its silence means nothing."""
        self._channel.peer_stands_still = True

    def go_on(self) -> None:
        """The machine runs again."""
        self._channel.peer_stands_still = False

    async def put(self, source: Path, destination: str, progress: Progress | None = None) -> int:
        """Copy a file or directory into the machine; returns the bytes of data sent.

        ``source`` itself may be a link and is followed; links below it are copied as links.
        Raises `InputMissing`, `InputUnreadable`, `GuestRefused`, or what a lost machine raises.
        """
        real = Path(os.path.realpath(source))
        if not real.exists():
            raise InputMissing(f"there is no {str(source)!r}")
        if not (stat.S_ISREG(real.stat().st_mode) or real.is_dir()):
            raise InputUnreadable(f"{str(source)!r} is neither a file nor a directory")
        return await self._in_thread(lambda: self._put(real, destination, progress))

    async def get(self, source: str, destination: Path, *, limit: int,
                  progress: Progress | None = None) -> int:
        """Copy a file or directory out of the machine; returns the bytes of data received.

        It appears at ``destination`` whole or not at all, replacing a file or an empty
        directory there. ``limit`` bounds its size in bytes. Raises `OutputMissing`,
        `OutputUnsafe`, `OutputTooLarge`, `HostDiskFull`, or what a lost machine raises.
        """
        return await self._in_thread(lambda: self._get(source, destination, limit, progress))

    async def put_parcel(self, records: Iterator[bytes | memoryview],
                         destination: str) -> list[int]:
        """Put files into a folder of the machine, see `vmjob.guest.folders`.

        Returns the new inode of each entry in order, 0 for what was left as it was.
        """
        target = "/v1/parcel?path=" + quote(os.fsencode(destination), safe="/")
        answer = await self._in_thread(lambda: self._send(target, records, "a folder")[1])
        inodes = answer.get("inodes")
        if not isinstance(inodes, list) or not all(type(each) is int for each in inodes):
            raise AgentProtocol("an answer about files without their inodes")
        return inodes

    async def get_parcel(self, source: str, names: list[tuple[str, int, int, int]], parent: int,
                         staged: str, limit: int) -> set[int]:
        """Get files of a folder as ``parent``/``staged``/0, 1, 2...: see `send_parcel`.

        Returns the numbers of those that were changed meanwhile, and must not be used. The rest
        are there unless the machine lies; together they have at most ``limit`` bytes.
        """
        return await self._in_thread(
            lambda: self._get_parcel(source, names, parent, staged, limit))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        async with self._lock:
            future = asyncio.get_running_loop().run_in_executor(None, self._guarded, work)
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                os.write(self._cancel_writer, b"x")
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([future])
                future.exception()
                os.read(self._cancel_reader, 1)
                raise

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            if self._dirty:
                self._resynchronise()
            self._dirty = True
            return work()
        except (Closed, Interrupted):
            raise AgentLost("the machine went away during a transfer") from None
        except TimedOut:
            raise AgentSilent("the machine was silent during a transfer") from None
        except wire.ProtocolError as error:
            raise AgentProtocol(f"the agent broke the protocol: {error}") from None

    # -- in the thread -------------------------------------------------------------------------

    def _resynchronise(self) -> None:
        message, proof = resync_message()
        self._channel.drop()
        # The guest stops sending as soon as it hears from us; the socket's buffer holds the rest.
        self._channel.write(message)
        self._channel.discard_until(proof)
        self._dirty = False

    def _put(self, source: Path, destination: str, progress: Progress | None) -> int:
        target = "/v1/tree?path=" + quote(os.fsencode(destination), safe="/")
        records = send_tree(os.fsencode(source), wire.MAX_REQUEST_PIECE)
        return self._send(target, records, str(source), progress)[0]

    def _send(self, target: str, records: Iterator[bytes | memoryview], what: str,
              progress: Progress | None = None) -> tuple[int, dict[str, Any]]:
        """Put records; the bytes that were sent, and the machine's answer."""
        channel = self._channel
        channel.write(wire.request_head("PUT", target, {"transfer-encoding": "chunked"}))
        sent = 0
        try:
            for record in records:
                self._write_chunk(record)
                sent += len(record)
                if progress:
                    progress(sent)
        except TreeError as error:
            self._abort()
            raise InputUnreadable(f"cannot read {what}: {error.message}") from error
        channel.write(b"0\r\n\r\n")
        status, body = self._answer()
        if status != 200:
            raise refusal(status, body)
        self._dirty = False
        return sent, parse_object(body)

    def _abort(self) -> None:
        """Tell the machine that no more comes, and take its refusal."""
        self._write_chunk(b"F{\"error\":\"aborted\"}")
        self._channel.write(b"0\r\n\r\n")
        self._answer()
        self._dirty = False

    def _get(self, source: str, destination: Path, limit: int, progress: Progress | None) -> int:
        target = "/v1/tree?path=" + quote(os.fsencode(source), safe="/")
        self._channel.write(wire.request_head("GET", target, {"content-length": "0"}))
        status, body = self._answer(chunked=True)
        if status != 200:
            self._dirty = False
            said = refusal(status, body)
            if said.context["reason"] == "not-found":
                raise OutputMissing(f"the job made no {source!r}")
            raise said
        with _staging(destination) as (parent, name):
            receiver = TreeReceiver(parent, name, limit=limit, entries=MAX_ENTRIES)
            try:
                while (record := self._channel.chunk(wire.MAX_RESPONSE_PIECE)) is not None:
                    receiver.feed(record)
                    if progress:
                        progress(receiver.bytes)
            except TreeError as error:
                raise _output_error(source, error) from error
            finally:
                receiver.close()
            if not receiver.done:
                raise AgentProtocol(f"the agent sent half of {source!r}")
            self._dirty = False
            _publish(parent, name, destination)
        return receiver.bytes

    def _get_parcel(self, source: str, names: list[tuple[str, int, int, int]], parent: int,
                    staged: str, limit: int) -> set[int]:
        target = "/v1/parcel?path=" + quote(os.fsencode(source), safe="/")
        body = json.dumps({"names": names}).encode()
        self._channel.write(
            wire.request_head("POST", target, {"content-length": str(len(body))}) + body)
        status, said = self._answer(chunked=True)
        if status != 200:
            self._dirty = False
            raise refusal(status, said)
        receiver = TreeReceiver(parent, staged, limit=limit, entries=len(names) + 1,
                                take_link=lambda depth, target: False)
        last = b""
        try:
            while (record := self._channel.chunk(wire.MAX_RESPONSE_PIECE)) is not None:
                receiver.feed(record)
                last = bytes(record) if bytes(record[:1]) == b"Z" else b""
        except TreeError as error:
            raise _output_error(source, error) from error
        finally:
            receiver.close()
        if not receiver.done or not last:
            raise AgentProtocol(f"the agent sent half of what it was asked for in {source!r}")
        self._dirty = False
        changed = parse_object(last[1:]).get("changed")
        if not isinstance(changed, list):
            raise AgentProtocol("files without a word on whether they changed")
        return {each for each in changed if type(each) is int}

    def _write_chunk(self, record: bytes | memoryview) -> None:
        self._channel.write(b"".join((b"%x\r\n" % len(record), record, b"\r\n")))

    def _answer(self, *, chunked: bool = False) -> tuple[int, bytes]:
        lines = self._channel.head()
        if not lines:
            raise wire.ProtocolError("an empty answer")
        status = wire.parse_status_line(lines[0])
        length = wire.parse_length(wire.parse_fields(lines[1:]), wire.MAX_RESPONSE_PIECE)
        if length is None and not (chunked and status == 200):
            raise wire.ProtocolError("a chunked answer where none is taken")
        return status, b"" if length is None else bytes(self._channel.exactly(length))


def _output_error(source: str, error: TreeError) -> VmjobError:
    # The machine may have said it: an F record.
    text = f"output {source!r}: {printable(error.message)}"
    if error.reason in ("unsafe-name", "unsafe-link", "unsafe-type", "too-deep", "malformed"):
        return OutputUnsafe(text, reason=error.reason)
    if error.reason in ("too-large", "too-many"):
        return OutputTooLarge(text, reason=error.reason)
    if error.reason == "no-space":
        return HostDiskFull(text)
    return GuestRefused(text, reason=printable(error.reason))


def _full(error: OSError, path: Path) -> None:
    """Raise `HostDiskFull` where that is what is wrong, and not the path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise HostDiskFull(f"there is no room for {path}: {error.strerror}") from error


@contextlib.contextmanager
def _staging(destination: Path) -> Iterator[tuple[int, str]]:
    """A fresh name beside ``destination``; whatever is left under it is removed."""
    directory = destination.parent
    name = STAGED_PREFIX + os.urandom(8).hex()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        _full(error, directory)
        raise BadPath(f"cannot write to {directory}: {error.strerror}") from error
    try:
        yield fd, name
    finally:
        os.close(fd)
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _publish(parent: int, name: str, destination: Path) -> None:
    try:
        os.rename(name, destination.name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError as error:
        _full(error, destination)
        raise BadPath(f"cannot put the output at {destination}: {error.strerror}",
                      advice="Move away what is there, or give the output another name.") from error

