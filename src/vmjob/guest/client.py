"""What the host can ask of a machine: the agent's requests as methods.

One `AgentClient` per machine. It may be used by several tasks of one event loop.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlencode

import anyio
import msgspec

from vmjob.errors import (
    AgentLost,
    AgentProtocol,
    AgentVersion,
    CommandNotExecutable,
    CommandNotFound,
    GuestRefused,
    VmjobError,
)
from vmjob.guest.agent import wire
from vmjob.guest.folders import News, Stamp, parse_news, split_names
from vmjob.guest.lane import DEADLINE, Lane, parse_object
from vmjob.guest.transfer import Progress, Transfer

__all__ = ["AgentClient", "Entry", "Hello", "Identity", "Limits", "Sink", "TaskEnd"]

#: Seconds that one long poll waits in the machine; then the host asks again.
POLL = 50.0
#: Undelivered output of one task that the host holds, bytes; the agent keeps the rest.
HELD_OUTPUT = 1024 * 1024
#: Seconds that `AgentClient.start` may wait for a short command's end, which spares a second
#: question: 2 to 3 ms under TCG, 20 for the first in a copy of a frozen machine. Whoever else asks
#: loses no more than this; once there is output, the agent waits 0.02 s more at most.
SHORT_COMMAND = 0.1

T = TypeVar("T")
Stream = Literal["stdout", "stderr"]
#: Takes output as it comes; the job waits while this does.
Sink = Callable[[Stream, bytes], Awaitable[None]]


class Hello(msgspec.Struct, frozen=True):
    """The agent's introduction. ``generation`` changes when the agent was started anew."""

    protocol: int
    oldest: int
    generation: str
    kernel: str
    processor: str
    processor_flags: list[str]
    cpus: int
    memory_bytes: int
    workdir: str


@dataclass(frozen=True)
class Identity:
    """What makes one machine of many (it may be a copy of a frozen one).

    ``seed``: 64 secret random bytes; ``machine_id``: 32 hexadecimal digits; ``mac``: 6 bytes, for
    a machine with a network.
    """

    hostname: str
    seed: bytes
    machine_id: str
    mac: bytes | None = None

    @classmethod
    def fresh(cls, hostname: str, *, network: bool) -> Identity:
        """One that nobody has had before."""
        # The second-lowest bit of the first byte: administered locally, not by a maker.
        mac = b"\x52\x54\x00" + os.urandom(3) if network else None
        return cls(hostname, os.urandom(64), os.urandom(16).hex(), mac)


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """Limits of one command, kept by the guest's kernel; None: none of its own.

    ``cpu_seconds`` of all its processes together; ``memory_bytes`` of all together, page
    cache included; ``file_bytes`` of each file it writes; ``processes`` at one time.
    """

    cpu_seconds: float | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    processes: int | None = None


class TaskEnd(msgspec.Struct, frozen=True):
    """How a command ended: exactly one of ``exit_code`` and ``signal`` is set.

    ``ended_by`` names a cause other than the job's own: ``cpu-limit``, ``out-of-memory``, or
    what `AgentClient.stop` was told. ``rusage`` holds the 16 ``ru_*`` values of getrusage(2) for
    the first process and those it waited for; ``cpu_seconds`` and ``memory_peak_bytes`` are of
    all processes, from the control group (None where there is none).
    """

    exit_code: int | None
    signal: int | None
    wall_seconds: float
    rusage: dict[str, float]
    ended_by: str | None
    cpu_seconds: float | None
    memory_peak_bytes: int | None
    oom_kills: int


class Entry(msgspec.Struct, frozen=True):
    """One entry of a listing; ``size`` in bytes."""

    name: str
    type: str
    size: int
    mode: int
    mtime_ns: int


class _Follower:
    """One task whose output somebody wants."""

    def __init__(self, offsets: Mapping[Stream, int] | None = None) -> None:
        self.offsets: dict[Stream, int] = {"stdout": 0, "stderr": 0, **(offsets or {})}
        self.pending: list[tuple[Stream, bytes]] = []
        self.held = 0
        self.end: TaskEnd | None = None
        #: What makes following it impossible; its own, so that the other followers go on.
        self.failure: VmjobError | None = None

    @property
    def wants_news(self) -> bool:
        return self.end is None and self.failure is None


