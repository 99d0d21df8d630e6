"""Asking VBoxManage: the layer that knows how, and nothing of what for.

One `Manage` is one registry (``VBOX_USER_HOME``). Its calls go one by one, across processes too:
VirtualBox's service answers several at a time with refusals that mean nothing. Each call has a
deadline, is killed at it, and is judged by what it says and not by its exit code alone. What is
refused because it was asked at a wrong moment is asked again, if that can do no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from vmjob.errors import Busy, HypervisorRefused, HypervisorSilent, ProgramMissing
from vmjob.host.guard import guarded
from vmjob.machine.virtualbox.answers import (
    Answer,
    judge_answer,
    parse_machine_readable,
    uuid_of,
)
from vmjob.machine.virtualbox.faults import Fault, Kind
from vmjob.machine.virtualbox.programs import Programs
from vmjob.machine.virtualbox.service import (
    end_services,
    ipc_id_of,
    service_pids,
    sweep_ipc,
    sweep_orphans,
)

__all__ = ["SAVE_DEADLINE", "Answer", "Call", "Manage", "environment_for", "ipc_id_of",
           "may_ask_again", "parse_machine_readable", "service_pids", "sweep_ipc",
           "sweep_orphans", "uuid_of"]

#: Seconds for one call, its turn and its repetitions. Most take 0.05; one of `showmediuminfo` took
#: 10 with nothing else at work.
DEADLINE = 30.0
#: Seconds for one that saves a machine: as long as its memory takes to be written.
SAVE_DEADLINE = 600.0
#: Bytes of each of stdout and stderr that are kept; the longest answer seen has 60 kB.
MOST_OUTPUT = 1 << 20
#: Seconds for output to come after the end of the process: something else may hold the pipe.
LAST_WORDS = 1.0
#: Calls that a failure report tells, and characters of each answer.
CALLS_KEPT, TEXT_KEPT = 60, 1500
#: Seconds between looks at a lock that another process holds: the kernel would tell a thread only,
#: which nobody can call back.
LOCK_PERIOD = 0.02
#: Seconds before the first repetition; doubled each time, up to `LONGEST_PAUSE`.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.5
#: Seconds after the first answer during which a refusal counts as one of the moment.
MOMENT = 5.0
#: Seconds that a repetition must have left: the refusal says more than that there was no answer.
FAIR = 1.0

#: Commands that change nothing.
QUERIES = frozenset({"list", "showvminfo", "showmediuminfo", "getextradata"})
#: Refusals that pass by themselves. ``None``: nothing was done, so that any command may be asked
#: again; else only these may, as the others may have been carried out in part.
PASSING: Mapping[Kind, frozenset[str] | None] = {
    # The service was just ending (it does, five seconds after its last client) and took no call.
    Kind.SERVICE_LOST: None,
    # Somebody else has the machine; also its own process for a moment after it was switched off.
    Kind.LOCKED: None,
    # The service ended in the middle.
    Kind.SERVICE_DIED: QUERIES,
    # The machine is just starting or going.
    Kind.NOT_READY: QUERIES,
}


@dataclass(frozen=True)
class Call:
    """One call, for a failure report. ``seconds``: how long it took."""

    words: tuple[str, ...]
    exit_code: int | None
    seconds: float
    stdout: str
    stderr: str

    def as_dict(self) -> dict[str, Any]:
        return {"words": list(self.words), "exit_code": self.exit_code,
                "seconds": round(self.seconds, 3), "stdout": self.stdout, "stderr": self.stderr}


def environment_for(base: Mapping[str, str], registry: Path, ipc_id: str) -> dict[str, str]:
    """The environment of VirtualBox's programs for one registry.

    No other ``VBOX_`` variable gets through: they change where things are and what is logged. The
    locale is fixed, for the language of the answers, and has UTF-8: with ``C`` alone VBoxManage
    refuses to start in directories whose names have other letters (VERR_NO_TRANSLATION).
    """
    kept = {name: value for name, value in base.items()
            if not name.startswith(("VBOX_", "LC_")) and name not in ("LANG", "LANGUAGE")}
    kept.setdefault("HOME", str(registry))
    return {**kept, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8",
            "VBOX_USER_HOME": str(registry), "VBOX_IPC_SOCKETID": ipc_id}


def may_ask_again(words: Sequence[str], fault: Fault) -> bool:
    """Whether a refusal passes by itself, and asking again can do no harm."""
    if fault.kind not in PASSING:
        return False
    commands = PASSING[fault.kind]
    return commands is None or words[0] in commands


class Manage:
    """VBoxManage for one registry.

    ``registry``: a directory, made when it is missing. ``ipc_id``: `ipc_id_of` the registry. Two
    objects for one registry are fine, in one process or in two. ``started`` counts the processes
    of VBoxManage; ``transcript`` has the newest calls.
    """

    def __init__(self, programs: Programs, registry: Path, ipc_id: str | None = None) -> None:
        self.programs = programs
        self.registry = registry.absolute()
        self.ipc_id = ipc_id or ipc_id_of(self.registry)
        self.environment = environment_for(os.environ, self.registry, self.ipc_id)
        self.started = 0
        self.transcript: deque[Call] = deque(maxlen=CALLS_KEPT)
        self._turn = anyio.Lock()

    async def run(self, *words: str, deadline: float = DEADLINE) -> str:
        """What VBoxManage prints when it is asked so.

        ``deadline``: seconds for all, waiting for the turn and repetitions too. Raises what the
        fault is to our users (`faults.Fault.error`: its ``context['kind']`` tells), `Busy` when
        another process does not end its call, `HypervisorSilent` when there is no answer in time.
        """
        answer = await self.ask(*words, deadline=deadline)
        if answer.fault is not None:
            raise answer.fault.error(f"VBoxManage {words[0]}", command=list(words),
                                     exit_code=answer.exit_code)
        return answer.stdout

    async def ask(self, *words: str, deadline: float = DEADLINE) -> Answer:
        """The same for those who expect a refusal: it is in the answer, and not raised."""
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline
        answer = await self._once(words, end, deadline)
        patience = min(end - FAIR, loop.time() + MOMENT)
        pause = FIRST_PAUSE
        while (answer.fault is not None and may_ask_again(words, answer.fault)
               and loop.time() + pause < patience):
            await anyio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            answer = await self._once(words, end, deadline)
        return answer

    async def close(self) -> None:
        """End the registry's service and remove what it has in /tmp; machines must have ended.

        The registry itself stays, and can be used again.
        """
        with anyio.CancelScope(shield=True):
            await end_services(self.registry)
            sweep_ipc(self.ipc_id)

    # -- one call ----------------------------------------------------------------------------

    async def _once(self, words: Sequence[str], end: float, deadline: float) -> Answer:
        async with self._my_turn(end):
            began = time.monotonic()
            try:
                code, out, err = await self._call(words, end)
            except TimeoutError:
                self._note(words, None, began, "", f"killed after {deadline:g} s")
                raise HypervisorSilent(
                    f"VBoxManage {words[0]} did not answer within {deadline:g} s",
                    command=list(words)) from None
            answer = judge_answer(code, out, err)
            self._note(words, code, began, out, err)
            return answer

    def _note(self, words: Sequence[str], code: int | None, began: float, out: str,
              err: str) -> None:
        self.transcript.append(Call(tuple(words), code, time.monotonic() - began,
                                    out[-TEXT_KEPT:], err[-TEXT_KEPT:]))

    @contextlib.asynccontextmanager
    async def _my_turn(self, end: float) -> AsyncIterator[None]:
        """Alone with the registry, in this process and among all; raises `Busy` at the deadline."""
        loop = asyncio.get_running_loop()
        self.registry.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            async with asyncio.timeout_at(end):
                await self._turn.acquire()
        except TimeoutError:
            raise self._busy() from None
        try:
            with (self.registry / "vmjob.lock").open("ab") as file:
                while True:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if loop.time() >= end:
                            raise self._busy() from None
                        await anyio.sleep(LOCK_PERIOD)
                yield
        finally:
            self._turn.release()

    def _busy(self) -> Busy:
        return Busy(f"VirtualBox's registry {self.registry} is in use by another call that does "
                    "not end", registry=str(self.registry))

    async def _call(self, words: Sequence[str], end: float) -> tuple[int, str, str]:
        """One process; raises `TimeoutError`. It is gone when this returns, however it does."""
        command = [self.programs.manage, *words]
        if sys.platform == "linux":
            # VBoxManage starts VBoxSVC and that the machine's process, which is set-user-id root
            # where there is a kernel driver: they keep their rights.
            command = guarded(command, os.getpid(), drop_capabilities=False,
                              may_gain_privileges=True)
        self.started += 1
        loop = asyncio.get_running_loop()
        spawned = asyncio.ensure_future(loop.subprocess_exec(
            lambda: _Listener(loop), *command, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))
        # Cancelled half-way, asyncio would leave a process that nobody has waited for.
        try:
            transport, listener = await asyncio.shield(spawned)
        except OSError as error:
            raise ProgramMissing(f"{command[0]} cannot be started: {error.strerror}") from error
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True), contextlib.suppress(OSError):
                await _end(*await spawned)
            raise
        try:
            async with asyncio.timeout_at(end):
                await asyncio.shield(listener.exited)
                await asyncio.wait([listener.closed], timeout=LAST_WORDS)
        finally:
            with anyio.CancelScope(shield=True):
                await _end(transport, listener)
        out, err = (bytes(listener.kept[fd]) for fd in (1, 2))
        if max(len(out), len(err)) > MOST_OUTPUT:
            raise HypervisorRefused(f"VBoxManage {words[0]} answers with more than "
                                    f"{MOST_OUTPUT} bytes", kind="too-long", command=list(words))
        code = transport.get_returncode()
        assert code is not None
        return code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


class _Listener(asyncio.SubprocessProtocol):
    """Keeps what a process prints, one byte more than is allowed.

    asyncio's own streams tell the end of a process only when its pipes are closed, too, and those
    a service that it started may hold.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.kept = {1: bytearray(), 2: bytearray()}
        self.exited: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        kept = self.kept[fd]
        kept += data[:MOST_OUTPUT + 1 - len(kept)]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        if not self._open and not self.closed.done():
            self.closed.set_result(None)

    def process_exited(self) -> None:
        if not self.exited.done():
            self.exited.set_result(None)


async def _end(transport: asyncio.SubprocessTransport, listener: _Listener) -> None:
    """End a call and what it started for itself; the service is in a session of its own."""
    if not listener.exited.done():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(transport.get_pid(), signal.SIGKILL)
        await listener.exited
    transport.close()
