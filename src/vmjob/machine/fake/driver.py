"""The fake driver, with faults on demand."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import psutil

from vmjob.errors import (
    HostDiskFull,
    MachineStartFailed,
    NotSupported,
    TemplateUnusable,
    WrongState,
)
from vmjob.guest.agent.wire import LANES
from vmjob.home import remove_tree
from vmjob.host.guard import guarded
from vmjob.machine.contract import (
    Capabilities,
    Checkpoint,
    ConsoleAddress,
    Ended,
    EndReason,
    MachineSpec,
    Priority,
    Status,
)
from vmjob.machine.fake.faults import Faults
from vmjob.machine.fake.network import Relays, listen
from vmjob.machine.fake.screen import Screen

__all__ = ["FakeDriver", "FakeMachine"]

#: Seconds from SIGKILL until processes must be gone.
KILL_DEADLINE = 10.0
#: A frozen fake machine: its copies start anew, so there is nothing in it.
MEMORY = "memory"
FROZEN = "a frozen fake machine\n"


class FakeDriver:
    """Makes machines that are processes of this computer."""

    name = "fake"
    capabilities = Capabilities(suspend=True, checkpoint=False,
                                networks=frozenset({"none", "nat"}), console=True, templates=True,
                                isolated=False, display=True, forwards=True)

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or Faults()

    async def create(self, spec: MachineSpec) -> FakeMachine:
        if spec.foreign is not None or spec.attached is not None:
            raise NotSupported("the fake driver has no disks of its user's")
        if spec.template is not None and not is_frozen(spec.template):
            raise TemplateUnusable("the fake machine's memory is not what it was")
        machine = FakeMachine(spec, self._faults)
        machine.workdir.mkdir()
        return machine

    def identity(self, spec: MachineSpec) -> dict[str, Any]:
        return {"version": self._faults.version}

    async def load(self, spec: MachineSpec) -> FakeMachine:
        machine = FakeMachine(spec, self._faults)
        if not machine.workdir.exists():
            raise WrongState(f"there is no machine in {spec.directory}")
        return machine


class FakeMachine:
    """A keeper with an agent and its jobs. Implements `vmjob.machine.contract.Machine`."""

    def __init__(self, spec: MachineSpec, faults: Faults) -> None:
        self.spec = spec
        self.workdir = spec.directory / "job"
        self._faults = faults
        self._status = Status.CREATED
        self._keeper: asyncio.subprocess.Process | None = None
        self._agent: int | None = None
        self._ended: asyncio.Task[Ended] | None = None
        self._asked_to_end = False
        self._relays = Relays()
        self._screen = Screen(spec)

    async def start(self) -> Mapping[str, socket.socket]:
        if self._status is not Status.CREATED:
            raise WrongState(f"the machine is {self._status}, not created")
        if self._faults.start is not None:
            raise MachineStartFailed(self._faults.start)
        ours: dict[str, socket.socket] = {}
        theirs: dict[str, socket.socket] = {}
        for name in LANES:
            ours[name], theirs[name] = socket.socketpair()
        try:
            await self._screen.open()
            await self._spawn([sock.fileno() for sock in theirs.values()])
        except OSError as error:
            for sock in ours.values():
                sock.close()
            raise MachineStartFailed(f"cannot start the keeper: {error.strerror}") from error
        except BaseException:
            for sock in ours.values():
                sock.close()
            raise
        finally:
            for sock in theirs.values():
                sock.close()
        return ours

    async def suspend(self) -> None:
        if self._status is Status.SUSPENDED:
            return
        self._require_running()
        # The keeper goes on: it uses no processor, and has to end the others when we are killed.
        self._signal_all(signal.SIGSTOP)
        self._status = Status.SUSPENDED

    async def resume(self) -> None:
        if self._status is Status.RUNNING:
            return
        self._require_running()
        self._signal_all(signal.SIGCONT)
        self._status = Status.RUNNING

    async def checkpoint(self, directory: Path, name: str,
                         while_still: Callable[[], None]) -> Checkpoint:
        raise NotSupported("the fake driver makes no checkpoints")

    async def set_priority(self, priority: Priority) -> None:
        self._require_running()

    async def forward(self, host_port: int, guest_port: int, *, remote: bool = False) -> int:
        self._require_running()
        return await self._relays.add(
            listen(self.spec, host_port, guest_port, remote=remote), guest_port)

    async def unforward(self, host_port: int) -> None:
        self._require_running()
        await self._relays.remove(host_port)

    async def set_network(self, available: bool) -> None:
        self._require_running()
        if self.spec.network == "none":
            raise NotSupported("the machine has no network")
        self._relays.plug(available)

    def traffic(self) -> tuple[int, int]:
        return 0, 0

    def console_address(self) -> ConsoleAddress:
        self._require_running()
        return self._screen.address()

    async def screenshot(self, path: Path) -> None:
        self._require_running()
        self._screen.picture(path)

    async def freeze(self) -> list[str]:
        if not self.spec.freezable:
            raise WrongState("the machine was not started to be frozen")
        self._require_running()
        if self._faults.freeze is not None:
            raise HostDiskFull(self._faults.freeze)
        (self.spec.directory / MEMORY).write_text(FROZEN)
        await self.stop()
        return [MEMORY]

    async def stop(self) -> None:
        if self._keeper is None or self._ended is None:
            if self._status is Status.CREATED:
                self._status = Status.STOPPED
            return
        self._asked_to_end = True
        with contextlib.suppress(ProcessLookupError):
            self._keeper.terminate()
        with anyio.CancelScope(shield=True), anyio.fail_after(KILL_DEADLINE):
            await asyncio.shield(self._ended)

    async def destroy(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self.stop()
            finally:
                self._screen.close()
                remove_tree(self.spec.directory)
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
    def logs(self) -> tuple[str, ...]:
        return ()

    @property
    def worn(self) -> bool:
        return False

    @property
    def pid(self) -> int | None:
        """Process id of the machine (its keeper) once it was started."""
        return self._keeper.pid if self._keeper else None

    @property
    def agent_pid(self) -> int | None:
        """Process id of the agent once the machine was started."""
        return self._agent

    # -- inside ----------------------------------------------------------------------------------

    async def _spawn(self, fds: list[int]) -> None:
        owner = os.getpid()
        package = Path(__file__).parents[3]
        agent = [sys.executable, "-m", *self._program(), str(self.workdir),
                 str(self.spec.directory / "run"), *map(str, fds)]
        # -I and -S: the keeper needs nothing but the standard library, and little of that.
        keeper = [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")),
                  str(owner), *agent]
        spawned = asyncio.ensure_future(asyncio.create_subprocess_exec(
            *guarded(keeper, owner, drop_capabilities=False), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, start_new_session=True, pass_fds=fds,
            env={**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}))
        # Cancelled half-way, asyncio would leave a process that nobody has waited for; so it is
        # made in any case, and `destroy` ends it. (The shield alone holds off anyio's cancellation,
        # not that of `asyncio.timeout` or of Ctrl-C.)
        try:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([spawned])
        finally:
            self._keeper = await spawned
            self._ended = asyncio.ensure_future(self._watch())
            self._status = Status.RUNNING
        assert self._keeper.stdout is not None
        said = await self._keeper.stdout.readline()
        if not said:
            raise MachineStartFailed("the keeper of the fake machine did not start")
        self._agent = int(said)

    def _program(self) -> list[str]:
        if self._faults.needs_impostor:
            return ["vmjob.machine.fake.impostor", self._faults.encoded()]
        return ["vmjob.guest.agent"]

    def _require_running(self) -> None:
        if self._status not in (Status.RUNNING, Status.SUSPENDED):
            raise WrongState(f"the machine is {self._status}, not running")

    def _signal_all(self, number: int) -> None:
        """Signal the agent and all jobs; the keeper has them all below it, orphans too.

        Again until nobody new is found: who is about to fork when we look is stopped after it.
        """
        assert self._keeper is not None
        reached: set[int] = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            keeper = psutil.Process(self._keeper.pid)
            while new := [each for each in keeper.children(recursive=True)
                          if each.pid not in reached]:
                for process in new:
                    reached.add(process.pid)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)

    async def _watch(self) -> Ended:
        assert self._keeper is not None
        code = await self._keeper.wait()
        await self._relays.close()
        self._screen.close()
        if code < 0:
            # Somebody killed the keeper; its agent died with it, the jobs are ours to end.
            kill_strays(self.spec.directory / "run")
        self._status = Status.STOPPED
        if self._asked_to_end:
            return Ended(EndReason.ASKED, "the machine was stopped")
        if "Kernel panic" in self._faults.console:
            return Ended(EndReason.PANIC, "the machine's kernel gave up")
        assert self._keeper.stdout is not None
        said = (await self._keeper.stdout.read()).split()
        if code != 0 or not said:
            if code == -signal.SIGKILL:
                return Ended(EndReason.KILLED, "the fake machine was killed (signal 9)")
            how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
            return Ended(EndReason.CRASHED, f"the fake machine {how}")
        status = int(said[-1])
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return Ended(EndReason.RESET, f"the machine ended: agent ended {how}")


def is_frozen(template: Path) -> bool:
    """Whether a frozen fake machine is whole."""
    with contextlib.suppress(OSError):
        return (template / MEMORY).read_text() == FROZEN
    return False


def kill_strays(run: Path) -> None:
    """Kill jobs of a machine that has no keeper any more; the environment says whose they are."""
    mark = str(run / "to-host")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("VMJOB_TO_HOST") == mark:
                process.kill()
