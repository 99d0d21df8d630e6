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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from vmjob.engine.session import Session, beside, describe, open_session
from vmjob.errors import MachineError, TimeLimit, UsageError, WrongState
from vmjob.guest.agent.wire import MAX_MESSAGES
from vmjob.guest.client import SHORT_COMMAND, Entry, Limits, TaskEnd
from vmjob.home import Home
from vmjob.job.model import Job, Network, Task, check_guest_path
from vmjob.machine.contract import Driver, MachineSpec, Status

__all__ = ["AsyncMachine", "Machine", "Result"]

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


class AsyncMachine:
    """A throw-away virtual machine whose agent answers. Make one with `create`."""

    def __init__(self, session: Session) -> None:
        self._session: Session | None = session
        self._heard: deque[str] = deque(maxlen=MAX_MESSAGES)
        session.client.on_message(self._heard.append)

    @classmethod
    @contextlib.asynccontextmanager
    async def create(cls, *, image: str = "default", memory_mb: int = 512, cpus: int = 1,
                     disk_gb: int = 10, network: str = "none", accel: str = "auto",
                     cpu: str = "host", cold: bool = False, home: PathLike | None = None,
                     driver: Driver | None = None) -> AsyncIterator[AsyncMachine]:
        """A fresh machine; it is gone, with all that it wrote, when the block ends.

        ``memory_mb`` in MiB, ``disk_gb`` in GiB (the most that it may write), ``network`` is
        ``none`` or ``nat``, ``accel`` is ``auto``, ``kvm``, ``hvf``, ``whpx`` or ``tcg``.
        ``cpu`` is ``host`` (the fastest), ``baseline`` (the same answers on every computer) or a
        model of the hypervisor. The first machine of a shape is frozen when it is ready, which
        takes some seconds; others start as its copies. With ``cold`` this one boots instead.
        ``home`` defaults to ``VMJOB_HOME``. The default image is built when it is missing, which
        takes a minute. Raises any `VmjobError` but a `JobError`.
        """
        Job(tasks=(Task(("-",)),), memory_mb=memory_mb, cpus=cpus, disk_gb=disk_gb,
            network=_network(network)).check()
        place = Home(home)
        if driver is None:
            from vmjob.machine.qemu.driver import QemuDriver
            from vmjob.shape import machine_shape

            shape, _, _ = await machine_shape(place, image, accel, memory_mb=memory_mb, cpus=cpus,
                                              disk_gb=disk_gb, network=network, cpu=cpu)
            driver = QemuDriver()
        else:
            shape = MachineSpec(id="", directory=place.root, boot=None, memory_mb=memory_mb,
                                cpus=cpus, disk_gb=disk_gb, network=network)
        try:
            async with open_session(place, driver, shape, cold=cold) as session:
                machine = cls(session)
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
        caught = {"stdout": bytearray(), "stderr": bytearray()}
        truncated = False

        async def take(stream: str, data: bytes) -> None:
            nonlocal truncated
            room = CAPTURE_LIMIT - len(caught[stream])
            caught[stream] += data[:room]
            truncated = truncated or len(data) > room

        async with self._asking() as session:
            end: TaskEnd | None = None
            with anyio.move_on_after(timeout):
                if stdin is None:
                    end = await session.client.follow(task, take)
                else:
                    end = await _fed(session, task, _source(stdin), take)
            if end is None:
                await session.client.signal(task, signal.SIGKILL, why="time-limit")
                raise TimeLimit(f"{argv[0]!r} did not end within {timeout:g} seconds",
                                advice="Raise the timeout, or give the command less to do.")
            session.client.forget(task)
        return Result(end.exit_code if end.exit_code is not None else 128 + (end.signal or 0),
                      end.signal, bytes(caught["stdout"]), bytes(caught["stderr"]), truncated, end)

    async def start(self, argv: Sequence[str], *, stdin: bool = False,
                    env: Mapping[str, str] | None = None, cwd: str | None = None,
                    user: str | None = None, limits: Limits | None = None) -> int:
        """Start a command and return its number, for `stop`; see `run`."""
        async with self._asking() as session:
            return await session.client.start(list(argv), stdin=stdin, env=env, cwd=cwd, user=user,
                                              limits=limits)

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
        """Stand still: no CPU is used, memory is kept."""
        async with self._asking() as session:
            await session.machine.suspend()

    async def resume(self) -> None:
        """Go on after `suspend`."""
        async with self._asking() as session:
            await session.machine.resume()

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


def _network(name: str) -> Network:
    try:
        return Network(name)
    except ValueError:
        raise UsageError(f"{name!r} is not a network: use none or nat") from None


async def _fed(session: Session, task: int, source: Callable[[], Coroutine[Any, Any, bytes]],
               take: Any) -> TaskEnd:
    async with beside(session.client.feed(task, source)):
        return await session.client.follow(task, take)


def _source(stdin: bytes | str | PathLike) -> Callable[[], Coroutine[Any, Any, bytes]]:
    """Input in pieces; a path object's file is read piece by piece."""
    if isinstance(stdin, os.PathLike):
        file = Path(stdin).open("rb")  # noqa: SIM115 - closed with its last piece

        async def read() -> bytes:
            data = await anyio.to_thread.run_sync(file.read, 1 << 20)
            if not data:
                file.close()
            return data

        return read
    pieces = iter([stdin.encode() if isinstance(stdin, str) else stdin])

    async def given() -> bytes:
        return next(pieces, b"")

    return given


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
               cold: bool = False, home: PathLike | None = None,
               driver: Driver | None = None) -> Iterator[Machine]:
        """See `AsyncMachine.create`."""
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal("asyncio") as portal:
            making = AsyncMachine.create(image=image, memory_mb=memory_mb, cpus=cpus,
                                         disk_gb=disk_gb, network=network, accel=accel, cpu=cpu,
                                         cold=cold, home=home, driver=driver)
            with portal.wrap_async_context_manager(making) as machine:
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
