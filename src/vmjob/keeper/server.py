"""The keeper: one process for each machine that runs, which owns it and answers requests.

It holds the slot, an `AsyncMachine` and a socket in the slot. When it ends, however it does, the
machine's process ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmjob.api import AsyncMachine
from vmjob.engine.session import beside
from vmjob.engine.slot import Slot
from vmjob.errors import CheckpointFailed, MachineKept, UsageError, VmjobError, WrongState
from vmjob.guest.client import Stream, TaskEnd
from vmjob.home import Home
from vmjob.keeper import wire
from vmjob.keeper.log import Log
from vmjob.keeper.slots import LOG, SOCKET, kept_out, place_of
from vmjob.machine.contract import Driver, Status

__all__ = ["Keeper", "keep", "serve"]

#: Seconds in which a client must say what it wants.
REQUEST_DEADLINE = 10.0
#: Seconds for requests that are under way when the machine ends, and for what is given up to end.
END_DEADLINE = 5.0
#: Clients that may wait to be heard.
BACKLOG = 16
#: Entries of a directory in one line: each has a name of up to 255 bytes.
ENTRIES = 200

T = TypeVar("T")
Handler = Callable[["Keeper", "Peer", dict[str, Any]], Awaitable[dict[str, Any]]]


class Gone(Exception):
    """The client went away, so nobody wants what it asked for."""


class Peer:
    """One client: hears what it says while its request is carried out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self._wanted = False
        self.signals: asyncio.Queue[int] = asyncio.Queue()
        self.gone = asyncio.Event()

    async def say(self, line: bytes) -> None:
        """Raises `Gone`."""
        try:
            self._writer.write(line)
            await self._writer.drain()
        except ConnectionError:
            self.gone.set()
            raise Gone from None

    async def request(self) -> wire.Request | None:
        """What it wants; None when it wanted the greeting only. Raises `WireError`."""
        async with asyncio.timeout(REQUEST_DEADLINE):
            line = await self._line()
        return wire.request_of(wire.decode(line)) if line else None

    async def listen(self) -> None:
        """Hear it until it goes away, or says what it was not asked for."""
        with contextlib.suppress(wire.WireError, ConnectionError):
            while line := await self._line():
                said = wire.decode(line)
                if "stdin" in said and self._wanted:
                    self._wanted = False
                    self._input.put_nowait(wire.unpacked(said["stdin"]))
                elif type(number := said.get("signal")) is int and 1 <= number <= 64:
                    self.signals.put_nowait(number)
                else:
                    break
        self.gone.set()

    async def input(self) -> bytes:
        """The next piece of a command's input; b'' at its end."""
        self._wanted = True
        await self.say(wire.encode({"want": "stdin"}))
        return await self._input.get()

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """Carry work out while the client is there; raises `Gone` when it no longer is."""
        tasks = asyncio.ensure_future(work), asyncio.ensure_future(self.gone.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise Gone
            return tasks[0].result()
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self, *, at_once: bool = False) -> None:
        self._writer.transport.abort() if at_once else self._writer.close()

    async def _line(self) -> bytes:
        try:
            return await self._reader.readline()
        except ValueError:
            raise wire.WireError("a line that is too long") from None


