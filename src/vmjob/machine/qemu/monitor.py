"""QEMU's monitor: QMP commands with a deadline, and a bounded transcript of all that was said."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import anyio
from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from vmjob.errors import MachineError

__all__ = ["Monitor"]

#: Seconds for a monitor command. QEMU answers in milliseconds unless the computer is overloaded.
DEADLINE = 30.0
#: Commands and events kept for a failure report.
TRANSCRIPT = 500
#: A migration's states in their order; others mean that it failed.
PROGRESS = ("none", "setup", "active", "pre-switchover", "device", "completed")
#: Commands whose arguments nobody is to read in a failure report.
SECRET = ("set_password",)
#: Seconds between looks at a state that is being written.
MIGRATION_PERIOD = 0.01


class Monitor:
    """One QMP connection over a connected socket.

    ``on_no_space`` is called when the machine was stopped because this computer's disk is full.
    """

    def __init__(self, name: str, on_no_space: Callable[[], None]) -> None:
        self._client = QMPClient(name)
        self._events = EventListener()
        self._client.register_listener(self._events)
        self._watch: asyncio.Task[None] | None = None
        self._sock: socket.socket | None = None
        self.transcript: collections.deque[dict[str, Any]] = collections.deque(maxlen=TRANSCRIPT)
        #: ``reason`` of the SHUTDOWN event, once it came.
        self.shutdown_reason: str | None = None
        #: Whether a write to the machine's disk found this computer's disk full.
        self.out_of_space = False
        self._on_no_space = on_no_space
        self._resumed = asyncio.Event()
        #: How far the writing or loading of the machine's state is, in QEMU's words.
        self._migration = "none"
        self._migration_moved = asyncio.Event()
        #: When the guest was stopped: seconds by this computer's clock, told by QEMU itself.
        self._stopped_at: float | None = None
        #: Seconds for which it stood still in all, while somebody waited for it to go on.
        self.stood_still = 0.0
        # A connection that fails is disconnected by the client itself, which does not bear a second
        # one who does the same.
        self._connecting = anyio.Lock()

    async def connect(self, sock: socket.socket) -> None:
        """Greet and negotiate; raises `MachineError` when QEMU does not answer."""
        sock.setblocking(False)
        self._sock = sock
        try:
            with anyio.fail_after(DEADLINE):
                async with self._connecting:
                    await self._client.connect(sock)
        except (QMPError, OSError, TimeoutError) as error:
            raise MachineError(f"QEMU's monitor does not answer: {error}") from error
        self._watch = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        async for message in self._events:
            event: dict[str, Any] = dict(message)
            data: dict[str, Any] = event.get("data", {})
            self._note("event", event)
            if event.get("event") == "RESUME":
                if self._stopped_at is not None:
                    self.stood_still += max(0.0, _when(event) - self._stopped_at)
                self._stopped_at = None
                self._resumed.set()
            elif event.get("event") == "STOP":
                self._stopped_at = _when(event)
            elif event.get("event") == "MIGRATION":
                self._migration = str(data.get("status"))
                self._migration_moved.set()
            elif event.get("event") == "SHUTDOWN":
                self.shutdown_reason = str(data.get("reason"))
            elif event.get("event") == "BLOCK_IO_ERROR" and data.get("nospace"):
                # QEMU has stopped the machine; on a full disk nobody would ever wake it.
                self.out_of_space = True
                self._on_no_space()

    async def resumed(self) -> None:
        """Wait until the guest runs after its state was loaded; raises `MachineError`."""
        try:
            with anyio.fail_after(DEADLINE):
                await self._resumed.wait()
        except TimeoutError:
            raise MachineError("QEMU did not load the machine's state in time") from None

    async def migrated(self) -> None:
        """Wait until the machine's state is written; raises `MachineError`."""
        with anyio.move_on_after(DEADLINE):
            while (status := (await self.execute("query-migrate")).get("status")) != "completed":
                if status in ("failed", "cancelled"):
                    raise MachineError(f"QEMU could not write the machine's state: {status}")
                await anyio.sleep(MIGRATION_PERIOD)
            return
        raise MachineError("QEMU did not write the machine's state in time")

    async def migration_reaches(self, status: str, deadline: float) -> bool:
        """Wait until the migration is that far or further; false after ``deadline`` seconds.

        Needs QEMU's capability ``events``. Raises `MachineError` when it fails.
        """
        with anyio.move_on_after(deadline):
            while status not in PROGRESS[:PROGRESS.index(self._migration) + 1]:
                self._migration_moved.clear()
                await self._migration_moved.wait()
                if self._migration not in PROGRESS:
                    raise MachineError(f"QEMU could not move the machine's state: "
                                       f"{self._migration}")
            return True
        return False

    def forget_migration(self) -> None:
        """Another one is about to begin."""
        self._migration = "none"

    def end_machine(self) -> None:
        """Kill QEMU: nobody can tell any more in what state it is."""
        self._on_no_space()

    def version(self) -> str | None:
        """QEMU's version as it said in its greeting: ``7.2.22``."""
        greeting = self._client.greeting
        if greeting is None:
            return None
        told: Any = greeting.QMP.version["qemu"]
        return ".".join(str(int(told[part])) for part in ("major", "minor", "micro"))

    async def pass_descriptor(self, name: str, fd: int) -> None:
        """Give QEMU an open file under a name."""
        assert self._sock is not None
        self._client.send_fd_scm(fd)
        await self.execute("getfd", fdname=name)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command; raises `MachineError` when QEMU refuses it or is gone."""
        shown = {} if command in SECRET else arguments
        self._note("command", {"execute": command, "arguments": shown})
        try:
            with anyio.fail_after(DEADLINE):
                answer = await self._client.execute(command, arguments or None)
        except ExecuteError as error:
            self._note("error", {"message": str(error)})
            raise MachineError(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError, TimeoutError) as error:
            raise MachineError(f"QEMU did not answer {command}: {error}") from error
        self._note("answer", {"return": answer})
        return answer

    async def close(self) -> None:
        """Let go of the connection; QEMU may already be gone."""
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError, asyncio.CancelledError):
            with anyio.fail_after(DEADLINE):
                async with self._connecting:
                    await self._client.disconnect()
        if self._watch:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._sock:
            # The client closes it one turn of the loop later, and the loop may have none left.
            self._sock.close()

    def _note(self, kind: str, content: dict[str, Any]) -> None:
        self.transcript.append({"at": round(time.time(), 3), kind: content})


def _when(event: dict[str, Any]) -> float:
    stamp = event.get("timestamp", {})
    return float(stamp.get("seconds", 0)) + float(stamp.get("microseconds", 0)) / 1e6
