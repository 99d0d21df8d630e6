"""The Python API: `Machine` for ordinary code, `AsyncMachine` for asyncio; one implementation.

    with vmjob.Machine.create(memory_mb=256) as machine:
        machine.put("in")
        result = machine.run(["python3", "worker.py", "5"], stdin=b"some input")
        print(result.exit_code, result.stdout_text)
        machine.get("out")
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from vmjob.engine.keeping import continued, keep, turn
from vmjob.engine.pieces import in_pieces
from vmjob.engine.progress import Progress
from vmjob.engine.session import Session, beside, describe, open_session
from vmjob.engine.slot import AskedMachine, Slot
from vmjob.errors import MachineError, SlotUnusable, TimeLimit, UsageError, WrongState
from vmjob.guest.agent.wire import MAX_MESSAGES
from vmjob.guest.client import SHORT_COMMAND, Entry, Limits, Sink, Stream, TaskEnd
from vmjob.home import Home
from vmjob.job.files import check_guest_path, is_directory
from vmjob.machine.contract import Driver, MachineSpec, Priority, Status

__all__ = ["AsyncMachine", "Kept", "Machine", "Result"]

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

T = TypeVar("T")

#: Bytes of stdout, and of stderr, that a `Result` holds; the rest is counted and dropped.
CAPTURE_LIMIT = 64 * 1024 * 1024
#: Bytes that a fetched output may have unless the caller says otherwise.
GET_LIMIT = 1 << 40

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Result:
    """How a command ended.

    ``exit_code`` is its own, or 128+N when signal N (``signal``) ended it. ``stdout`` and
    ``stderr`` hold at most 64 MiB each; ``truncated`` tells whether there was more.
    ``end`` has times in seconds, memory in bytes and the 16 ``ru_*`` values.
    """

    exit_code: int
    signal: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool
    end: TaskEnd

    @property
    def stdout_text(self) -> str:
        """``stdout`` as UTF-8; what is not UTF-8 is replaced."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def stderr_text(self) -> str:
        """``stderr`` as UTF-8; what is not UTF-8 is replaced."""
        return self.stderr.decode("utf-8", "replace")


@dataclass(frozen=True)
class Kept:
    """A checkpoint that was made: its number in the slot, how long the guest stood still for it,
    how much was written, and what all checkpoints of the slot take on the disk (files that they
    share with a template included).
    """

    number: int
    still_seconds: float
    written_bytes: int
    disk_bytes: int


