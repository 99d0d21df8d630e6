"""Who asks a keeper: starts it, sends it one request, waits for its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmjob.errors import (
    CheckpointFailed,
    KeeperLost,
    NotSupported,
    SlotUnusable,
    UnknownMachine,
    UsageError,
    WrongState,
)
from vmjob.home import Home
from vmjob.keeper import slots, wire
from vmjob.keeper.slots import SOCKET, Known

__all__ = ["Talk", "ask", "checkpoint_now", "destroy", "look", "look_at_all", "resume", "restore",
           "spawn", "start", "stop", "suspend_to_disk", "talk"]

#: How a keeper is started; tests give another one, with another driver.
KEEPER = (sys.executable, "-P", "-m", "vmjob.keeper")
#: Seconds for a keeper to say that its machine runs: its own waits are shorter, but an image may
#: have to be built first, over a slow network.
START_DEADLINE = 1800.0
#: Seconds for the process that starts the keeper to end.
FORK_DEADLINE = 30.0
#: Seconds for a keeper to greet us: it does nothing else that takes time.
GREETING_DEADLINE = 10.0
#: Seconds for what is done at once in a machine that runs.
SHORT = 120.0
#: Seconds for a checkpoint; others may be made before it.
CHECKPOINT_DEADLINE = 1800.0
#: Seconds from the last word of a keeper until its process must be gone.
END_DEADLINE = 30.0


class Talk:
    """A connection to a keeper that has greeted us. Made by `talk`."""

    def __init__(self, name: str, pid: int, reader: asyncio.StreamReader,
                 writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.state = ""
        self.since = 0.0
        self._name = name
        self._reader = reader
        self._writer = writer

    async def say(self, content: Mapping[str, Any]) -> None:
        """Raises `KeeperLost`; `UsageError` for more than a line can hold."""
        try:
            line = wire.encode(content)
        except wire.WireError:  # only a user's words are ever as long
            raise UsageError(f"a request to a machine is at most {wire.MAX_LINE} bytes long, its "
                             "command with arguments and environment",
                             advice="Give long texts by a file (`vmjob machine put`) or by the "
                                    "command's input.") from None
        try:
            self._writer.write(line)
            await self._writer.drain()
        except ConnectionError:
            raise self.lost() from None

    async def hear(self) -> dict[str, Any]:
        """The next thing that it says; an error that it reports is raised. Raises `KeeperLost`."""
        try:
            line = await self._reader.readline()
            if not line:
                raise self.lost()
            said = wire.decode(line)
            if "error" in said:
                raise wire.error_of(said["error"])
        except (ConnectionError, ValueError, wire.WireError):
            raise self.lost() from None
        return said

    async def request(self, do: str, arguments: Mapping[str, Any]) -> None:
        """Say what we want; `hear` has the answers, the last of which is ``done``."""
        await self.say({"vmjob": wire.VERSION, "do": do, "with": dict(arguments)})

    def lost(self) -> KeeperLost:
        return KeeperLost(f"the keeper of the machine {self._name} (process {self.pid}) has ended")

    async def greeted(self) -> None:
        """Hear its greeting; raises `NotSupported`, `KeeperLost`."""
        try:
            async with asyncio.timeout(GREETING_DEADLINE):
                said = await self.hear()
        except TimeoutError:
            raise KeeperLost(f"the keeper of the machine {self._name} (process {self.pid}) does "
                             "not answer", advice="`vmjob machine stop` ends it.") from None
        if said.get("vmjob") != wire.VERSION:
            raise NotSupported(f"the machine {self._name} was started by another version of vmjob",
                               advice=f"Use that one, or end the machine: kill {self.pid}")
        self.state, self.since = str(said.get("state")), float(said.get("since", 0.0))


@contextlib.asynccontextmanager
async def talk(home: Home, name: str) -> AsyncIterator[Talk]:
    """A connection to a machine's keeper; raises `UnknownMachine`, `WrongState`, `KeeperLost`."""
    root = slots.place_of(home, name)
    pid = slots.keeper_of(root)
    if pid is None:
        raise _not_running(slots.known(home, name))
    try:
        async with asyncio.timeout(GREETING_DEADLINE):
            reader, writer = await _connect(root)
    except (OSError, TimeoutError):
        raise KeeperLost(f"the keeper of the machine {name} (process {pid}) does not answer",
                         advice="It may be starting or ending: try again.") from None
    try:
        found = Talk(name, pid, reader, writer)
        await found.greeted()
        yield found
    finally:
        writer.close()


