"""The fake driver, with faults on demand."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import psutil

from vmjob.errors import MachineStartFailed, NotSupported, WrongState
from vmjob.guest.agent.wire import LANES
from vmjob.host.guard import guarded
from vmjob.machine.contract import Capabilities, Ended, EndReason, MachineSpec, Status

__all__ = ["FakeDriver", "FakeMachine", "Faults"]

#: Seconds from SIGKILL until processes must be gone.
KILL_DEADLINE = 10.0


@dataclass(frozen=True)
class Faults:
    """What is to go wrong.

    ``start``: `start` fails with this text. ``says``: instead of the agent, something that answers
    every connection with these bytes, then is silent. ``console``: the console's text.
    """

    start: str | None = None
    says: bytes | None = None
    console: str = ""


class FakeDriver:
    """Makes machines that are processes of this computer."""

    name = "fake"
    capabilities = Capabilities(suspend=True, checkpoint=False, networks=frozenset({"none"}),
                                console=True, isolated=False)

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or Faults()

    async def create(self, spec: MachineSpec) -> FakeMachine:
        machine = FakeMachine(spec, self._faults)
        machine.workdir.mkdir()
        return machine

    async def load(self, spec: MachineSpec) -> FakeMachine:
        machine = FakeMachine(spec, self._faults)
        if not machine.workdir.exists():
            raise WrongState(f"there is no machine in {spec.directory}")
        return machine


class FakeMachine:
    """One agent process with its jobs. Implements `vmjob.machine.contract.Machine`."""

    def __init__(self, spec: MachineSpec, faults: Faults) -> None:
        self.spec = spec
        self.workdir = spec.directory / "job"
        self._faults = faults
        self._status = Status.CREATED
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Task[Ended] | None = None
        self._asked_to_end = False
        self._silent: list[socket.socket] = []

    async def start(self) -> Mapping[str, socket.socket]:
        if self._status is not Status.CREATED:
            raise WrongState(f"the machine is {self._status}, not created")
        if self._faults.start is not None:
            raise MachineStartFailed(self._faults.start)
        ours, theirs = {}, {}
        for name in LANES:
            ours[name], theirs[name] = socket.socketpair()
        command = self._command([theirs[name].fileno() for name in LANES])
        package = Path(__file__).parents[3]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *guarded(command, os.getpid(), drop_capabilities=False),
                stdin=subprocess.DEVNULL, start_new_session=True,
                pass_fds=[sock.fileno() for sock in theirs.values()],
                env={**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"})
        finally:
            for sock in theirs.values():
                if self._faults.says is None:
                    sock.close()
                else:
                    sock.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        sock.send(self._faults.says)
                    self._silent.append(sock)
        self._status = Status.RUNNING
        self._ended = asyncio.get_running_loop().create_task(self._watch())
        return ours

    async def suspend(self) -> None:
        if self._status is Status.SUSPENDED:
            return
        self._require_running()
        # Parents first: what is stopped starts nothing new.
        self._signal_tree(signal.SIGSTOP)
        self._status = Status.SUSPENDED

    async def resume(self) -> None:
        if self._status is Status.RUNNING:
            return
        self._require_running()
        self._signal_tree(signal.SIGCONT)
        self._status = Status.RUNNING

    async def checkpoint(self, name: str) -> None:
        raise NotSupported("the fake driver makes no checkpoints")

    async def continue_from(self, name: str) -> Mapping[str, socket.socket]:
        raise NotSupported("the fake driver makes no checkpoints")

    async def stop(self) -> None:
        if self._process is None or self._ended is None:
            if self._status is Status.CREATED:
                self._status = Status.STOPPED
            return
        self._asked_to_end = True
        self._signal_tree(signal.SIGKILL)
        with anyio.CancelScope(shield=True), anyio.fail_after(KILL_DEADLINE):
            await asyncio.shield(self._ended)

    async def destroy(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self.stop()
            finally:
                shutil.rmtree(self.spec.directory, ignore_errors=True)
                self._status = Status.DESTROYED

    def get_status(self) -> Status:
        return self._status

    async def ended(self) -> Ended:
        if self._ended is None:
            raise WrongState("the machine was never started")
        return await asyncio.shield(self._ended)

    def console(self) -> str:
        return self._faults.console

    def facts(self) -> dict[str, Any]:
        return {"hypervisor": "fake", "version": None, "accelerator": "none",
                "memory_mb": self.spec.memory_mb, "cpus": self.spec.cpus,
                "disk_gb": self.spec.disk_gb, "network": self.spec.network}

    @property
    def pid(self) -> int | None:
        """Process id of the agent, while it runs."""
        return self._process.pid if self._process else None

    # -- inside ----------------------------------------------------------------------------------

    def _command(self, fds: list[int]) -> list[str]:
        if self._faults.says is not None:
            return ["sleep", "infinity"]
        return [sys.executable, "-m", "vmjob.guest.agent", str(self.workdir),
                str(self.spec.directory / "run"), *map(str, fds)]

    def _require_running(self) -> None:
        if self._status not in (Status.RUNNING, Status.SUSPENDED):
            raise WrongState(f"the machine is {self._status}, not running")

    def _signal_tree(self, number: int) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self._process.pid)
            for process in (agent, *agent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    async def _watch(self) -> Ended:
        assert self._process is not None
        code = await self._process.wait()
        for sock in self._silent:
            sock.close()
        self._status = Status.STOPPED
        if self._asked_to_end:
            return Ended(EndReason.ASKED, "the machine was stopped")
        if "Kernel panic" in self._faults.console:
            return Ended(EndReason.PANIC, "the machine's kernel gave up")
        how = f"signal {-code}" if code < 0 else f"status {code}"
        return Ended(EndReason.RESET, f"the machine ended: agent ended with {how}")