class Keeper:
    """Keeps one machine."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.since = time.time()
        #: Set when the machine is to end.
        self.over = asyncio.Event()
        # The machine is to end when the request that is being answered has its answer.
        self._last = False
        self._machine: AsyncMachine | None = None
        # Suspending, resuming and checkpoints: one at a time.
        self._turn = asyncio.Lock()
        #: The machine was kept for later, and stands still: commands go on when it does.
        self._kept_for_later = False
        #: Checkpoints that are being made: one that is being written can only be waited for.
        self._making = 0
        self._attached: set[int] = set()
        self._peers: set[asyncio.Task[None]] = set()
        self._detached: set[asyncio.Task[None]] = set()

    async def live(self, making: AbstractAsyncContextManager[AsyncMachine],
                   ready: Callable[[list[str]], None]) -> None:
        """Keep a machine until it ends by itself; raises what keeps it from starting."""
        self.log.write("keeper", "starting")
        async with making as machine:
            self._machine = machine
            self.since = time.time()
            for text in machine.warnings:
                self.log.write("warning", text)
            self.log.write("keeper", "the machine runs")
            try:
                ready(machine.warnings)
                self.log.write("machine", f"ended: {await machine.ended()}")
            finally:
                self._machine = None
                for each in self._detached:
                    each.cancel()
                await asyncio.gather(*self._detached, return_exceptions=True)

    async def hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        task = asyncio.current_task()
        assert task is not None
        self._peers.add(task)
        task.add_done_callback(self._peers.discard)
        peer = Peer(reader, writer)
        try:
            await peer.say(wire.encode({"vmjob": wire.VERSION, "state": await self._state(),
                                        "since": self.since}))
            if request := await peer.request():
                try:
                    async with beside(peer.listen()):
                        await self._carry_out(peer, request)
                finally:
                    if self._last:
                        self.over.set()
        except (Gone, wire.WireError, TimeoutError):
            pass
        finally:
            peer.close()

    @property
    def writes(self) -> bool:
        """Whether a checkpoint is being made that does not end, whoever gives it up."""
        return self._making > 0

    async def finish(self) -> None:
        """End what clients wait for."""
        waiting = set(self._peers)
        for each in waiting:
            each.cancel()
        if waiting:
            await asyncio.wait(waiting, timeout=END_DEADLINE)

    async def _carry_out(self, peer: Peer, request: wire.Request) -> None:
        handler = HANDLERS.get(request.do)
        try:
            if handler is None:
                raise UsageError(f"a keeper cannot {request.do!r}")
            answer = {"done": await handler(self, peer, request.arguments)}
        except VmjobError as error:
            answer = {"error": error.as_dict()}
        except msgspec.ValidationError as error:
            answer = {"error": UsageError(f"{request.do}: {error}").as_dict()}
        except (Gone, wire.WireError):
            raise
        except Exception as error:  # noqa: BLE001 - one request's bug must not end the machine
            self.log.write("keeper", traceback.format_exc())
            answer = {"error": VmjobError(f"unexpected: {type(error).__name__}: {error}",
                                          advice="This is a bug: report it.").as_dict()}
        await peer.say(wire.encode(answer))

    async def _state(self) -> str:
        if self._machine is None:
            return "ending" if self.over.is_set() else "starting"
        return str(await self._machine.status())

    @property
    def _up(self) -> AsyncMachine:
        if self._machine is None:
            raise WrongState("the machine is just starting or ending")
        return self._machine

    async def _running(self) -> AsyncMachine:
        machine = self._up
        if await machine.status() is Status.SUSPENDED:
            raise WrongState("the machine is suspended",
                             advice="Let it go on with `vmjob machine resume`.")
        return machine

    # -- the machine -----------------------------------------------------------------------------

    async def _suspend(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            if asked.get("to_disk"):
                machine = self._up
                ran = await machine.status() is Status.RUNNING
                try:
                    kept = await self._kept_last(peer)
                except (VmjobError, Gone):
                    if ran:
                        await machine.resume()
                    raise
                self._last = True
                return kept
            await self._up.suspend()
            self.log.write("keeper", "suspended")
            return {}

    async def _resume(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            await self._up.resume()
            self.log.write("keeper", "resumed")
            return {}

    async def _checkpoint(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            return await self._kept(peer)

    async def _stop(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"checkpoint": None, "error": None}
        try:
            if asked.get("checkpoint"):
                deadline = float(asked.get("deadline", 60.0))
                try:
                    answer["checkpoint"] = await _within(deadline, self._kept_in_turn())
                except TimeoutError:
                    answer["error"] = CheckpointFailed(
                        f"no checkpoint could be made within {deadline:g} seconds").as_dict()
                except VmjobError as error:
                    answer["error"] = error.as_dict()
            return answer
        finally:
            self._last = True

    async def _set_priority(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            await self._up.set_priority(_text(asked, "priority"))
            return {}

    async def _kept_in_turn(self) -> dict[str, Any]:
        async with self._turn:
            return await self._kept_last(None)

    async def _kept_last(self, peer: Peer | None) -> dict[str, Any]:
        """A checkpoint after which nothing runs: what commands wrote then would come twice."""
        await self._up.suspend()
        kept = await self._kept(peer)
        self._kept_for_later = True
        return kept

    async def _kept(self, peer: Peer | None) -> dict[str, Any]:
        """Make a checkpoint; with ``peer``, only while that one waits for it."""
        work = self._up.checkpoint()
        self._making += 1
        try:
            kept = await (peer.unless_gone(work) if peer else work)
        finally:
            self._making -= 1
        self.log.write("keeper", f"checkpoint {kept.number}: the machine stood still for "
                                 f"{kept.still_seconds:.3f} s, {kept.written_bytes} bytes written")
        return {"number": kept.number, "still_seconds": kept.still_seconds,
                "written_bytes": kept.written_bytes, "disk_bytes": kept.disk_bytes}

    # -- commands --------------------------------------------------------------------------------

    async def _exec(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        command = msgspec.convert(asked, wire.Command)
        machine = await self._running()
        if command.detach:
            return await self._detach(machine, command)
        task = await machine.start(command.argv, stdin=command.stdin, env=command.env,
                                   cwd=command.cwd, user=command.user)
        feed = functools.partial(machine.feed, task, peer.input) if command.stdin else None
        return await self._follow(peer, machine, task, feed, {})

    async def _attach(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        """Go on with a command that a checkpoint had; of its input there is no more."""
        which = msgspec.convert(asked, wire.Attach)
        machine = await self._running()
        if which.task in self._attached:
            raise WrongState(f"somebody follows command {which.task} already")
        return await self._follow(peer, machine, which.task,
                                  functools.partial(machine.feed, which.task, _no_input,
                                                    again=True),
                                  {"stdout": which.stdout, "stderr": which.stderr})

    async def _follow(self, peer: Peer, machine: AsyncMachine, task: int,
                      feed: Callable[[], Coroutine[Any, Any, None]] | None,
                      offsets: Mapping[Stream, int]) -> dict[str, Any]:
        """Pass on a command's streams and signals until it ends, and then how."""
        async def say(line: bytes) -> None:
            with contextlib.suppress(Gone):  # `unless_gone` hears that as well
                await peer.say(line)

        async def sink(stream: Stream, data: bytes) -> None:
            for line in wire.pieces(stream, data):
                if not peer.gone.is_set():
                    await say(line)

        async def pass_signals() -> None:
            while True:
                await machine.stop(task, number=await peer.signals.get())

        self._attached.add(task)
        # One follower to the end, whoever hears it: a new one would not know what this one took.
        following = asyncio.ensure_future(machine.follow(task, sink, offsets=offsets))
        try:
            await say(wire.encode({"task": task}))
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(beside(pass_signals()))
                if feed is not None:
                    await stack.enter_async_context(beside(_fed(feed)))
                end = await peer.unless_gone(asyncio.shield(following))
        except asyncio.CancelledError:
            following.cancel()  # nothing more is said after the error
            if self._kept_for_later:
                await say(wire.encode({"error": MachineKept(
                    "the machine was kept on the disk, and its commands with it").as_dict()}))
            raise
        except Gone:
            peer.close(at_once=True)  # what it did not take, nobody waits for
            # What nobody listens to would wait for ever once its output is full.
            with contextlib.suppress(VmjobError):
                await machine.stop(task, number=signal.SIGKILL)
                await following
            raise
        finally:
            self._attached.discard(task)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await self._hear_messages(machine)
        return _result(end)

    async def _detach(self, machine: AsyncMachine, command: wire.Command) -> dict[str, Any]:
        # Its output goes nowhere inside the machine: whoever keeps it after a checkpoint does not
        # know of it, and a full pipe would stop it.
        quiet = ["/bin/sh", "-c", 'exec "$@" >/dev/null 2>&1', "sh", *command.argv]
        task = await machine.start(quiet, env=command.env, cwd=command.cwd, user=command.user)

        async def report() -> None:
            with contextlib.suppress(VmjobError):  # the machine has ended, which is told elsewhere
                end = _result(await machine.follow(task, _unheard))
                self.log.write("command", f"{command.argv[0]} ended with {end['exit_code']}")

        watching = asyncio.ensure_future(report())
        self._detached.add(watching)
        watching.add_done_callback(self._detached.discard)
        return {"detached": True}

    # -- files, messages, the console ------------------------------------------------------------

    async def _put(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        machine = await self._running()
        await peer.unless_gone(machine.put(_text(asked, "source"), _text(asked, "destination")))
        return {}

    async def _get(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        machine = await self._running()
        target = await peer.unless_gone(
            machine.get(_text(asked, "source"), _text(asked, "destination")))
        return {"path": str(target)}

    async def _ls(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        machine = await self._running()
        found = [{"name": each.name, "type": each.type, "size": each.size, "mode": each.mode,
                  "mtime_ns": each.mtime_ns}
                 for each in await peer.unless_gone(machine.ls(_text(asked, "path")))]
        for at in range(0, len(found), ENTRIES):
            await peer.say(wire.encode({"entries": found[at:at + ENTRIES]}))
        return {}

    async def _mkdir(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        await (await self._running()).mkdir(_text(asked, "path"))
        return {}

    async def _delete(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        await (await self._running()).delete(_text(asked, "path"))
        return {}

    async def _message(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        await (await self._running()).message_to_guest(_text(asked, "text"))
        return {}

    async def _listen(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        await self._hear_messages(await self._running())
        return {}

    async def _console(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        return {"text": (await self._up.console())[-wire.MAX_LINE // 16:]}

    async def _facts(self, peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
        return await self._up.facts()

    async def _hear_messages(self, machine: AsyncMachine) -> None:
        """Write down what jobs have said."""
        with contextlib.suppress(VmjobError):
            for text in await machine.messages():
                self.log.write("job", text)


HANDLERS: dict[str, Handler] = {
    "suspend": Keeper._suspend, "resume": Keeper._resume,  # noqa: SLF001 - its own table
    "checkpoint": Keeper._checkpoint, "stop": Keeper._stop,  # noqa: SLF001
    "priority": Keeper._set_priority, "exec": Keeper._exec,  # noqa: SLF001
    "attach": Keeper._attach,  # noqa: SLF001
    "put": Keeper._put, "get": Keeper._get, "ls": Keeper._ls,  # noqa: SLF001
    "mkdir": Keeper._mkdir, "delete": Keeper._delete,  # noqa: SLF001
    "message": Keeper._message, "listen": Keeper._listen,  # noqa: SLF001
    "console": Keeper._console, "facts": Keeper._facts,  # noqa: SLF001
}


async def keep(home: Home, root: Path, *, again: bool, starter: socket.socket, log: Log,
               driver: Driver | None = None) -> None:
    """Keep a machine until it ends, or is to; the caller holds the lock on its slot's keeper.

    ``again``: it goes on from its newest checkpoint. ``starter`` is told, in one line, that it
    runs or why not; when it goes away before, the machine ends as well.
    """
    keeper = Keeper(log)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, keeper.over.set)

    def tell(answer: dict[str, Any]) -> None:
        if starter.fileno() < 0:
            return
        loop.remove_reader(starter)
        with starter, contextlib.suppress(OSError):
            starter.sendall(wire.encode(answer))

    loop.add_reader(starter, keeper.over.set)  # it never says anything: it is gone
    async with _listening(root, keeper):
        making = _making(home, root, again, driver)
        tasks = (asyncio.ensure_future(keeper.live(
                     making, lambda warnings: tell({"done": {"warnings": warnings}}))),
                 asyncio.ensure_future(keeper.over.wait()))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await keeper.finish()
        if keeper.writes:
            # A checkpoint that the disk does not finish. Nobody else may have the slot before we
            # are gone; then nobody writes there, and the checkpoints before it are good.
            log.write("keeper", "ended in the middle of a checkpoint")
            os._exit(1)
        for each in tasks:
            each.cancel()
        (failed, _) = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(failed, VmjobError):
        log.write("error", f"{failed.message} [{failed.code}]")
        tell({"error": failed.as_dict(), "pid": os.getpid()})
    elif isinstance(failed, Exception):
        log.write("error", "".join(traceback.format_exception(failed)))
        tell({"error": VmjobError(f"unexpected: {type(failed).__name__}: {failed}").as_dict(),
              "pid": os.getpid()})
    if starter.fileno() >= 0:
        loop.remove_reader(starter)
        starter.close()
    log.write("keeper", "ended")


def serve(root: str, name: str, how: str, fd: str, *, driver: Driver | None = None) -> int:
    """The keeper's process, from its arguments: see `vmjob.keeper.client.spawn`."""
    home = Home(root)
    starter = socket.socket(fileno=int(fd))
    if os.fork():  # so that nobody has to wait for us
        return 0
    os.setsid()
    try:
        place = place_of(home, name)
        log = Log(place / LOG)
        os.dup2(log.fd, 2)
        logging.getLogger().addHandler(log)
        with kept_out(place):
            asyncio.run(keep(home, place, again=how == "again", starter=starter, log=log,
                             driver=driver))
    except VmjobError as error:  # before anybody could ask us
        with contextlib.suppress(OSError):
            starter.sendall(wire.encode({"error": error.as_dict()}))
    return 0


@contextlib.asynccontextmanager
async def _listening(root: Path, keeper: Keeper) -> AsyncIterator[None]:
    """Clients are heard while the block runs."""
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET, dir_fd=directory)  # of a keeper that was killed: we hold its lock
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            door.bind(f"/proc/self/fd/{directory}/{SOCKET}")  # a path of any length will do
        finally:
            os.umask(mask)
        server = await asyncio.start_unix_server(keeper.hear, sock=door, limit=wire.MAX_LINE,
                                                 backlog=BACKLOG)
        try:
            yield
        finally:
            server.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(SOCKET, dir_fd=directory)
    finally:
        os.close(directory)


@contextlib.asynccontextmanager
async def _making(home: Home, root: Path, again: bool,
                  driver: Driver | None) -> AsyncIterator[AsyncMachine]:
    """A new machine, or one that goes on, as its slot asks for."""
    asked = Slot(root).asked_machine()
    making = AsyncMachine.restore(root, priority=asked.priority, home=home.root, driver=driver) \
        if again else AsyncMachine.create(**msgspec.to_builtins(asked), slot=root, home=home.root,
                                          driver=driver)
    async with making as machine:
        yield machine


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Do work within a deadline, or raise `TimeoutError`: it may then go on for all that."""
    doing = asyncio.ensure_future(work)
    await asyncio.wait([doing], timeout=seconds)
    if not doing.done():
        doing.cancel()
        await asyncio.wait([doing], timeout=END_DEADLINE)
    if not doing.done() or doing.cancelled():
        raise TimeoutError
    return doing.result()


async def _fed(feed: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with contextlib.suppress(Gone):  # who follows the command hears that as well
        await feed()


async def _no_input() -> bytes:
    return b""


async def _unheard(stream: Stream, data: bytes) -> None:
    """Output that nobody wants."""


def _result(end: TaskEnd) -> dict[str, Any]:
    code = end.exit_code if end.exit_code is not None else 128 + (end.signal or 0)
    return {"exit_code": code, "signal": end.signal, "end": msgspec.to_builtins(end)}


def _text(asked: dict[str, Any], key: str) -> str:
    value = asked.get(key)
    if not isinstance(value, str):
        raise UsageError(f"a request without {key!r}")
    return value