async def ask(home: Home, name: str, do: str, arguments: Mapping[str, Any] | None = None,
              deadline: float | None = SHORT) -> dict[str, Any]:
    """One request with one answer; what it lists is under ``entries``.

    Raises what the keeper reports, and what `talk` raises. ``deadline`` None: the keeper has its
    own, which depend on the work.
    """
    try:
        async with asyncio.timeout(deadline), talk(home, name) as found:
            return await _asked(found, do, arguments or {})
    except TimeoutError:
        raise KeeperLost(f"the machine {name} did not answer within {deadline:g} seconds") from None


# -- from one state to another -----------------------------------------------------------------


async def look(home: Home, name: str) -> Known:
    """Where a machine is in its life; raises `UnknownMachine`, `SlotUnusable`."""
    found = slots.known(home, name)
    if found.pid is None:
        return found
    try:
        async with talk(home, name) as there:
            return replace(found, state=there.state, since=there.since)
    except WrongState:
        return slots.known(home, name)  # it has just ended
    except (KeeperLost, NotSupported):
        still = slots.known(home, name)
        return still if still.pid is None else replace(still, state="unknown")


async def look_at_all(home: Home) -> tuple[list[Known], list[SlotUnusable]]:
    """All machines, and what is wrong with those that cannot be read."""
    found = await asyncio.gather(*(look(home, name) for name in slots.names(home)),
                                 return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException) and \
                not isinstance(each, SlotUnusable | UnknownMachine):
            raise each
    return ([each for each in found if isinstance(each, Known)],
            [each for each in found if isinstance(each, SlotUnusable)])


async def start(home: Home, name: str, *, anew: bool = False,
                command: Sequence[str] = KEEPER) -> list[str]:
    """Start a machine that has no keeper; returns warnings.

    Raises `WrongState` when it runs, or has a checkpoint, which is given up only with ``anew``;
    and whatever keeps it from starting.
    """
    found = slots.known(home, name)
    if found.pid is not None:
        raise WrongState(f"the machine {name} is running already (process {found.pid})")
    if found.checkpoints and not anew:
        raise WrongState(f"the machine {name} has a checkpoint",
                         advice="`vmjob machine resume` goes on from it; "
                                "`vmjob machine start --anew` forgets it.")
    return await spawn(home, name, again=False, command=command)


async def resume(home: Home, name: str, *, command: Sequence[str] = KEEPER) -> list[str]:
    """Let a machine go on, that is suspended or kept on the disk; returns warnings."""
    if slots.keeper_of(slots.place_of(home, name)) is not None:
        await ask(home, name, "resume")
        return []
    return await restore(home, name, command=command)


async def restore(home: Home, name: str, *, command: Sequence[str] = KEEPER) -> list[str]:
    """Go on from the newest good checkpoint; what runs is thrown away. Returns warnings."""
    if not slots.known(home, name).checkpoints:
        raise WrongState(f"the machine {name} has no checkpoint",
                         advice="Begin anew with `vmjob machine start`.")
    await stop(home, name)
    return await spawn(home, name, again=True, command=command)


async def suspend_to_disk(home: Home, name: str) -> dict[str, Any]:
    """Make a checkpoint and end the machine; when there is none, it goes on. Returns its facts."""
    return await _last(home, name, "suspend", {"to_disk": True}, CHECKPOINT_DEADLINE)


async def checkpoint_now(home: Home, name: str) -> dict[str, Any]:
    """Make a checkpoint; returns its number, bytes and seconds."""
    return await ask(home, name, "checkpoint", deadline=CHECKPOINT_DEADLINE)


async def stop(home: Home, name: str, *, checkpoint: bool = False,
               deadline: float = 60.0) -> dict[str, Any] | None:
    """End a machine, if it runs; returns the facts of the checkpoint that was made before.

    Raises `CheckpointFailed` when it was to be made, and was not within ``deadline`` seconds; the
    machine is stopped nevertheless.
    """
    pid = slots.keeper_of(slots.place_of(home, name))
    if pid is None:
        if checkpoint:
            raise _not_running(slots.known(home, name))
        return None
    try:
        answer = await _last(home, name, "stop", {"checkpoint": checkpoint, "deadline": deadline},
                             deadline + SHORT if checkpoint else SHORT)
    except WrongState:
        return None  # it has just ended by itself
    except (KeeperLost, NotSupported):
        await _kill(home, name, pid)
        if checkpoint:
            raise CheckpointFailed(f"the keeper of the machine {name} did not answer; the machine "
                                   "is stopped", advice=_stopped(home, name)) from None
        return None
    if answer["error"] is not None:
        raise CheckpointFailed(
            f"the machine {name} is stopped, without a new checkpoint: "
            f"{wire.error_of(answer['error']).message}", advice=_stopped(home, name))
    return answer["checkpoint"]  # type: ignore[no-any-return]


