"""The data lane: files and trees, in a process of its own.

A transfer keeps the guest's processor busy for seconds; in its own process it never
delays an answer on another lane, and plain blocking code serves it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from . import files, wire
from .channel import Channel, Closed, Interrupted
from .folders import STAGED
from .lane import sync_nonce
from .parcels import ParcelReceiver, send_parcel, unpack
from .place import Place
from .request import Refused, Request, refuse, reply
from .tree import TreeError, TreeReceiver, send_tree

#: Entries that one upload may have.
MAX_UPLOAD_ENTRIES = 1_000_000
#: Bytes that one upload may have: no limit of its own, the disk ends it.
MAX_UPLOAD = 1 << 62


class DataServer:
    """Answers ``GET`` and ``PUT`` of trees on one lane."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def serve(self, fd: int) -> None:
        """Answer requests until the other end closes for good."""
        self.answer(Channel(fd, wire.MAX_REQUEST_PIECE, interruptible=True))

    def answer(self, channel: Channel) -> None:
        """The same on a channel that is there already."""
        lost = False
        while True:
            try:
                if lost:
                    _hunt(channel)
                    lost = False
                self._exchange(channel)
            except (wire.ProtocolError, Interrupted):
                lost = True
            except Closed:
                return

    def _exchange(self, channel: Channel) -> None:
        channel.skip_newlines()
        first = channel.line()
        if nonce := sync_nonce(first):
            channel.write(wire.SYNC_ACK + nonce + b"\n")
            return
        method, target = wire.parse_request_line(first)
        request = Request(method, target, wire.parse_fields(channel.head()), b"")
        try:
            if method == "PUT" and request.name == "tree":
                self._put(channel, request)
                return
            if method == "PUT" and request.name == "parcel":
                self._put_parcel(channel, request)
                return
            request.body = bytes(channel.exactly(
                wire.parse_length(request.fields, wire.MAX_REQUEST_PIECE) or 0))
            if method == "GET" and request.name == "tree":
                self._get(channel, request)
            elif method == "POST" and request.name == "parcel":
                self._get_parcel(channel, request)
            else:
                raise Refused(404, "unknown-request", "no such request on this lane")
        except Refused as refusal:
            channel.write(refuse(refusal))

    def _get(self, channel: Channel, request: Request) -> None:
        path = self.place.resolve(request.required("path"))
        self._send(channel, send_tree(path, wire.MAX_RESPONSE_PIECE))

    def _get_parcel(self, channel: Channel, request: Request) -> None:
        path = self.place.resolve(request.required("path"))
        try:
            self._send(channel, send_parcel(path, request.json()["names"],
                                            wire.MAX_RESPONSE_PIECE))
        except (ValueError, TypeError, KeyError) as error:
            raise Refused(400, "malformed", f"a request that cannot be read: {error}") from error

    def _send(self, channel: Channel, records: Iterator[bytes | memoryview]) -> None:
        try:
            first = next(records)
        except TreeError as error:
            status = {"not-found": 404, "denied": 403}.get(error.reason, 409)
            raise Refused(status, error.reason, error.message) from error
        channel.write(wire.response_head(200, {"transfer-encoding": "chunked"}))
        try:
            _write_chunk(channel, first)
            for record in records:
                if channel.interrupted():
                    raise Interrupted
                _write_chunk(channel, record)
        except TreeError as error:
            failure = json.dumps({"error": error.reason, "message": error.message})
            _write_chunk(channel, b"F" + failure.encode())
        channel.write(b"0\r\n\r\n")

    def _put(self, channel: Channel, request: Request) -> None:
        """Take a tree; it appears under its name when it is whole."""
        path = self.place.resolve(request.required("path")).rstrip("/")
        name = os.path.basename(path)

        def publish(parent: int, staged: str, receiver: TreeReceiver) -> dict[str, Any]:
            _publish(parent, staged, name)
            return {}

        self._take(channel, request, os.path.dirname(path), publish,
                   functools.partial(TreeReceiver, take_link=_any_link))

    def _put_parcel(self, channel: Channel, request: Request) -> None:
        """Take files of a folder; each appears under its name when all came."""

        def publish(parent: int, staged: str, receiver: TreeReceiver) -> dict[str, Any]:
            assert isinstance(receiver, ParcelReceiver)
            return {"inodes": unpack(parent, staged, receiver.contents, self.place.owner())}

        self._take(channel, request, self.place.resolve(request.required("path")), publish,
                   ParcelReceiver)

    def _take(self, channel: Channel, request: Request, directory: str,
              publish: Callable[[int, str, TreeReceiver], dict[str, Any]],
              make: Callable[..., TreeReceiver]) -> None:
        """Take a tree under a name that nobody knows in ``directory``, and publish it."""
        if wire.parse_length(request.fields, 0) is not None:
            raise wire.ProtocolError("a tree that is not chunked")
        problem: Refused | None = None
        receiver: TreeReceiver | None = None
        parent = -1
        staged = f"{STAGED}{os.urandom(16).hex()}"
        told: dict[str, Any] = {}
        try:
            try:
                files.make_directory(directory, self.place.owner())
                parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                receiver = make(parent, staged, limit=MAX_UPLOAD, entries=MAX_UPLOAD_ENTRIES,
                                owner=self.place.owner())
            except OSError as error:
                problem = Refused.from_os(error)
            while (record := channel.chunk(wire.MAX_REQUEST_PIECE)) is not None:
                if problem is None and receiver is not None:
                    try:
                        receiver.feed(record)
                    except TreeError as error:
                        problem = Refused(507 if error.reason == "no-space" else 409,
                                          error.reason, error.message)
            if problem is None and (receiver is None or not receiver.done):
                problem = Refused(400, "malformed", "the tree is not whole")
            if problem is None and receiver is not None:
                told = publish(parent, staged, receiver)
        finally:
            if receiver:
                receiver.close()
            if parent >= 0:
                _discard(os.path.join(directory, staged))
                os.close(parent)
        if problem:
            raise problem
        assert receiver is not None
        channel.write(reply(200, {"bytes": receiver.bytes, **told}))


def _hunt(channel: Channel) -> None:
    """Discard everything up to a resynchronisation, and answer it."""
    while True:
        try:
            channel.skip_newlines()
            line = channel.line()
        except wire.ProtocolError:
            channel.drop()
            continue
        if nonce := sync_nonce(line):
            channel.write(wire.SYNC_ACK + nonce + b"\n")
            return


def _any_link(depth: int, target: str) -> bool:
    """Links from the host are taken as they are: they can only name files of the machine."""
    return True


def _publish(parent: int, staged: str, name: str) -> None:
    try:
        os.rename(staged, name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError as error:
        raise Refused(409, "exists", error.strerror or str(error)) from error


def _discard(path: str) -> None:
    try:
        files.delete(path)
    except OSError:
        pass  # it was renamed into place, or never made


def _write_chunk(channel: Channel, record: bytes | memoryview) -> None:
    head = b"%x\r\n" % len(record)
    if len(record) < 4096:
        channel.write(b"".join((head, record, b"\r\n")))
        return
    channel.write(head)
    channel.write(record)
    channel.write(b"\r\n")