class AsyncMachine:
    """A throw-away virtual machine whose agent answers. Make one with `create`."""

    def __init__(self, session: Session, home: Home, slot: Slot | None) -> None:
        self._session: Session | None = session
        self._home = home
        self._slot = slot
        #: What was odd so far, in words.
        self.warnings: list[str] = []
        self._heard: deque[str] = deque(maxlen=MAX_MESSAGES)
        session.client.on_message(self._heard.append)

    @classmethod
    @contextlib.asynccontextmanager
    async def create(cls, *, image: str = "default", memory_mb: int = 512, cpus: int = 1,
                     disk_gb: int = 10, network: str = "none", accel: str = "auto",
                     cpu: str = "host", cold: bool = False, priority: str = "low",
                     hypervisor: str = "auto", slot: PathLike | None = None,
                     home: PathLike | None = None,
                     driver: Driver | None = None) -> AsyncIterator[AsyncMachine]:
        """A fresh machine; it is gone, with all that it wrote, when the block ends.

        ``memory_mb`` in MiB, ``disk_gb`` in GiB (the most that it may write), ``network`` is
        ``none`` or ``nat``. ``hypervisor`` is ``auto``, ``qemu`` or ``virtualbox``; ``accel`` is
        ``auto``, or ``kvm``, ``hvf``, ``whpx``, ``tcg`` of the first, ``hm``, ``interpreter`` of
        the second. ``cpu`` is ``host`` (the fastest), ``baseline`` (the same answers on every
        computer) or a model of the hypervisor; VirtualBox has the first two. The first machine of
        a shape is frozen when it is ready, which takes some seconds; others start as its copies.
        With ``cold`` this one boots instead.
        With ``priority`` ``low`` its processors get what no other program wants; ``normal``: as
        much as any. ``slot`` is a directory for `checkpoint`; what was kept there before is
        forgotten (see `restore`). ``home`` defaults to ``VMJOB_HOME``. The default image is built
        when it is missing, which takes a minute. Raises any `VmjobError` but a `JobError`.
        """
        asked = AskedMachine(image, memory_mb, cpus, disk_gb, network, accel, cpu, priority,
                             hypervisor)
        with contextlib.ExitStack() as stack:
            owned = None
            if slot is not None:
                owned = stack.enter_context(Slot.claim(Path(slot).absolute()))
                owned.begin_machine(asked)
            async with cls._opened(asked, priority, home, driver, owned, cold=cold) as machine:
                yield machine

    @classmethod
    @contextlib.asynccontextmanager
    async def restore(cls, slot: PathLike, *, priority: str | None = None,
                      home: PathLike | None = None,
                      driver: Driver | None = None) -> AsyncIterator[AsyncMachine]:
        """The machine whose last `checkpoint` is in ``slot``; its commands go on.

        Its ``priority`` is the last one that it had unless one is given. When the newest checkpoint
        is damaged, it is the one before; `warnings` then says so. Raises `SlotUnusable` when none
        is good, `Busy` when another process has the slot, `CheckpointNewer`, `ProcessorChanged`,
        and what `create` raises.
        """
        if not is_directory(Path(slot)):
            raise SlotUnusable(f"there is no slot {slot}")
        with Slot.claim(Path(slot).absolute()) as owned:
            asked = owned.asked_machine()
            if priority is not None and _priority(priority) != asked.priority:
                owned.keep_priority(priority)
            async with cls._opened(asked, priority or asked.priority, home, driver, owned,
                                   cold=False, again=True) as machine:
                yield machine

    @classmethod
    @contextlib.asynccontextmanager
    async def _opened(cls, asked: AskedMachine, priority: str, home: PathLike | None,
                      driver: Driver | None, slot: Slot | None, *, cold: bool,
                      again: bool = False) -> AsyncIterator[AsyncMachine]:
        asked.check()
        place = Home(home)
        if driver is None:
            from vmjob.shape import machine_shape

            made = await machine_shape(
                place, asked.image, asked.accel, memory_mb=asked.memory_mb, cpus=asked.cpus,
                disk_gb=asked.disk_gb, network=asked.network, cpu=asked.cpu,
                hypervisor=asked.hypervisor)
            shape, driver = made.spec, made.driver
        else:
            shape = MachineSpec(id="", directory=place.root, boot=None, memory_mb=asked.memory_mb,
                                cpus=asked.cpus, disk_gb=asked.disk_gb, network=asked.network)
        shape = replace(shape, priority=_priority(priority))
        heard: list[str] = []
        try:
            async with contextlib.AsyncExitStack() as stack:
                open_one = functools.partial(open_session, place, driver, cold=cold,
                                             place=slot.machine_place if slot else None)
                if again and slot is not None:
                    found = await continued(stack, slot.generations, shape, open_one,
                                            heard.append)
                    if found is None:
                        raise SlotUnusable(f"no checkpoint in {slot.root} is good"
                                           + "".join(f"; {each}" for each in heard))
                    session, generation = found
                    session.client.continue_messages(generation.progress.messages_seen)
                else:
                    session = await stack.enter_async_context(open_one(shape))
                machine = cls(session, place, slot)
                machine.warnings += heard
                try:
                    yield machine
                finally:
                    machine._session = None
        except MachineError as error:
            from vmjob.shape import doubt

            doubt(place, shape, error.as_dict())
            raise

    # -- commands ------------------------------------------------------------------------------

    async def run(self, argv: Sequence[str], *, stdin: bytes | str | PathLike | None = None,
                  env: Mapping[str, str] | None = None, cwd: str | None = None,
                  user: str | None = None, limits: Limits | None = None,
                  timeout: float | None = None) -> Result:
        """Run a command to its end.

        ``stdin``: bytes or text, or a path object whose file is read. ``cwd`` and ``user`` default
        to the job's directory and the unprivileged user ``job`` (``user="root"`` is possible).
        ``timeout`` in seconds: then all its processes are killed and `TimeLimit` is raised.
        Raises `CommandNotFound`, `CommandNotExecutable`; a command that fails is no error.
        """
        async with self._asking() as session:
            task = await session.client.start(
                list(argv), stdin=stdin is not None, env=env, cwd=cwd, user=user, limits=limits,
                wait=SHORT_COMMAND if stdin is None else 0.0)
        async with self._asking() as session:
            result: Result | None = None
            with anyio.move_on_after(timeout):
                if stdin is None:
                    result = await _followed(session, task)
                else:
                    result = await _fed(session, task, in_pieces(stdin))
            if result is None:
                await session.client.signal(task, signal.SIGKILL, why="time-limit")
                raise TimeLimit(f"{argv[0]!r} did not end within {timeout:g} seconds",
                                advice="Raise the timeout, or give the command less to do.")
            return result

    async def start(self, argv: Sequence[str], *, stdin: bool = False,
                    env: Mapping[str, str] | None = None, cwd: str | None = None,
                    user: str | None = None, limits: Limits | None = None) -> int:
        """Start a command and return its number, for `stop`; see `run`."""
        async with self._asking() as session:
            return await session.client.start(list(argv), stdin=stdin, env=env, cwd=cwd, user=user,
                                              limits=limits)

    async def result(self, task: int, *, offsets: Mapping[Stream, int] | None = None) -> Result:
        """Wait for a command that `start` began, here or before a `restore`, and return its end.

        ``offsets``: how much of each stream was taken already, by a `result` that a crash cut off.
        """
        async with self._asking() as session:
            return await _followed(session, task, offsets)

    async def follow(self, task: int, sink: Sink, *,
                     offsets: Mapping[Stream, int] | None = None) -> TaskEnd:
        """Like `result`, but hand the output to ``sink`` as it comes; return the end."""
        async with self._asking() as session:
            end = await session.client.follow(task, sink, offsets)
            session.client.forget(task)
            return end

    async def feed(self, task: int, source: Callable[[], Awaitable[bytes]], *,
                   again: bool = False) -> None:
        """Write what ``source`` returns to a command's input until ``b""``; see `AgentClient`."""
        async with self._asking() as session:
            await session.client.feed(task, source, again=again)

    async def stop(self, task: int, *, number: int = signal.SIGTERM) -> None:
        """Send a signal (SIGTERM by default) to all processes of a command."""
        async with self._asking() as session:
            await session.client.signal(task, number)

    # -- files -----------------------------------------------------------------------------------

    async def put(self, source: PathLike, destination: str | None = None) -> None:
        """Copy a file or directory into the machine.

        ``destination`` defaults to the source's name in the job's directory. Modes are kept, holes
        stay holes; everything belongs to the user ``job``. Raises `InputMissing`,
        `InputUnreadable`, `BadPath`.
        """
        path = Path(source)
        name = check_guest_path(destination or path.absolute().name)
        async with self._asking() as session:
            await session.client.put(path, name)

    async def get(self, source: str, destination: PathLike | None = None, *,
                  limit: int = GET_LIMIT) -> Path:
        """Copy a file or directory out of the machine; returns where it is now.

        ``destination`` defaults to the source's name in the current directory. It appears there
        whole or not at all. ``limit`` bounds its size in bytes. Raises `OutputMissing`,
        `OutputUnsafe`, `OutputTooLarge`, `HostDiskFull`.
        """
        target = Path(destination or PurePosixPath(source).name).absolute()
        async with self._asking() as session:
            await session.client.get(check_guest_path(source), target, limit=limit)
        return target

    async def ls(self, path: str = "") -> list[Entry]:
        """The entries of a directory, the job's by default; sizes in bytes."""
        async with self._asking() as session:
            return await session.client.ls(path)

    async def mkdir(self, path: str) -> None:
        """Make a directory and its parents."""
        async with self._asking() as session:
            await session.client.mkdir(path)

    async def delete(self, path: str) -> None:
        """Remove a file, a link or a whole directory of the machine."""
        async with self._asking() as session:
            await session.client.delete(path)

    # -- messages and state --------------------------------------------------------------------

    async def message_to_guest(self, text: str) -> None:
        """Append a line to the file that jobs find under ``$VMJOB_FROM_HOST``."""
        async with self._asking() as session:
            await session.client.message_to_guest(text)

    async def messages(self) -> list[str]:
        """The lines that jobs have written to ``$VMJOB_TO_HOST`` since the last call."""
        async with self._asking() as session:
            await session.client.poll_messages()
        heard = list(self._heard)
        self._heard.clear()
        return heard

    async def ping(self) -> dict[str, Any]:
        """The agent's clock, load and free memory (bytes)."""
        async with self._asking() as session:
            return await session.client.ping()

    async def suspend(self) -> None:
        """Stand still: no CPU is used, memory is kept, no deadline comes nearer."""
        async with self._asking() as session:
            await session.suspend()

    async def resume(self) -> None:
        """Go on after `suspend`; the machine's clock is set."""
        async with self._asking() as session:
            await session.resume()

    async def checkpoint(self) -> Kept:
        """Keep the machine as it is now in its slot, for `restore`, and go on.

        Memory, disk and commands are kept as they are at one instant, for which the guest stands
        still some hundredths of a second. Raises `WrongState` for a machine without a slot,
        `CheckpointFailed`, `HostDiskFull`; earlier checkpoints stay good.
        """
        async with self._asking() as session:
            if self._slot is None:
                raise WrongState("the machine was made without a slot")

            def progress() -> Progress:
                return Progress([], 0, {}, {}, 0.0, session.client.messages_seen)

            async with turn(self._home):
                generation = await keep(self._slot.generations, session, progress, _nothing, None)
            return Kept(generation.number, generation.still_seconds, generation.written_bytes,
                        self._slot.generations.disk_bytes())

    async def set_priority(self, priority: str) -> None:
        """``low``: the machine's processors get what no other program wants; ``normal``.

        A machine with a slot has it again when it is restored.
        """
        async with self._asking() as session:
            await session.machine.set_priority(_priority(priority))
            if self._slot is not None:
                self._slot.keep_priority(priority)

    async def status(self) -> Status:
        """Where the machine is in its life."""
        return self._session.machine.get_status() if self._session else Status.DESTROYED

    async def ended(self) -> str:
        """Wait until the machine ends by itself, and say why."""
        async with self._asking() as session:
            return (await session.machine.ended()).detail

    async def facts(self) -> dict[str, Any]:
        """Hypervisor, accelerator, kernel and shape of the machine."""
        async with self._asking() as session:
            return describe(session)

    async def console(self) -> str:
        """The last of the machine's console output."""
        async with self._asking() as session:
            return session.machine.console()

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[Session]:
        if self._session is None:
            raise WrongState("the machine is gone: its block has ended")
        async with self._session.explaining():
            yield self._session


