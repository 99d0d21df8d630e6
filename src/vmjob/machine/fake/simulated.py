"""A driver whose guests are simulated in this process: for tests of what outlives a machine.

A simulated machine starts, is kept as a checkpoint and continues from it within milliseconds and
without a process of its own, so a test can run hundreds of histories. Its agent is the real one;
its jobs are the programs of `vmjob.machine.fake.programs`. What is not yet read from a lane when a
checkpoint is made is lost to it, as with a real machine.

    base            belongs to every checkpoint, and never changes
    NAME.disk       the machine's files, when they changed since the checkpoint before
    NAME.state      everything else
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from vmjob.errors import (
    CheckpointFailed,
    CheckpointNewer,
    CheckpointUnusable,
    HostDiskFull,
    MachineStartFailed,
    NotSupported,
    WrongState,
)
from vmjob.guest.agent.wire import LANES
from vmjob.home import remove_tree
from vmjob.machine.contract import (
    Capabilities,
    Checkpoint,
    ConsoleAddress,
    Ended,
    EndReason,
    MachineSpec,
    Priority,
    Saved,
    Status,
)
from vmjob.machine.fake.guest import Guest, unpack_files
from vmjob.machine.fake.network import listen
from vmjob.machine.fake.screen import Screen

__all__ = ["SimulatedDriver", "SimulatedFaults", "SimulatedMachine"]

#: Seconds of a tick, and what a program does in one.
TICK = 0.001
STEPS = 20
#: Raise this when a checkpoint cannot be read by an older vmjob.
FORMAT = 1
BASE = "base"
BASE_CONTENT = b"the image of a simulated machine\n"
#: How often everybody else gets a turn while the guest stands still.
TURNS = 3


@dataclass(frozen=True)
class SimulatedFaults:
    """What is to go wrong in a simulated machine; a text is what the error says.

    ``start``, ``restore``: these fail. ``before_still``, ``after_still``: a checkpoint fails before
    the guest stands still, or when ``while_still`` was called. ``disk_full``: there is no room for
    its files. ``dies_at_tick``: the machine ends then, counted from its very first start.
    ``dies_while_still``: it ends in its next checkpoint, after ``while_still``. ``worn``: it wants
    to be followed by another.
    """

    start: str | None = None
    restore: str | None = None
    before_still: str | None = None
    after_still: str | None = None
    disk_full: str | None = None
    dies_at_tick: int | None = None
    dies_while_still: bool = False
    worn: bool = False


class _State(msgspec.Struct):
    """`Checkpoint.state`: file names, and the SHA-256 of their contents."""

    format: int
    files: dict[str, str]
    disk: str
    guest: str


class SimulatedDriver:
    """Makes machines that are simulated in this process.

    In each ``tick`` (seconds; 0: as fast as the event loop goes) a program makes ``steps`` steps.
    ``faults`` may be replaced at any time, for machines made later; those of a machine are its own.
    """

    name = "simulated"
    capabilities = Capabilities(suspend=True, checkpoint=True,
                                networks=frozenset({"none", "nat"}), console=False,
                                templates=False, isolated=False, display=True, forwards=True)

    def __init__(self, faults: SimulatedFaults | None = None, *, tick: float = TICK,
                 steps: int = STEPS) -> None:
        self.faults = faults or SimulatedFaults()
        self._tick = tick
        self._steps = steps

    async def create(self, spec: MachineSpec) -> SimulatedMachine:
        if spec.foreign is not None or spec.attached is not None:
            raise NotSupported("the simulated driver has no disks of its user's")
        machine = SimulatedMachine(spec, self.faults, self._tick, self._steps)
        if spec.saved is not None:
            _state(spec.saved)
        machine.workdir.mkdir()
        return machine

    def identity(self, spec: MachineSpec) -> dict[str, Any]:
        return {}

    async def load(self, spec: MachineSpec) -> SimulatedMachine:
        machine = SimulatedMachine(spec, self.faults, self._tick, self._steps)
        if not machine.workdir.exists():
            raise WrongState(f"there is no machine in {spec.directory}")
        return machine


class SimulatedMachine:
    """A simulated guest and its files. Implements `vmjob.machine.contract.Machine`."""

    def __init__(self, spec: MachineSpec, faults: SimulatedFaults, tick: float,
                 steps: int) -> None:
        self.spec = spec
        #: May be replaced at any time.
        self.faults = faults
        self.workdir = spec.directory / "job"
        self._tick = tick
        self._steps = steps
        self._status = Status.CREATED
        self._guest: Guest | None = None
        self._ended: asyncio.Future[Ended] | None = None
        #: Held while a checkpoint is made: who makes it lets the guest go on.
        self._checkpointing = anyio.Lock()
        self._last: _State | None = None
        self._screen = Screen(spec)
        #: Ports of this computer that are open for the machine: nothing in it answers.
        self.forwards: dict[int, socket.socket] = {}

    async def start(self) -> Mapping[str, socket.socket]:
        if self._status is not Status.CREATED:
            raise WrongState(f"the machine is {self._status}, not created")
        if self.faults.start is not None:
            raise MachineStartFailed(self.faults.start)
        known: dict[str, Any] | None = None
        if self.spec.saved is not None:
            if self.faults.restore is not None:
                raise CheckpointUnusable(self.faults.restore)
            known = self._restore(self.spec.saved)
        await self._screen.open()
        ours: dict[str, socket.socket] = {}
        theirs: dict[str, socket.socket] = {}
        for name in LANES:
            ours[name], theirs[name] = socket.socketpair()
        self._ended = asyncio.get_running_loop().create_future()
        self._guest = Guest(str(self.workdir), str(self.spec.directory / "run"), theirs,
                            tick=self._tick, steps=self._steps, ticked=self._ticked,
                            failed=self._failed, over=self._over)
        if known is not None:
            self._guest.restore(known)
        self._status = Status.RUNNING
        return ours

    async def suspend(self) -> None:
        if self._status is Status.SUSPENDED:
            return
        self._running_guest().stand_still()
        self._status = Status.SUSPENDED

    async def resume(self) -> None:
        if self._status is Status.RUNNING:
            return
        self._running_guest()
        async with self._checkpointing:
            self._running_guest().go_on()
            self._status = Status.RUNNING

    async def checkpoint(self, directory: Path, name: str,
                         while_still: Callable[[], None]) -> Checkpoint:
        self._running_guest()
        async with self._checkpointing:
            guest = self._running_guest()
            if self.faults.before_still is not None:
                raise CheckpointFailed(self.faults.before_still)
            began = time.monotonic()
            try:
                guest.stand_still()
                await _let_others_run()
                self._running_guest()  # it may have been stopped by now
                while_still()
                known, files = guest.saved(), guest.files()
                await _let_others_run()
                if self.faults.dies_while_still:
                    self._end(EndReason.CRASHED, "the simulated machine was told to end")
                if self.faults.after_still is not None:
                    raise CheckpointFailed(self.faults.after_still)
            finally:
                still = time.monotonic() - began
                if self._status is Status.RUNNING:
                    guest.go_on()
            if self._status not in (Status.RUNNING, Status.SUSPENDED):
                raise CheckpointFailed("the machine ended while it was being kept")
            if self.faults.disk_full is not None:
                raise HostDiskFull(self.faults.disk_full)
            return self._keep(directory, name, known, files, still)

    @property
    def worn(self) -> bool:
        return self.faults.worn

    @property
    def pid(self) -> int | None:
        return None

    async def set_priority(self, priority: Priority) -> None:
        self._running_guest()

    async def forward(self, host_port: int, guest_port: int, *, remote: bool = False) -> int:
        self._running_guest()
        listener = listen(self.spec, host_port, guest_port, remote=remote)
        port = int(listener.getsockname()[1])
        self.forwards[port] = listener
        return port

    async def unforward(self, host_port: int) -> None:
        self._running_guest()
        if listener := self.forwards.pop(host_port, None):
            listener.close()

    async def set_network(self, available: bool) -> None:
        self._running_guest()
        if self.spec.network == "none":
            raise NotSupported("the machine has no network")

    def traffic(self) -> tuple[int, int]:
        return 0, 0

    def console_address(self) -> ConsoleAddress:
        self._running_guest()
        return self._screen.address()

    async def screenshot(self, path: Path) -> None:
        self._running_guest()
        self._screen.picture(path)

    async def freeze(self) -> list[str]:
        raise NotSupported("the simulated driver makes no templates")

    async def stop(self) -> None:
        if self._guest is None:
            if self._status is Status.CREATED:
                self._status = Status.STOPPED
            return
        self._end(EndReason.ASKED, "the machine was stopped")
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._guest.join)

    async def destroy(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.stop()
            remove_tree(self.spec.directory)
            self._status = Status.DESTROYED

    def get_status(self) -> Status:
        return self._status

    async def ended(self) -> Ended:
        if self._ended is None:
            raise WrongState("the machine was never started")
        return await asyncio.shield(self._ended)

    def console(self) -> str:
        return ""

    def facts(self) -> dict[str, Any]:
        return {"hypervisor": "simulated", "version": None, "accelerator": "none",
                "memory_mb": self.spec.memory_mb, "cpus": self.spec.cpus,
                "disk_gb": self.spec.disk_gb, "network": self.spec.network}

    @property
    def ticks(self) -> int:
        """How many have passed, in this machine and those that it continues."""
        return self._guest.programs.ticks if self._guest else 0

    @property
    def seeds(self) -> list[bytes]:
        """What the host gave this machine to mix into its random numbers when it continued."""
        return self._guest.seeds if self._guest else []

    # -- inside ----------------------------------------------------------------------------------

    def _running_guest(self) -> Guest:
        if self._guest is None or self._status not in (Status.RUNNING, Status.SUSPENDED):
            raise WrongState(f"the machine is {self._status}, not running")
        return self._guest

    def _ticked(self, count: int) -> bool:
        if self.faults.dies_at_tick is None or count < self.faults.dies_at_tick:
            return True
        self._end(EndReason.CRASHED, f"the simulated machine was told to end at tick {count}")
        return False

    def _failed(self, error: BaseException) -> None:
        self._end(EndReason.CRASHED, f"the simulated machine failed: {error!r}")

    def _over(self) -> None:
        self._end(EndReason.RESET, "the machine ended: agent ended with status 0")

    def _end(self, reason: EndReason, detail: str) -> None:
        assert self._guest is not None
        assert self._ended is not None
        if not self._ended.done():
            self._guest.close()
            for listener in self.forwards.values():
                listener.close()
            self._screen.close()
            self._status = Status.STOPPED
            self._ended.set_result(Ended(reason, detail))

    def _keep(self, directory: Path, name: str, known: dict[str, Any], files: bytes,
              still: float) -> Checkpoint:
        """Write what is new of a checkpoint."""
        new: list[Path] = []
        sums = {BASE: _digest(BASE_CONTENT)}
        disk, digest = self._last.disk if self._last else "", _digest(files)
        try:
            if not (directory / BASE).exists():
                _write(directory / BASE, BASE_CONTENT, new)
            if self._last is None or self._last.files[disk] != digest:
                disk = f"{name}.disk"
                _write(directory / disk, files, new)
            content = msgspec.msgpack.encode(known)
            _write(directory / f"{name}.state", content, new)
        except OSError as error:
            for path in new:
                path.unlink(missing_ok=True)
            if error.errno == errno.ENOSPC:
                raise HostDiskFull(f"no room for a checkpoint: {error.strerror}") from error
            raise CheckpointFailed(
                f"a checkpoint could not be written: {error.strerror}") from error
        state = _State(FORMAT, {**sums, disk: digest, f"{name}.state": _digest(content)}, disk,
                       f"{name}.state")
        self._last = state
        return Checkpoint(tuple(state.files), msgspec.to_builtins(state), still,
                          sum(path.stat().st_size for path in new))

    def _restore(self, saved: Saved) -> dict[str, Any]:
        """Put the files where they were; what the guest knew. Raises `CheckpointUnusable`."""
        state = _state(saved)
        content: dict[str, bytes] = {}
        try:
            for name, digest in state.files.items():
                content[name] = (saved.directory / name).read_bytes()
                if _digest(content[name]) != digest:
                    raise CheckpointUnusable(f"a checkpoint is damaged: {name}")
            unpack_files(content[state.disk], str(self.workdir))
            known = msgspec.msgpack.decode(content[state.guest], type=dict[str, Any])
        except (OSError, KeyError, msgspec.MsgspecError) as error:
            raise CheckpointUnusable(f"a checkpoint cannot be read: {error}") from error
        self._last = state
        return known


async def _let_others_run() -> None:
    """Give the host's side the time that a hypervisor needs here: what is on its way arrives."""
    for _ in range(TURNS):
        await anyio.lowlevel.checkpoint()


def _state(saved: Saved) -> _State:
    said = saved.state.get("format")
    if isinstance(said, int) and said > FORMAT:
        raise CheckpointNewer("a checkpoint that was made by a newer vmjob")
    try:
        state = msgspec.convert(dict(saved.state), _State)
    except msgspec.ValidationError as error:
        raise CheckpointUnusable(f"a checkpoint that cannot be understood: {error}") from error
    if state.format != FORMAT or any("/" in name for name in state.files):
        raise CheckpointUnusable("a checkpoint of another version of vmjob")
    return state


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes, new: list[Path]) -> None:
    """Write a file that is not there yet; what fails half-way is among the new ones."""
    with path.open("xb", buffering=0) as file:
        new.append(path)
        view = memoryview(content)
        while view:
            view = view[os.write(file.fileno(), view):]