async def destroy(home: Home, name: str) -> None:
    """End a machine and remove all of it."""
    await stop(home, name)
    slots.destroy(home, name)


async def spawn(home: Home, name: str, *, again: bool,
                command: Sequence[str] = KEEPER) -> list[str]:
    """Start a keeper and wait until its machine answers; returns warnings.

    ``again``: it goes on from its newest good checkpoint. Raises what keeps it from starting. When
    we are interrupted, it ends by itself.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            # It forks at once: what it becomes is no child of ours.
            process = await asyncio.create_subprocess_exec(
                *command, str(home.root.absolute()), name, "again" if again else "new",
                str(theirs.fileno()), cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        async with asyncio.timeout(FORK_DEADLINE):
            await process.wait()
        ours.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=wire.MAX_LINE)
    except BaseException:
        ours.close()
        raise
    try:
        async with asyncio.timeout(START_DEADLINE):
            line = await reader.readline()
        said = wire.decode(line)
        if "error" in said:
            await _ended(said.get("pid"))
            raise wire.error_of(said["error"])
        return [str(each) for each in said["done"]["warnings"]]
    except (TimeoutError, wire.WireError, ValueError, ConnectionError):
        raise KeeperLost(f"the keeper of the machine {name} ended before the machine ran",
                         advice=f"`vmjob machine logs {name}` may tell why.") from None
    finally:
        writer.close()


# -- inside --------------------------------------------------------------------------------------


async def _asked(found: Talk, do: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    await found.request(do, arguments)
    entries: list[Any] = []
    while True:
        said = await found.hear()
        if "done" in said:
            return {**said["done"], **({"entries": entries} if do == "ls" else {})}
        entries += said.get("entries", [])


async def _last(home: Home, name: str, do: str, arguments: Mapping[str, Any],
                deadline: float) -> dict[str, Any]:
    """A request after which the keeper ends; returns when it has."""
    try:
        async with asyncio.timeout(deadline), talk(home, name) as found:
            handle = _open_process(found.pid)
            try:
                answer = await _asked(found, do, arguments)
                await _gone(handle)
            finally:
                if handle is not None:
                    os.close(handle)
    except TimeoutError:
        raise KeeperLost(f"the machine {name} did not end within {deadline:g} seconds") from None
    return answer


async def _kill(home: Home, name: str, pid: int) -> None:
    """End a keeper that does not listen; its machine ends with it."""
    handle = _open_process(pid)
    if handle is None:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            # It may have ended, and its number may be another's: only the holder of the lock.
            if slots.keeper_of(slots.place_of(home, name)) != pid:
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_DEADLINE):
                    await _gone(handle)
                return
    finally:
        os.close(handle)


async def _ended(pid: object) -> None:
    """Give a keeper that has said its last word the time to end."""
    handle = _open_process(pid) if isinstance(pid, int) else None
    if handle is not None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_DEADLINE):
                    await _gone(handle)
        finally:
            os.close(handle)


def _open_process(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


async def _gone(handle: int | None) -> None:
    """Wait until a process has ended."""
    if handle is None:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)


async def _connect(root: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return await asyncio.open_unix_connection(f"/proc/self/fd/{directory}/{SOCKET}",
                                                  limit=wire.MAX_LINE)
    finally:
        os.close(directory)


def _stopped(home: Home, name: str) -> str:
    """What can be done with a machine that was stopped without the checkpoint it should have."""
    return "`vmjob machine resume` goes on from the checkpoint before." \
        if slots.known(home, name).checkpoints else "`vmjob machine start` begins anew."


def _not_running(found: Known) -> WrongState:
    advice = {"kept": "Go on with `vmjob machine resume`."}.get(
        found.state, "Start it with `vmjob machine start`.")
    words = {"kept": "kept on the disk", "created": "not started yet"}
    return WrongState(f"the machine {found.name} is {words.get(found.state, found.state)}",
                      advice=advice)
