"""Requests and their answers: one thread per lane, one request at a time on each."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from . import files, wire
from .channel import Channel, Closed, Interrupted
from .place import Place, memory_facts, read_file
from .spawn import CannotStart
from .tasks import Task, TaskTable
from .tree import TreeError, TreeReceiver, send_tree

#: Seconds the agent waits for a job to read its input before it answers the host.
INPUT_PATIENCE = 0.5
#: Longest wait of one output request, seconds; the host asks again.
MAX_WAIT = 60.0
#: ``_IOW('f', 16, __u64)``: grow a mounted ext4 to so many blocks (Linux, fs/ext4/ext4.h).
EXT4_IOC_RESIZE_FS = 0x40086610
BLKGETSIZE64 = 0x80081272
#: Entries that one upload may have.
MAX_UPLOAD_ENTRIES = 1_000_000
#: Bytes that one upload may have: no limit of its own, the disk ends it.
MAX_UPLOAD = 1 << 62


class Refused(Exception):
    """A request that gets an error for an answer: HTTP status, stable reason, text."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


class Request:
    """One request; the body is still on the channel."""

    def __init__(self, method: str, target: str, fields: dict[str, str]) -> None:
        path, _, query = target.partition("?")
        self.method = method
        self.path = path.strip("/").split("/")[1:] if path.startswith("/v1/") else []
        self.query = {key: values[0] for key, values in
                      parse_qs(query, keep_blank_values=True, errors="surrogateescape").items()}
        self.fields = fields
        self.body: bytes = b""

    def json(self) -> dict[str, Any]:
        try:
            content = json.loads(self.body)
        except (ValueError, RecursionError):
            raise Refused(400, "malformed", "the body is not JSON") from None
        if not isinstance(content, dict):
            raise Refused(400, "malformed", "the body is not an object")
        return content

    def required(self, key: str) -> str:
        try:
            return self.query[key]
        except KeyError:
            raise Refused(400, "malformed", f"the request lacks {key!r}") from None


