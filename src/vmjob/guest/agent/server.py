"""The agent's answers: short questions, commands, output, input."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time
from collections.abc import Callable
from typing import Any, TypeVar

from . import files, identity, wire
from .folders import Folders
from .lane import Lane
from .loop import READ, Loop
from .messages import Messages
from .place import Place, memory_facts, processor_facts, read_file
from .request import Refused, Request, refuse, reply, to_json
from .spawn import CannotStart
from .tasks import Task, TaskTable

#: Seconds the agent waits for a job to read its input before it answers the host.
INPUT_PATIENCE = 5.0
#: Longest wait of one output request, seconds; the host asks again.
MAX_WAIT = 60.0
#: ``_IOW('f', 16, __u64)``: grow a mounted ext4 to so many blocks (Linux, fs/ext4/ext4.h).
EXT4_IOC_RESIZE_FS = 0x40086610
#: What the kernel counts a disk's size in, bytes.
SECTOR = 512
#: Seconds in which the kernel must have heard that its disk grew, and between looks at it.
RESIZE_PATIENCE = 5.0
RESIZE_PERIOD = 0.001
#: Longest that the answer to a start waits for the command's end, seconds: it keeps others waiting.
MAX_START_WAIT = 0.1
#: The same once it has written something, which the host may want to see: seconds.
OUTPUT_PATIENCE = 0.02

T = TypeVar("T")


class Agent:
    """The state that all lanes share, and the answer to each request."""

    def __init__(self, place: Place) -> None:
        place.prepare()
        self.place = place
        self.loop = Loop()
        self.table = TaskTable(place, self.loop, self._tell)
        self.messages = Messages(place)
        self.folders = Folders(self._later)
        self.generation = os.urandom(16).hex()
        self._facts = self._find_facts()
        #: From `_sleep` to `_introduce`: no copy must be used before it has its own identity.
        self._asleep = False
        self._lanes: list[Lane] = []
        self._open = 0
        self._waiting: Request | None = None
        self._starting: Task | None = None
        self._heard_before = 0
        self.loop.watch(self.messages.fd, READ, self._heard)

    def serve(self, control: int, output: int, stdin: int) -> None:
        """Answer until every lane is closed."""
        self._open = 3
        self._lanes = [
            Lane(self.loop, control, self._control, self._abandon_start, self._closed),
            Lane(self.loop, output, self._output, self._stop_waiting, self._closed),
            Lane(self.loop, stdin, self._stdin, self._stop_input, self._closed)]
        self.loop.run()

    def _closed(self) -> None:
        self._open -= 1
        self.loop.stopped = not self._open

    # -- the control lane ------------------------------------------------------------------

    def _control(self, request: Request) -> bytes | None:
        try:
            if self._asleep and request.name not in ("hello", "identity"):
                raise Refused(409, "asleep", "the machine waits for its identity")
            if request.name == "tasks" and request.method == "POST":
                return _guarded(self._task, request)
            handler = self._handlers().get((request.method, request.name))
            if handler is None:
                raise Refused(404, "unknown-request", "no such request in this protocol")
            return reply(200, _guarded(handler, request))
        except Refused as refusal:
            return refuse(refusal)

    def _handlers(self) -> dict[tuple[str, str], Callable[[Request], dict[str, Any]]]:
        return {
            ("GET", "hello"): self._hello, ("POST", "identity"): self._introduce,
            ("POST", "clock"): self._set_clock,
            ("GET", "ping"): self._ping,
            ("GET", "tasks"): self._task_list, ("DELETE", "tasks"): self._forget,
            ("GET", "list"): self._list, ("POST", "mkdir"): self._mkdir,
            ("DELETE", "files"): self._delete, ("POST", "messages"): self._message,
            ("POST", "disk"): self._grow_disk, ("POST", "settle"): self._settle,
            ("POST", "sleep"): self._sleep, ("POST", "folder"): self._folder,
        }

    def _hello(self, request: Request) -> dict[str, Any]:
        return {**self._facts, "generation": self.generation}

    def _find_facts(self) -> dict[str, Any]:
        """What never changes, found once: a copy of a frozen machine need not look."""
        return {"protocol": wire.PROTOCOL_VERSION, "oldest": wire.OLDEST_PROTOCOL,
                "kernel": os.uname().release, **processor_facts(), "cpus": os.cpu_count() or 1,
                "memory_bytes": memory_facts().get("MemTotal", 0), "workdir": self.place.workdir}

    def _ping(self, request: Request) -> dict[str, Any]:
        load = read_file("/proc/loadavg").split()
        return {"generation": self.generation, "time": time.time(),
                "load": float(load[0]) if load else None,
                "memory_available_bytes": memory_facts().get("MemAvailable")}

    def _introduce(self, request: Request) -> dict[str, Any]:
        """The host says who this machine is."""
        asked = request.json()
        identity.assume(asked, self.place)
        self._asleep = False
        self.generation = str(asked["machine_id"])
        return {}

    def _set_clock(self, request: Request) -> dict[str, Any]:
        """The host says what time it is: this machine stood still."""
        identity.wake(request.json(), self.place)
        return {}

    def _settle(self, request: Request) -> dict[str, Any]:
        identity.drop_caches(self.place)
        return {}

    def _sleep(self, request: Request) -> dict[str, Any]:
        """Get ready for being frozen: nothing to do, nothing in memory that is not needed."""
        self.table.tidy()
        identity.clear_free_memory(self.place)
        self._asleep = True
        return {}

    def _list(self, request: Request) -> dict[str, Any]:
        return files.listing(self.place.resolve(request.required("path")))

    def _mkdir(self, request: Request) -> dict[str, Any]:
        path = self.place.resolve(request.required("path"))
        files.make_directory(path, self.place.owner())
        return {}

    def _delete(self, request: Request) -> dict[str, Any]:
        files.delete(self.place.resolve(request.required("path")))
        return {}

    def _later(self, key: object, seconds: float, call: Callable[[], None]) -> None:
        self.loop.later(key, seconds, call)

    def _folder(self, request: Request) -> dict[str, Any]:
        """What changed in a folder, or (``folder/note``, ``folder/remove``) what the host did."""
        asked = request.json()
        handle = {(): self.folders.changes, ("note",): self.folders.note,
                  ("remove",): self.folders.remove}[tuple(request.path[1:])]
        return handle(self.place.resolve(str(asked["path"])).rstrip("/"), asked)

    def _message(self, request: Request) -> dict[str, Any]:
        self.messages.deliver(str(request.json()["text"]))
        return {}

    def _grow_disk(self, request: Request) -> dict[str, Any]:
        """Let the writable file system fill its disk, which may be larger than the image's."""
        wanted = int(request.query.get("size", "0"))
        give_up = time.monotonic() + RESIZE_PATIENCE
        while (size := disk_size(self.place.workdir)) < wanted and time.monotonic() < give_up:
            time.sleep(RESIZE_PERIOD)
        fd = os.open(self.place.workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            facts = os.fstatvfs(fd)
            fcntl.ioctl(fd, EXT4_IOC_RESIZE_FS, struct.pack("Q", size // facts.f_frsize))
            facts = os.fstatvfs(fd)
        finally:
            os.close(fd)
        return {"size_bytes": facts.f_blocks * facts.f_frsize,
                "free_bytes": facts.f_bavail * facts.f_frsize}

    def _find(self, request: Request) -> Task:
        try:
            return self.table.tasks[int(request.path[1])]
        except (LookupError, ValueError):
            raise Refused(404, "no-such-task", "there is no such task") from None

    def _task(self, request: Request) -> bytes | None:
        """Start one, or (``tasks/N/signal``) act on one."""
        if len(request.path) > 1:
            if request.path[2:] != ["signal"]:
                raise Refused(404, "unknown-request", "no such request in this protocol")
            self.table.signal(self._find(request), int(request.required("number")),
                              request.query.get("why"))
            return reply(200, {})
        asked = request.json()
        for number in asked.get("forget") or ():
            if old := self.table.tasks.get(number):
                self.table.forget(old)
        argv = asked.get("argv")
        if not argv or not isinstance(argv, list) or not all(
                isinstance(word, str) and "\0" not in word for word in argv):
            raise Refused(400, "malformed", "argv is not a list of words")
        try:
            self.place.account(asked.get("user"))
        except KeyError:
            raise Refused(404, "no-such-user",
                          f"there is no user {asked.get('user')!r} in the machine") from None
        wait = min(float(asked.get("wait_seconds") or 0), MAX_START_WAIT)
        self._heard_before = int(asked.get("messages_after") or 0)
        task = self.table.start(asked)
        if self._waiting is not None:
            self._tell()  # who waits for news of the others wants to ask for this one's as well
        if wait <= 0 or self._ended(task):
            return self._started(task)
        self._starting = task
        self.loop.later("start", wait, self._give_up_starting)
        return None

    def _ended(self, task: Task) -> bool:
        return task.end is not None or any(not window.room for window in task.windows.values())

    def _started(self, task: Task) -> bytes:
        """The answer to a start: the task's number and what is known of it by now."""
        pieces: list[bytes] = []
        news, _ = self._news_of(task, {}, pieces, wire.MAX_RESPONSE_BODY // 2)
        return _news({"id": task.id, "epoch": self.table.epoch, "news": news,
                      **self.messages.told(self._heard_before)}, pieces)

    def _give_up_starting(self) -> None:
        assert self._starting is not None
        task = self._starting
        self._stop_starting()
        self._lanes[0].answer(self._started(task))

    def _abandon_start(self) -> None:
        """Nobody will know the number of a command whose start was not answered: end it."""
        if self._starting is not None:
            self.table.signal(self._starting, signal.SIGKILL, "abandoned")
            self.table.abandoned.add(self._starting.id)
            self._stop_starting()

    def _stop_starting(self) -> None:
        self._starting = None
        self.loop.forget("start")

    def _task_list(self, request: Request) -> dict[str, Any]:
        return {"tasks": [{"id": task.id, "pid": task.pid, "end": task.end}
                          for task in self.table.tasks.values()]}

    def _forget(self, request: Request) -> dict[str, Any]:
        self.table.forget(self._find(request))
        return {}

    # -- the output lane ---------------------------------------------------------------------

    def _output(self, request: Request) -> bytes | None:
        """News of some tasks; without any, the answer waits for them."""
        try:
            asked = request.json()
            wait = min(float(asked.get("wait_seconds", 0)), MAX_WAIT)
            self.messages.acknowledge(int(asked.get("messages_after", 0)))
            head, pieces = self._gather(asked.get("tasks") or {},
                                        int(asked.get("messages_after", 0)))
        except Refused as refusal:
            return refuse(refusal)
        except (ValueError, TypeError, AttributeError) as error:
            return refuse(Refused(400, "malformed", f"a request that cannot be read: {error}"))
        # A host that does not know the newest task is told at once, so that it can ask again.
        if head is None and wait > 0 and asked.get("epoch") == self.table.epoch:
            if self._waiting is not request:
                self._waiting = request
                self.loop.later("output", wait, self._give_up_waiting)
            return None
        return self._answer(head, pieces)

    def _answer(self, head: dict[str, Any] | None, pieces: list[bytes]) -> bytes:
        told = head or {"tasks": {}, "messages": [], "newest_message": 0}
        return _news({**told, "epoch": self.table.epoch}, pieces)

    def _tell(self) -> None:
        """Something happened: answer the host if it waits for that."""
        self.messages.take()  # what a command said before it ended comes with its end
        if self._starting is not None:
            if self._ended(self._starting):
                self._give_up_starting()
            elif any(window.end for window in self._starting.windows.values()):
                self.loop.sooner("start", OUTPUT_PATIENCE)
        if self._waiting is not None and (answer := self._output(self._waiting)) is not None:
            self._stop_waiting()
            self._lanes[1].answer(answer)

    def _give_up_waiting(self) -> None:
        self._waiting = None
        self._lanes[1].answer(self._answer(None, []))

    def _stop_waiting(self) -> None:
        self._waiting = None
        self.loop.forget("output")

    def _heard(self, events: int) -> None:
        if self.messages.take():
            self._tell()

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
            told[key], room = self._news_of(task, offsets, pieces, room)
            news = news or told[key]["end"] is not None or any(
                told[key][stream]["length"] for stream in task.windows)
        if not news and not self.messages.after(after):
            return None, []
        return {"tasks": told, **self.messages.told(after)}, pieces

    def _news_of(self, task: Task, offsets: dict[str, Any], pieces: list[bytes],
                 room: int) -> tuple[dict[str, Any], int]:
        """What the host, which has all before ``offsets``, does not know; and the room left."""
        end = task.end
        told: dict[str, Any] = {}
        complete = True
        for stream, window in task.windows.items():
            have = int(offsets.get(stream, 0))
            self.table.acknowledge(task, stream, have)
            offset, data = window.read(have, min(wire.MAX_STREAM_PIECE, room))
            room -= len(data)
            pieces.append(data)
            told[stream] = {"offset": offset, "length": len(data)}
            complete = complete and offset + len(data) == window.end
        # The result is told with the last byte, never before it.
        told["end"] = end if complete else None
        return told, room

    # -- the input lane ------------------------------------------------------------------------

    def _stdin(self, request: Request) -> bytes | None:
        """Take some of a task's input; while there is no room, the answer waits a little."""
        try:
            task = self._find(request)
            offset = int(request.required("offset"))
            taken = self.table.write_stdin(task, offset, request.body)
        except Refused as refusal:
            return refuse(refusal)
        except ValueError as error:
            return refuse(Refused(400, "malformed", str(error)))
        if taken == offset and request.body and task.stdin is not None:
            self.loop.later("input", INPUT_PATIENCE, lambda: self._input_done(task, request))
            self.table.when_writable(task, lambda: self._input_done(task, request))
            return None
        return self._taken(task, offset, request)

    def _input_done(self, task: Task, request: Request) -> None:
        self.loop.forget("input")
        self.table.stop_waiting(task)
        offset = int(request.required("offset"))
        self.table.write_stdin(task, offset, request.body)
        self._lanes[2].answer(self._taken(task, offset, request))

    def _taken(self, task: Task, offset: int, request: Request) -> bytes:
        if request.query.get("end") and task.stdin_taken >= offset + len(request.body):
            self.table.close_stdin(task)
        return reply(200, {"taken": task.stdin_taken, "open": task.stdin is not None})

    def _stop_input(self) -> None:
        self.loop.forget("input")
        for task in self.table.tasks.values():
            self.table.stop_waiting(task)


def disk_size(directory: str) -> int:
    """Bytes of the disk that a directory is on, as the kernel sees it now."""
    device = os.stat(directory).st_dev
    path = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size"
    with open(path, encoding="ascii") as file:
        return int(file.read()) * SECTOR


def _guarded(handler: Callable[[Request], T], request: Request) -> T:
    """Run a handler; what goes wrong with files becomes an answer, not the agent's end."""
    try:
        return handler(request)
    except OSError as error:
        raise Refused.from_os(error) from error
    except CannotStart as error:
        raise Refused(409, error.reason, error.message) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(400, "malformed", f"a request that cannot be read: {error}") from error


def _news(told: dict[str, Any], pieces: list[bytes]) -> bytes:
    """An answer of one line of JSON and the bytes that it speaks of."""
    body = b"".join([to_json(told), b"\n", *pieces])
    return wire.plain_head(len(body)) + body