class AgentClient:
    """The agent of one machine, over its lanes (`wire.LANES`: name -> socket).

    ``clean``: no exchange was ever cut off on these lanes, so none needs a resynchronisation.
    ``slowness``: all deadlines are longer by this factor (`MachineSpec.slowness`).
    """

    def __init__(self, lanes: Mapping[str, socket.socket], *, clean: bool = False,
                 slowness: float = 1.0) -> None:
        self._control = Lane(lanes["control"], "control", clean=clean, slowness=slowness)
        self._output = Lane(lanes["output"], "output", clean=clean, slowness=slowness)
        self._input = Lane(lanes["input"], "input", clean=clean, slowness=slowness)
        self._transfer = Transfer(lanes["data"], clean=clean)
        self._followers: dict[int, _Follower] = {}
        self._early: dict[int, _Follower] = {}
        #: What came of commands that nobody follows at the moment and that are not forgotten yet.
        self._taken: dict[int, dict[Stream, int]] = {}
        self._polling = anyio.Lock()
        self._poll_scope: anyio.CancelScope | None = None
        self._left_out: set[int] = set()
        self._epoch = -1
        self._over: list[int] = []
        self._messages_seen = 0
        self._newest_message = 0
        self._message_sinks: list[Callable[[str], None]] = []
        self._generation: str | None = None

    def stand_still(self) -> None:
        """The machine is suspended: no deadline comes nearer until `go_on`."""
        for each in (self._control, self._output, self._input, self._transfer):
            each.stand_still()

    def go_on(self) -> None:
        """The machine runs again."""
        for each in (self._control, self._output, self._input, self._transfer):
            each.go_on()

    def close(self) -> None:
        """Close all lanes. The machine is not told: it is about to end."""
        for lane in (self._control, self._output, self._input):
            lane.close()
        self._transfer.close()

    # -- the agent itself ----------------------------------------------------------------------

    async def hello(self, deadline: float) -> Hello:
        """Wait until the agent answers (it may still be booting) and agree on the protocol.

        Raises `AgentVersion` when host and image are too far apart.
        """
        answer = await self._control.request("GET", "/v1/hello", deadline=deadline)
        hello = _convert(answer.json(), Hello)
        if hello.protocol < wire.OLDEST_PROTOCOL or hello.oldest > wire.PROTOCOL_VERSION:
            raise AgentVersion(f"the image's agent speaks protocol {hello.oldest} to "
                               f"{hello.protocol}, this vmjob {wire.OLDEST_PROTOCOL} to "
                               f"{wire.PROTOCOL_VERSION}")
        self._generation = hello.generation
        return hello

    async def introduce(self, identity: Identity, deadline: float = DEADLINE) -> None:
        """Tell the machine who it is and what time it is: before anything else is asked of it.

        For one that answers already; the time is that of the call.
        """
        said = {"seed": identity.seed.hex(), "hostname": identity.hostname, "time": time.time(),
                "machine_id": identity.machine_id,
                "mac": identity.mac.hex() if identity.mac else None}
        await self._control.request("POST", "/v1/identity", said, deadline=deadline)
        self._generation = identity.machine_id

    async def set_clock(self, seed: bytes = b"") -> None:
        """Tell a machine that stood still what time it is.

        One that continues from a checkpoint gets ``seed`` (64 random bytes) as well: it may have
        continued from there before.
        """
        await self._control.request("POST", "/v1/clock", {"time": time.time(), "seed": seed.hex()})

    async def ping(self, deadline: float = DEADLINE) -> dict[str, Any]:
        """Whether the agent is well; its clock, load and free memory.

        Raises `AgentLost` when it is another one than said hello.
        """
        answer = (await self._control.request("GET", "/v1/ping", deadline=deadline)).json()
        if self._generation and answer.get("generation") != self._generation:
            raise AgentLost("the agent in the machine was replaced by another one")
        return answer

    async def settle(self) -> None:
        """Let the machine's kernel forget what it has read from disk so far."""
        await self._control.request("POST", "/v1/settle")

    async def sleep(self) -> None:
        """Get the machine ready for being frozen; then it waits for `introduce`."""
        await self._control.request("POST", "/v1/sleep")

    async def grow_disk(self, size: int) -> int:
        """Let the file system fill its disk of at least ``size`` bytes; returns its own size."""
        answer = await self._control.request("POST", f"/v1/disk?size={size}")
        return _number(answer.json(), "size_bytes")

    # -- commands ------------------------------------------------------------------------------

    async def start(self, argv: list[str], *, env: Mapping[str, str] | None = None,
                    cwd: str | None = None, user: str | None = None,
                    limits: Limits | None = None, stdin: bool = False,
                    wait: float = 0.0) -> int:
        """Start a command; returns its number.

        ``cwd`` and ``user`` default to the job's directory and the unprivileged user ``job``.
        With ``stdin``, it reads what `feed` writes; else its input is empty. Who will `follow` it
        next may give ``wait`` seconds to its end (`SHORT_COMMAND`). Raises `CommandNotFound`,
        `CommandNotExecutable` or `GuestRefused`.
        """
        asked: dict[str, Any] = {"argv": argv, "stdin": "stream" if stdin else "none"}
        if wait:
            asked["wait_seconds"] = wait
            asked["messages_after"] = self._messages_seen
        if self._over:
            asked["forget"], self._over = self._over, []
        if env:
            asked["env"] = dict(env)
        if cwd is not None:
            asked["cwd"] = cwd
        if user is not None:
            asked["user"] = user
        if limits is not None:
            asked["limits"] = msgspec.to_builtins(limits)
        try:
            answer = await self._control.request("POST", "/v1/tasks", asked)
        except GuestRefused as refused:
            if refused.context["reason"] == "not-found":
                raise CommandNotFound(refused.message.removeprefix("the machine refused: "),
                                      argv=argv) from None
            if refused.context["reason"] == "not-executable":
                raise CommandNotExecutable(refused.message.removeprefix("the machine refused: "),
                                           argv=argv) from None
            raise
        except BaseException:
            self._over = asked.get("forget", []) + self._over  # it may not have got there
            raise
        head, rest = _split(answer.body)
        self._epoch = _number(head, "epoch")
        task = _number(head, "id")
        if task in self._followers or task in self._early:
            raise AgentProtocol("the agent gave two commands the same number")
        if wait:
            self._early[task] = follower = _Follower()
            self._take(task, follower, head.get("news"), rest)
            self._take_messages(head)
        return task

    async def follow(self, task: int, sink: Sink,
                     offsets: Mapping[Stream, int] | None = None) -> TaskEnd:
        """Hand a command's output to ``sink`` as it comes, every byte once; return its end.

        ``offsets``: what was taken of it already, by an earlier client (bytes of each stream).
        """
        early = self._early.pop(task) if task in self._early else _Follower(offsets)
        follower = self._followers.setdefault(task, early)
        try:
            while True:
                while follower.pending:
                    stream, data = follower.pending.pop(0)
                    follower.held -= len(data)
                    await sink(stream, data)
                # Not earlier: each cancelled poll costs a resynchronisation.
                if task in self._left_out and self._poll_scope is not None:
                    self._poll_scope.cancel()  # it may wait long for news of others, without us
                if follower.failure is not None:
                    raise follower.failure
                if follower.end is not None:
                    await self._hear_all()
                    return follower.end
                async with self._polling:
                    if not follower.pending and follower.wants_news:
                        await self._poll()
        finally:
            self._taken[task] = self._followers.pop(task).offsets

    def received(self, task: int) -> dict[Stream, int]:
        """How much of each stream of a command has come from the machine so far, bytes.

        Not all of it may have reached its sink; nothing of it will come again.
        """
        follower = self._followers.get(task) or self._early.get(task)
        return dict(follower.offsets if follower else self._taken.get(task, _Follower().offsets))

    async def feed(self, task: int, source: Callable[[], Awaitable[bytes]], *,
                   again: bool = False) -> None:
        """Write what ``source`` returns to a command's input until it returns b''.

        Ends early, without an error, when the command reads no more. With ``again``, the command
        may have got the beginning already, from an earlier client; it gets it once.
        """
        offset = 0
        is_open = True
        while is_open:
            data = await source()
            while is_open:
                piece = data[:wire.MAX_REQUEST_PIECE]
                end = "" if data else "&end=1"
                answer = (await self._input.request(
                    "POST", f"/v1/tasks/{task}/stdin?offset={offset}{end}", piece)).json()
                taken = _number(answer, "taken")
                if again:
                    taken = min(taken, offset + len(piece))
                if not offset <= taken <= offset + len(piece):
                    raise AgentProtocol("the agent took input that it was not given")
                data = data[taken - offset:]
                offset = taken
                is_open = answer.get("open") is True
                if not data:
                    break
            if end:
                return

    async def signal(self, task: int, number: int, *, why: str | None = None) -> None:
        """Send a signal to all processes of a command; ``why`` becomes its ``ended_by``."""
        query = urlencode({"number": number, **({"why": why} if why else {})})
        await self._control.request("POST", f"/v1/tasks/{task}/signal?{query}")

    def forget(self, task: int) -> None:
        """Let the agent free what it holds of a command that has ended, with the next `start`."""
        self._over.append(task)
        self._taken.pop(task, None)

    # -- files -----------------------------------------------------------------------------------

    async def put(self, source: Path, destination: str, progress: Progress | None = None) -> int:
        """See `Transfer.put`."""
        return await self._transfer.put(source, destination, progress)

    async def get(self, source: str, destination: Path, *, limit: int,
                  progress: Progress | None = None) -> int:
        """See `Transfer.get`."""
        return await self._transfer.get(source, destination, limit=limit, progress=progress)

    async def ls(self, path: str = "") -> list[Entry]:
        """The entries of a directory of the machine (of the job's directory by default)."""
        answer = await self._control.request("GET", f"/v1/list?path={_quoted(path)}")
        return _convert(answer.json(names=True).get("entries"), list[Entry])

    async def mkdir(self, path: str) -> None:
        """Make a directory and its parents; one that exists is fine."""
        await self._control.request("POST", f"/v1/mkdir?path={_quoted(path)}")

    async def delete(self, path: str) -> None:
        """Remove a file, a link or a whole directory."""
        await self._control.request("DELETE", f"/v1/files?path={_quoted(path)}")

    # -- folders ---------------------------------------------------------------------------------

    async def folder(self, path: str, seen: int, *, without: Iterable[str] = (),
                     most: int = 10_000, begin: bool = False) -> News:
        """What changed in a folder since version ``seen``; see `News`.

        With ``begin``, it is looked through anew, and each file is taken for whole.
        """
        asked = {"path": path, "seen": seen, "without": sorted(without), "most": most,
                 "begin": begin}
        answer = await self._control.request("POST", "/v1/folder", asked)
        return parse_news(answer.json(names=True), seen)

    async def folder_note(self, path: str, stamps: Mapping[str, Stamp], *,
                          without: Iterable[str] = (), most: int = 10_000) -> None:
        """These files were put: they are no news to us."""
        for names in split_names(stamps.items()):
            await self._control.request("POST", "/v1/folder/note", {
                "path": path, "without": sorted(without), "most": most, "names": names})

    async def folder_remove(self, path: str, stamps: Mapping[str, Stamp], *,
                            without: Iterable[str] = (), most: int = 10_000) -> set[str]:
        """Remove files and empty directories that are still these; the names of those that stay."""
        kept: set[str] = set()
        for names in split_names(stamps.items()):
            answer = await self._control.request("POST", "/v1/folder/remove", {
                "path": path, "without": sorted(without), "most": most, "names": names})
            kept |= set(_convert(answer.json(names=True).get("kept"), list[str]))
        return kept

    async def put_parcel(self, records: Iterator[bytes | memoryview],
                         destination: str) -> list[int]:
        """See `Transfer.put_parcel`."""
        return await self._transfer.put_parcel(records, destination)

    async def get_parcel(self, source: str, names: list[tuple[str, int, int, int]], parent: int,
                         staged: str, limit: int) -> set[int]:
        """See `Transfer.get_parcel`."""
        return await self._transfer.get_parcel(source, names, parent, staged, limit)

    # -- messages --------------------------------------------------------------------------------

    async def message_to_guest(self, text: str) -> None:
        """A line (at most `wire.MAX_MESSAGE` bytes) for the jobs to read."""
        await self._control.request("POST", "/v1/messages", {"text": text})

    @property
    def messages_seen(self) -> int:
        """The number of the last message that came; see `continue_messages`."""
        return self._messages_seen

    def continue_command(self, task: int, offsets: Mapping[Stream, int]) -> None:
        """So much of a command's output was taken by an earlier client."""
        self._taken[task] = _Follower(offsets).offsets

    def continue_messages(self, seen: int) -> None:
        """Messages up to this number were heard by an earlier client."""
        self._messages_seen = seen

    def on_message(self, sink: Callable[[str], None]) -> None:
        """Call ``sink`` with each line that a job sends, while a command is followed."""
        self._message_sinks.append(sink)

    async def poll_messages(self) -> None:
        """Hand what jobs have sent so far to the sinks, without waiting."""
        async with self._polling:
            await self._poll(wait=0.0)

    # -- inside ----------------------------------------------------------------------------------

    async def _poll(self, wait: float = POLL) -> None:
        """Ask once for news of every followed command."""
        asked = {str(task): f.offsets for task, f in self._followers.items()
                 if f.wants_news and f.held < HELD_OUTPUT}
        self._left_out = {task for task, f in self._followers.items() if f.held >= HELD_OUTPUT}
        answer = None
        with anyio.CancelScope() as self._poll_scope:
            answer = await self._output.request(
                "POST", "/v1/output",
                {"tasks": asked, "messages_after": self._messages_seen, "wait_seconds": wait,
                 "epoch": self._epoch}, deadline=wait + DEADLINE)
        self._left_out.clear()
        if answer is None:
            return
        head, rest = _split(answer.body)
        self._epoch = _number(head, "epoch")
        told = head.get("tasks")
        if not isinstance(told, dict):
            raise AgentProtocol("an answer about output without tasks")
        for key, news in told.items():
            if key not in asked:
                raise AgentProtocol("output of a command that nobody asked about")
            rest = self._take(int(key), self._followers.get(int(key)), news, rest)
        self._take_messages(head)

    async def _hear_all(self) -> None:
        """Hand over the messages that did not fit into the answer with a command's end."""
        newest = self._newest_message
        seen = -1
        for _ in range(wire.MAX_MESSAGES):
            if not seen < self._messages_seen < newest:
                return
            seen = self._messages_seen
            await self.poll_messages()

    def _take(self, task: int, follower: _Follower | None, news: object, rest: bytes) -> bytes:
        """Believe what an answer says of one command; returns the bytes of the others."""
        if not isinstance(news, dict):
            raise AgentProtocol("output of a command without its news")
        streams: tuple[Stream, Stream] = ("stdout", "stderr")
        if news.get("unknown"):
            if follower:
                follower.failure = AgentLost(f"the agent no longer knows command {task}")
            return rest
        for stream in streams:
            said = news.get(stream)
            if not isinstance(said, dict):
                raise AgentProtocol("output without its length")
            offset, length = _number(said, "offset"), _number(said, "length")
            data, rest = rest[:length], rest[length:]
            if len(data) != length:
                raise AgentProtocol("less output than was announced")
            if follower is None or follower.failure is not None:
                continue
            if offset != follower.offsets[stream]:
                # It may have asked for what the agent no longer holds: nobody else's fault.
                follower.failure = AgentProtocol(f"output of command {task} with a gap")
            elif data:
                follower.offsets[stream] += length
                follower.held += length
                follower.pending.append((stream, data))
        if follower is not None and follower.failure is None and news.get("end") is not None:
            follower.end = _convert(news["end"], TaskEnd)
            _check_end(follower.end)
        return rest

    def _take_messages(self, head: dict[str, Any]) -> None:
        self._newest_message = _number(head, "newest_message")
        for number, text in _convert(head.get("messages"), list[tuple[int, str]]):
            if number <= self._messages_seen:
                continue
            self._messages_seen = number
            for sink in self._message_sinks:
                sink(text[:wire.MAX_MESSAGE])