def _priority(name: str) -> Priority:
    try:
        return Priority(name)
    except ValueError:
        raise UsageError(f"{name!r} is not a priority: use low or normal") from None


async def _nothing() -> None: ...


async def _followed(session: Session, task: int,
                    offsets: Mapping[Stream, int] | None = None) -> Result:
    """A command's end and what it wrote, as much as a `Result` holds."""
    caught: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    truncated = False

    async def take(stream: Stream, data: bytes) -> None:
        nonlocal truncated
        room = CAPTURE_LIMIT - len(caught[stream])
        caught[stream] += data[:room]
        truncated = truncated or len(data) > room

    end = await session.client.follow(task, take, offsets)
    session.client.forget(task)
    return Result(end.exit_code if end.exit_code is not None else 128 + (end.signal or 0),
                  end.signal, bytes(caught["stdout"]), bytes(caught["stderr"]), truncated, end)


async def _fed(session: Session, task: int,
               source: Callable[[], Coroutine[Any, Any, bytes]]) -> Result:
    async with beside(session.client.feed(task, source)):
        return await _followed(session, task)


class Machine:
    """A throw-away virtual machine, for code without asyncio; every method is as `AsyncMachine`'s.

    The machine is served by a thread of its own; methods may be called from any thread.
    """

    def __init__(self, portal: BlockingPortal, machine: AsyncMachine) -> None:
        self._portal = portal
        self._machine = machine
        self._open = True

    @classmethod
    @contextlib.contextmanager
    def create(cls, *, image: str = "default", memory_mb: int = 512, cpus: int = 1,
               disk_gb: int = 10, network: str = "none", accel: str = "auto", cpu: str = "host",
               cold: bool = False, priority: str = "low", hypervisor: str = "auto",
               slot: PathLike | None = None, home: PathLike | None = None,
               driver: Driver | None = None) -> Iterator[Machine]:
        """See `AsyncMachine.create`."""
        making = functools.partial(
            AsyncMachine.create, image=image, memory_mb=memory_mb, cpus=cpus, disk_gb=disk_gb,
            network=network, accel=accel, cpu=cpu, cold=cold, priority=priority,
            hypervisor=hypervisor, slot=slot, home=home, driver=driver)
        with cls._opened(making) as machine:
            yield machine

    @classmethod
    @contextlib.contextmanager
    def restore(cls, slot: PathLike, *, priority: str | None = None, home: PathLike | None = None,
                driver: Driver | None = None) -> Iterator[Machine]:
        """See `AsyncMachine.restore`."""
        making = functools.partial(AsyncMachine.restore, slot, priority=priority, home=home,
                                   driver=driver)
        with cls._opened(making) as machine:
            yield machine

    @classmethod
    @contextlib.contextmanager
    def _opened(cls, making: Callable[[], AbstractAsyncContextManager[AsyncMachine]],
                ) -> Iterator[Machine]:
        from anyio.from_thread import start_blocking_portal

        with (start_blocking_portal("asyncio") as portal,
              portal.wrap_async_context_manager(portal.call(making)) as machine):
            found = cls(portal, machine)
            try:
                yield found
            finally:
                found._open = False

    def _call(self, method: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any) -> T:
        if not self._open:
            raise WrongState("the machine is gone: its block has ended")
        result: T = self._portal.call(functools.partial(method, *args, **kwargs))
        return result

    def run(self, argv: Sequence[str], *, stdin: bytes | str | PathLike | None = None,
            env: Mapping[str, str] | None = None, cwd: str | None = None, user: str | None = None,
            limits: Limits | None = None, timeout: float | None = None) -> Result:
        """See `AsyncMachine.run`."""
        return self._call(self._machine.run, argv, stdin=stdin, env=env, cwd=cwd, user=user,
                          limits=limits, timeout=timeout)

    def start(self, argv: Sequence[str], *, stdin: bool = False,
              env: Mapping[str, str] | None = None, cwd: str | None = None,
              user: str | None = None, limits: Limits | None = None) -> int:
        """See `AsyncMachine.start`."""
        return self._call(self._machine.start, argv, stdin=stdin, env=env, cwd=cwd, user=user,
                          limits=limits)

    def result(self, task: int, *, offsets: Mapping[Stream, int] | None = None) -> Result:
        """See `AsyncMachine.result`."""
        return self._call(self._machine.result, task, offsets=offsets)

    def checkpoint(self) -> Kept:
        """See `AsyncMachine.checkpoint`."""
        return self._call(self._machine.checkpoint)

    def set_priority(self, priority: str) -> None:
        """See `AsyncMachine.set_priority`."""
        self._call(self._machine.set_priority, priority)

    @property
    def warnings(self) -> list[str]:
        """What was odd so far, in words."""
        return list(self._machine.warnings)

    def stop(self, task: int, *, number: int = signal.SIGTERM) -> None:
        """See `AsyncMachine.stop`."""
        self._call(self._machine.stop, task, number=number)

    def put(self, source: PathLike, destination: str | None = None) -> None:
        """See `AsyncMachine.put`."""
        self._call(self._machine.put, source, destination)

    def get(self, source: str, destination: PathLike | None = None, *,
            limit: int = GET_LIMIT) -> Path:
        """See `AsyncMachine.get`."""
        return self._call(self._machine.get, source, destination, limit=limit)

    def ls(self, path: str = "") -> list[Entry]:
        """See `AsyncMachine.ls`."""
        return self._call(self._machine.ls, path)

    def mkdir(self, path: str) -> None:
        """See `AsyncMachine.mkdir`."""
        self._call(self._machine.mkdir, path)

    def delete(self, path: str) -> None:
        """See `AsyncMachine.delete`."""
        self._call(self._machine.delete, path)

    def message_to_guest(self, text: str) -> None:
        """See `AsyncMachine.message_to_guest`."""
        self._call(self._machine.message_to_guest, text)

    def messages(self) -> list[str]:
        """See `AsyncMachine.messages`."""
        return self._call(self._machine.messages)

    def ping(self) -> dict[str, Any]:
        """See `AsyncMachine.ping`."""
        return self._call(self._machine.ping)

    def suspend(self) -> None:
        """See `AsyncMachine.suspend`."""
        self._call(self._machine.suspend)

    def resume(self) -> None:
        """See `AsyncMachine.resume`."""
        self._call(self._machine.resume)

    def status(self) -> Status:
        """See `AsyncMachine.status`."""
        return self._call(self._machine.status)

    def ended(self) -> str:
        """See `AsyncMachine.ended`."""
        return self._call(self._machine.ended)

    def facts(self) -> dict[str, Any]:
        """See `AsyncMachine.facts`."""
        return self._call(self._machine.facts)

    def console(self) -> str:
        """See `AsyncMachine.console`."""
        return self._call(self._machine.console)