class Agent:
    """The state that all lanes share, and the answer to each request."""

    def __init__(self, place: Place) -> None:
        place.prepare()
        self.place = place
        self.table = TaskTable(place)
        self.generation = random_text()
        self.table.run()

    # -- one lane ----------------------------------------------------------------------------

    def serve(self, fd: int) -> None:
        """Answer requests on a lane until its other end closes for good."""
        channel = Channel(fd, wire.MAX_REQUEST_PIECE, interruptible=True)
        lost = False
        while True:
            try:
                if lost:
                    self._hunt(channel)
                    lost = False
                self._exchange(channel)
            except (wire.ProtocolError, Interrupted):
                lost = True
            except Closed:
                return

    def _hunt(self, channel: Channel) -> None:
        """Discard everything up to a resynchronisation, and answer it."""
        while True:
            try:
                channel.skip_newlines()
                line = channel.line()
            except wire.ProtocolError:
                channel.drop()
                continue
            if _acknowledge(channel, line):
                return

    def _exchange(self, channel: Channel) -> None:
        channel.skip_newlines()
        first = channel.line()
        if _acknowledge(channel, first):
            return
        method, target = wire.parse_request_line(first)
        request = Request(method, target, wire.parse_fields(channel.head()))
        try:
            self._answer(channel, request)
        except Refused as refusal:
            _reply(channel, refusal.status,
                   {"error": refusal.reason, "message": refusal.message})

    def _answer(self, channel: Channel, request: Request) -> None:
        name = request.path[0] if request.path else ""
        if request.method == "PUT" and name == "tree":
            self._put(channel, request)
            return
        length = wire.parse_length(request.fields, wire.MAX_REQUEST_PIECE)
        if length is None:
            raise wire.ProtocolError("a chunked body where none is taken")
        request.body = bytes(channel.exactly(length))
        if request.method == "GET" and name == "tree":
            self._get(channel, request)
        elif request.method == "POST" and name == "output":
            self._output(channel, request)
        else:
            handler = self._handlers().get((request.method, name))
            if handler is None:
                raise Refused(404, "unknown-request", "no such request in this protocol")
            _reply(channel, 200, self._guarded(handler, request))

    def _handlers(self) -> dict[tuple[str, str], Callable[[Request], dict[str, Any]]]:
        return {
            ("GET", "hello"): self._hello, ("GET", "ping"): self._ping,
            ("POST", "tasks"): self._task, ("GET", "tasks"): self._task_list,
            ("DELETE", "tasks"): self._forget, ("GET", "list"): self._list,
            ("POST", "mkdir"): self._mkdir, ("DELETE", "files"): self._delete,
            ("POST", "messages"): self._message, ("POST", "disk"): self._grow_disk,
        }

    @staticmethod
    def _guarded(handler: Callable[[Request], dict[str, Any]], request: Request) -> dict[str, Any]:
        """Run a handler; what goes wrong with files becomes an answer, not the agent's end."""
        try:
            return handler(request)
        except FileNotFoundError as error:
            raise Refused(404, "not-found", _text(error)) from error
        except PermissionError as error:
            raise Refused(403, "denied", _text(error)) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise Refused(507 if full else 409, "no-space" if full else "io",
                          _text(error)) from error
        except CannotStart as error:
            raise Refused(409, error.reason, error.message) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refused(400, "malformed", f"a request that cannot be read: {error}") from error

    # -- short questions ---------------------------------------------------------------------

    def _hello(self, request: Request) -> dict[str, Any]:
        return {"protocol": wire.PROTOCOL_VERSION, "oldest": wire.OLDEST_PROTOCOL,
                "generation": self.generation, "kernel": os.uname().release,
                "cpus": os.cpu_count() or 1, "memory_bytes": memory_facts().get("MemTotal", 0),
                "workdir": self.place.workdir}

    def _ping(self, request: Request) -> dict[str, Any]:
        load = read_file("/proc/loadavg").split()
        return {"generation": self.generation, "time": time.time(),
                "load": float(load[0]) if load else None,
                "memory_available_bytes": memory_facts().get("MemAvailable")}

    def _list(self, request: Request) -> dict[str, Any]:
        return files.listing(self.place.resolve(request.required("path")))

    def _mkdir(self, request: Request) -> dict[str, Any]:
        path = self.place.resolve(request.required("path"))
        files.make_directory(path, self.place.owner())
        return {}

    def _delete(self, request: Request) -> dict[str, Any]:
        files.delete(self.place.resolve(request.required("path")))
        return {}

    def _message(self, request: Request) -> dict[str, Any]:
        self.table.messages.deliver(str(request.json()["text"]))
        return {}

    def _grow_disk(self, request: Request) -> dict[str, Any]:
        """Let the writable file system fill its disk, which may be larger than the image's."""
        device = read_file("/run/vmjob-disk").strip() or "/dev/vdb"
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, b"\0" * 8))[0]
        finally:
            os.close(fd)
        fd = os.open(self.place.workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            facts = os.fstatvfs(fd)
            fcntl.ioctl(fd, EXT4_IOC_RESIZE_FS, struct.pack("Q", size // facts.f_frsize))
            facts = os.fstatvfs(fd)
        finally:
            os.close(fd)
        return {"size_bytes": facts.f_blocks * facts.f_frsize,
                "free_bytes": facts.f_bavail * facts.f_frsize}

    # -- tasks ---------------------------------------------------------------------------------

    def _find(self, request: Request) -> Task:
        try:
            return self.table.tasks[int(request.path[1])]
        except (LookupError, ValueError):
            raise Refused(404, "no-such-task", "there is no such task") from None

    def _task(self, request: Request) -> dict[str, Any]:
        """Start one, or (``tasks/N/signal``, ``tasks/N/stdin``) act on one."""
        if len(request.path) == 1:
            asked = request.json()
            argv = asked.get("argv")
            if not argv or not isinstance(argv, list) or not all(
                    isinstance(word, str) and "\0" not in word for word in argv):
                raise Refused(400, "malformed", "argv is not a list of words")
            try:
                self.place.account(asked.get("user"))
            except KeyError:
                raise Refused(404, "no-such-user",
                              f"there is no user {asked.get('user')!r} in the machine") from None
            return {"id": self.table.start(asked).id, "epoch": self.table.epoch}
        task = self._find(request)
        action = request.path[2] if len(request.path) > 2 else ""
        if action == "signal":
            number = int(request.required("number"))
            if why := request.query.get("why"):
                self.table.stop(task, number, why)
            else:
                self.table.signal(task, number)
            return {}
        if action == "stdin":
            return self._stdin(task, request)
        raise Refused(404, "unknown-request", "no such request in this protocol")

    def _stdin(self, task: Task, request: Request) -> dict[str, Any]:
        offset = int(request.required("offset"))
        end = time.monotonic() + INPUT_PATIENCE
        try:
            while True:
                taken = self.table.write_stdin(task, offset, request.body)
                if taken >= offset + len(request.body) or time.monotonic() >= end:
                    break
                time.sleep(0.005)  # no event tells when a pipe of a job has room for us alone
            if request.query.get("end") and taken >= offset + len(request.body):
                self.table.close_stdin(task)
            return {"taken": taken, "open": task.stdin is not None}
        except BrokenPipeError:
            return {"taken": task.stdin_taken, "open": False}

    def _task_list(self, request: Request) -> dict[str, Any]:
        return {"tasks": [{"id": t.id, "pid": t.pid, "end": t.end}
                          for t in list(self.table.tasks.values())]}

    def _forget(self, request: Request) -> dict[str, Any]:
        self.table.forget(self._find(request))
        return {}

    def _output(self, channel: Channel, request: Request) -> None:
        """Wait for news of some tasks; the answer is a JSON line, then the bytes it counts."""
        asked = request.json()
        wait = min(float(asked.get("wait_seconds", 0)), MAX_WAIT)
        deadline = time.monotonic() + wait
        after = int(asked.get("messages_after", 0))
        self.table.messages.acknowledge(after)
        while True:
            self.table.settle()
            head, pieces = self._gather(asked.get("tasks") or {}, after)
            left = deadline - time.monotonic()
            # A host that does not know the newest task is told at once, so that it can ask again.
            if head is not None or left <= 0 or asked.get("epoch") != self.table.epoch:
                break
            channel.wait_with(self.table.change_fd, left)
        head = {**(head or {"tasks": {}, "messages": []}), "epoch": self.table.epoch}
        line = json.dumps(head).encode() + b"\n"
        body = b"".join([line, *pieces])
        channel.write(wire.response_head(200, {"content-length": str(len(body))}) + body)

    def _gather(self, asked: dict[str, Any],
                after: int) -> tuple[dict[str, Any] | None, list[bytes]]:
        """News of tasks, or None when there is none; at most half a body in all."""
        told: dict[str, Any] = {}
        pieces: list[bytes] = []
        room = wire.MAX_RESPONSE_BODY // 2
        news = False
        for key, offsets in asked.items():
            task = self.table.tasks.get(int(key))
            if task is None:
                told[key] = {"unknown": True}
                news = True
                continue
            end = task.end
            streams: dict[str, Any] = {}
            complete = True
            for stream, window in task.windows.items():
                have = int(offsets.get(stream, 0))
                self.table.acknowledge(task, stream, have)
                offset, data = window.read(have, min(wire.MAX_STREAM_PIECE, room))
                room -= len(data)
                pieces.append(data)
                streams[stream] = {"offset": offset, "length": len(data)}
                complete = complete and offset + len(data) == window.end
                news = news or bool(data)
            # The result is told with the last byte, never before it.
            told[key] = {**streams, "end": end if complete else None}
            news = news or (end is not None and complete)
        messages = self.table.messages.after(after)
        if messages:
            news = True
            messages = messages[:200]
        return ({"tasks": told, "messages": messages}, pieces) if news else (None, [])

    # -- files ---------------------------------------------------------------------------------

    def _get(self, channel: Channel, request: Request) -> None:
        path = self.place.resolve(request.required("path"))
        records = send_tree(path, wire.MAX_RESPONSE_PIECE)
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
        if wire.parse_length(request.fields, 0) is not None:
            raise wire.ProtocolError("a tree that is not chunked")
        path = self.place.resolve(request.required("path")).rstrip("/")
        problem: Refused | None = None
        receiver: TreeReceiver | None = None
        parent = -1
        staged = f".vmjob-{random_text()}"
        try:
            try:
                files.make_directory(os.path.dirname(path), self.place.owner())
                parent = os.open(os.path.dirname(path),
                                 os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                receiver = TreeReceiver(parent, staged, limit=MAX_UPLOAD,
                                        entries=MAX_UPLOAD_ENTRIES, owner=self.place.owner(),
                                        take_link=_any_link)
            except OSError as error:
                problem = Refused(409, "io", _text(error))
            while (record := channel.chunk(wire.MAX_REQUEST_PIECE)) is not None:
                if problem is None and receiver is not None:
                    try:
                        receiver.feed(record)
                    except TreeError as error:
                        problem = Refused(507 if error.reason == "no-space" else 409,
                                          error.reason, error.message)
            if problem is None and (receiver is None or not receiver.done):
                problem = Refused(400, "malformed", "the tree is not whole")
            if problem is None:
                problem = _publish(parent, staged, os.path.basename(path))
        finally:
            if receiver:
                receiver.close()
            if parent >= 0:
                _discard(os.path.join(os.path.dirname(path), staged))
                os.close(parent)
        if problem:
            raise problem
        assert receiver is not None
        _reply(channel, 200, {"bytes": receiver.bytes})


def _acknowledge(channel: Channel, line: bytes) -> bool:
    """Answer a resynchronisation; whether the line was one."""
    if not line.startswith(wire.SYNC) or len(line) != len(wire.SYNC) + wire.NONCE_LENGTH:
        return False
    channel.write(wire.SYNC_ACK + line[len(wire.SYNC):] + b"\n")
    return True


def _any_link(depth: int, target: str) -> bool:
    """Links from the host are taken as they are: they can only name files of the machine."""
    return True


def _publish(parent: int, staged: str, name: str) -> Refused | None:
    try:
        os.rename(staged, name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError as error:
        return Refused(409, "exists", _text(error))
    return None


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


def _reply(channel: Channel, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body))}
    channel.write(wire.response_head(status, fields) + body)


def _text(error: OSError) -> str:
    where = f"{os.fsdecode(error.filename)!r}: " if error.filename else ""
    return where + (error.strerror or str(error))


def random_text() -> str:
    """16 random bytes in hexadecimal."""
    return os.urandom(16).hex()