def _split(body: bytes) -> tuple[dict[str, Any], bytes]:
    """An answer's line of JSON, and the output that follows it."""
    line, newline, rest = body.partition(b"\n")
    if not newline:
        raise AgentProtocol("an answer about output without its first line")
    return parse_object(line), rest


def _check_end(end: TaskEnd) -> None:
    """A result that can be true: a lie about it would become vmjob's own exit code."""
    exited = end.exit_code is not None and 0 <= end.exit_code <= 255
    killed = end.signal is not None and 1 <= end.signal <= 64
    if exited == killed or (end.exit_code is None) == (end.signal is None):
        raise AgentProtocol("a result that cannot be")
    # Python reads NaN and infinity from JSON, but a record that holds them is no JSON.
    numbers = (end.wall_seconds, end.cpu_seconds or 0.0, *end.rusage.values())
    if not all(map(math.isfinite, numbers)):
        raise AgentProtocol("a result with numbers that are none")


def _convert(content: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise AgentProtocol(f"an answer that does not fit: {error}") from None


def _number(content: dict[str, Any], key: str) -> int:
    value = content.get(key)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise AgentProtocol(f"an answer without {key!r}")
    return value


def _quoted(path: str) -> str:
    return quote(path, safe="/", errors="surrogateescape")
