"""The VirtualBox driver: one process of VBoxHeadless per machine, with a registry of its own.

VirtualBox keeps its machines in a registry of the user's. Each of ours has one in its own
directory, with its own service process: nothing of it is seen in the volunteer's VirtualBox, no two
machines wait for each other, and with the directory all is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from vmjob.errors import (
    CheckpointUnusable,
    DiskUnusable,
    HostDiskFull,
    HypervisorRefused,
    HypervisorSilent,
    MachineError,
    MachineStartFailed,
    NotSupported,
    ProgramMissing,
    TemplateUnusable,
    VmjobError,
    WrongState,
)
from vmjob.guest.agent.wire import LANES
from vmjob.home import remove_tree
from vmjob.host.facts import memory, processor
from vmjob.host.priority import set_processor_priority
from vmjob.host.unbroken import unbroken
from vmjob.machine.console import Console
from vmjob.machine.contract import (
    BootParts,
    Capabilities,
    Checkpoint,
    ConsoleAddress,
    Ended,
    MachineSpec,
    Priority,
    Status,
)
from vmjob.machine.links import attached_in, link_or_copy
from vmjob.machine.virtualbox import definition, display, media, programs
from vmjob.machine.virtualbox.faults import check_memory, classify
from vmjob.machine.virtualbox.forwards import Forwards
from vmjob.machine.virtualbox.lanes import Carrier
from vmjob.machine.virtualbox.log import complaints
from vmjob.machine.virtualbox.manage import SAVE_DEADLINE, Manage, service_pids, sweep_orphans
from vmjob.machine.virtualbox.process import KILL_DEADLINE, MESSAGES, Process, explain_end
from vmjob.machine.virtualbox.standing import Standing
from vmjob.machine.virtualbox.traffic import Traffic

if TYPE_CHECKING:
    from vmjob.machine.virtualbox import saving

__all__ = ["VirtualBoxDriver", "VirtualBoxMachine"]

#: Seconds until VirtualBox has connected a machine's serial ports and runs it.
START_DEADLINE = 60.0
MIB = 1 << 20
#: Characters of VirtualBox's log that come with an error.
LOG_TOLD = 2000
#: A saved machine: memory and devices.
STATE = "machine.sav"
#: The last calls of VBoxManage and their answers.
TRANSCRIPT = "vboxmanage.json"


class VirtualBoxDriver:
    """Makes machines that are processes of VirtualBox."""

    name = "virtualbox"

    @property
    def capabilities(self) -> Capabilities:
        """What the VirtualBox that is here can do: some versions have known faults."""
        try:
            bad = programs.concerns(programs.find())
        except ProgramMissing:  # who makes a machine is told
            bad = frozenset()
        return able(bad)

    async def create(self, spec: MachineSpec) -> VirtualBoxMachine:
        check_able(spec, programs.concerns(programs.find()))
        await anyio.to_thread.run_sync(sweep_orphans)
        machine = VirtualBoxMachine(spec)
        try:
            await machine.define()
        except BaseException:
            await machine.destroy()
            raise
        return machine

    def identity(self, spec: MachineSpec) -> dict[str, Any]:
        found = programs.find()
        bare = replace(spec, id="", template=None, saved=None, freezable=False,
                       attached=None)
        told = {"hypervisor": self.name, "version": programs.version(found.manage).text,
                "definition": [definition.configure(bare), *definition.processor(bare),
                               *definition.controllers(bare)],
                "kernel": definition.kernel_arguments(bare), "disk_gb": spec.disk_gb}
        if spec.runs_natively:  # then it is this computer's processor that the guest saw
            told["processor"] = processor()
        return told

    async def load(self, spec: MachineSpec) -> VirtualBoxMachine:
        check_able(spec, programs.concerns(programs.find()))
        machine = VirtualBoxMachine(spec)
        if not machine.settings.exists():
            raise WrongState(f"there is no machine in {spec.directory}")
        machine.take_up()
        return machine


def able(bad: Collection[str]) -> Capabilities:
    """What a version with these known faults (`programs.Flaw.concerns`) is used for."""
    layers, states = "vdi-overlay" not in bad, "saved-state" not in bad
    return Capabilities(suspend=True, checkpoint=layers and states,
                        networks=frozenset({"none", "nat"}), console=True,
                        templates=layers and states, isolated=True, own_addresses=False,
                        growing=False, display=True, foreign=layers, forwards=True,
                        attached=True, folders=layers, floppy=layers)


def check_able(spec: MachineSpec, bad: Collection[str]) -> None:
    """Refuse what a version with these known faults would do wrong; raises `NotSupported`.

    A checkpoint is `CheckpointUnusable`: its job can begin anew.
    """
    can = able(bad)
    if spec.saved is not None and not can.checkpoint:
        raise CheckpointUnusable("this version of VirtualBox is not trusted with checkpoints")
    for wanted, there, what in (
            (spec.template is not None or spec.freezable, can.templates, "frozen machines"),
            (spec.foreign is not None, can.foreign, "disks of their users")):
        if wanted and not there:
            raise NotSupported(f"this version of VirtualBox is not trusted with {what}",
                               advice="`vmjob doctor` tells why. Install a newer one, or use QEMU.")


class VirtualBoxMachine:
    """One process of VirtualBox. Implements `vmjob.machine.contract.Machine`."""

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self._programs = programs.find()
        self._manage = Manage(self._programs, spec.directory / "registry")
        self._version = programs.usable_version(self._programs.manage).text
        self._bad = programs.concerns(self._programs)
        self.settings = spec.directory / definition.NAME / f"{definition.NAME}.vbox"
        self._status = Status.CREATED
        self._process: Process | None = None
        self._console: Console | None = None
        self._carrier: Carrier | None = None
        self._asked_to_end = False
        self._ended: asyncio.Task[Ended] | None = None
        #: Of its disk, the lowest first; it writes to the last.
        self._layers: list[Path] = []
        self._checkpointing = anyio.Lock()
        self._priority = spec.priority
        self._standing = Standing(self._manage)
        self._saver: saving.Saver | None = None
        self._forwards: Forwards | None = None
        self._address: ConsoleAddress | None = None
        self._traffic: Traffic | None = None

    # -- its making ----------------------------------------------------------------------------

    async def define(self) -> None:
        """Tell VirtualBox what it is; nothing runs yet."""
        spec, manage = self.spec, self._manage
        boot, saved = spec.boot, None
        if spec.saved is not None:
            from vmjob.machine.virtualbox import saving

            saved = saving.opened(spec.saved, self._version)
            nowhere = Path("/")
            boot = BootParts("", nowhere, nowhere, spec.saved.directory / saved.root, nowhere)
            self.spec = spec = replace(
                spec, attached=attached_in(spec.saved.directory, saved.attached))
        if boot is None and spec.foreign is None:
            raise WrongState("a VirtualBox machine needs an image")
        await manage.run(*definition.create(spec.directory))
        await manage.run(*definition.configure(spec))
        for words in definition.processor(spec):
            await manage.run(*words)
        for words in definition.controllers(spec):
            await manage.run(*words)
        if spec.foreign is not None:
            await media.attach_foreign(manage, spec.directory, spec.foreign)
            if spec.foreign.floppy:
                await manage.run(*definition.attach(definition.Medium(
                    definition.FLOPPY, 0, "fdd", str(spec.floppy.absolute()))))
            for name, writable in spec.foreign.folders.items():
                await manage.run(*definition.shared_folder(name, str(spec.folder(name).absolute()),
                                                           writable=writable))
            return
        assert boot is not None
        if saved is not None and spec.saved is not None:
            await self._copied(spec.saved.directory, saved.saved, saved.cd, saved.layers,
                               CheckpointUnusable)
        elif spec.template is not None:
            layers = [path.name for path in media.layers_in(spec.template)]
            await self._copied(spec.template, STATE, media.BOOT_CD, layers, TemplateUnusable)
        else:
            await anyio.to_thread.run_sync(media.make_first, spec, boot)
            self._layers = [media.layer(spec.directory, 0)]
        await media.attach_image(manage, spec, boot, self._layers)

    def take_up(self) -> None:
        """Know what another process has defined."""
        self._layers = media.layers_in(self.spec.directory)

    async def _copied(self, source: Path, state: str, cd: str, layers: Sequence[str],
                      unusable: type[MachineError]) -> None:
        """Take the files of a machine that was saved, and lay a layer of our own on its disk."""
        directory = self.spec.directory
        if not layers:
            raise unusable("a saved machine without a disk")
        try:
            link_or_copy(source / state, directory / STATE)
            link_or_copy(source / cd, directory / media.BOOT_CD)
            below = media.link_layers([source / each for each in layers], directory)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise HostDiskFull(f"no room for a machine's copy: {error.strerror}") from error
            raise unusable(f"a saved machine cannot be used: {error}") from error
        try:
            self._layers = [*below, await media.new_layer(self._manage, directory, below)]
        except HypervisorSilent:  # which says nothing of the disk
            raise
        except (MachineError, DiskUnusable) as error:
            raise unusable(f"a saved machine's disk cannot be used: {error.message}") from error

    # -- the contract --------------------------------------------------------------------------

    async def start(self) -> Mapping[str, socket.socket]:
        if self._status is not Status.CREATED:
            raise WrongState(f"the machine is {self._status}, not created")
        self._programs = programs.find()  # again: hours may have passed since it was made
        check_memory(self.spec.memory_mb, memory().available // MIB)
        directory = self.spec.directory
        numbers = [definition.CONSOLE]
        if self.spec.foreign is None:
            numbers.append(definition.LANES_PLACE)
        with contextlib.ExitStack() as opened:
            place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, place)
            listening = {}
            for number in numbers:
                listening[number] = opened.enter_context(_listen(place, number))
            packets = None
            if self.spec.network != "none":
                self._traffic = Traffic()
                packets = opened.enter_context(self._traffic.offered())
            # A socket's path has 107 bytes at most; a directory of ours may be deeper.
            await self._manage.run(*definition.joined(
                {number: f"/proc/{os.getpid()}/fd/{place}/serial-{number}" for number in numbers},
                packets))
            if self.spec.display:
                self._address = display.chosen()
                await self._manage.run(*display.words(self._address))
            if (directory / STATE).exists():
                await self._manage.run("adoptstate", definition.NAME, str(directory / STATE))
            try:
                return await self._started(listening)
            finally:
                for number in numbers:
                    (directory / f"serial-{number}").unlink(missing_ok=True)

    async def _started(self, listening: Mapping[int, socket.socket]) -> Mapping[str, socket.socket]:
        command = [self._programs.headless, "--startvm", definition.MACHINE_UUID, "--vrde",
                   "config" if self.spec.display else "off"]
        self._process = process = await Process.begun(
            command, self._manage.environment, self.spec.directory,
            self.settings.parent / "Logs" / "VBox.log",
            may_restart=self.spec.foreign is not None)
        self._status = Status.RUNNING
        self._ended = asyncio.get_running_loop().create_task(self._watch())
        ends: dict[int, socket.socket] = {}
        try:
            process.watch(service_pids(self._manage.registry))
            with anyio.fail_after(START_DEADLINE):
                await self._connected(listening, ends)
                running = await process.reaches("RUNNING")
            # From here on nothing waits: what is opened for a process that lives, its end closes.
            if not running or self._status is not Status.RUNNING:
                raise self._not_started()
            return self._opened(ends)
        except TimeoutError:
            await self.stop()
            raise MachineStartFailed("VirtualBox did not start the machine in time") from None
        except BaseException:
            await self.stop()
            raise
        finally:
            for each in ends.values():
                each.close()

    def _opened(self, ends: dict[int, socket.socket]) -> Mapping[str, socket.socket]:
        """The host's ends of the lanes, now that it runs; takes ``ends`` over."""
        self._console = Console(ends.pop(definition.CONSOLE), self.spec.directory / "console.log")
        self._prioritize(self._priority)
        if self.spec.foreign is not None:
            return {}
        pairs = {name: socket.socketpair() for name in LANES}
        self._carrier = Carrier(ends.pop(definition.LANES_PLACE),
                                self.spec.directory / media.EXCHANGE,
                                [pairs[name][1] for name in LANES])
        return {name: pairs[name][0] for name in LANES}

    async def _connected(self, listening: Mapping[int, socket.socket],
                         ends: dict[int, socket.socket]) -> None:
        """VirtualBox's ends of the serial ports, once it has made the machine, go to ``ends``."""
        loop = asyncio.get_running_loop()
        assert self._ended is not None
        for number, each in listening.items():
            waiting = asyncio.ensure_future(loop.sock_accept(each))
            try:
                await asyncio.wait([waiting, self._ended], return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    raise self._not_started()
                ends[number] = waiting.result()[0]
            finally:
                waiting.cancel()

    def _not_started(self) -> VmjobError:
        assert self._process is not None
        fault = classify(self._process.said(), *complaints(self._process.logged()))
        found = fault.error("VirtualBox did not start the machine", **self.facts())
        saved = self.spec.saved is not None or self.spec.template is not None
        if not (type(found) in (HypervisorRefused, CheckpointUnusable)
                or (saved and type(found) is DiskUnusable)):
            return found
        kind = (CheckpointUnusable if self.spec.saved else
                TemplateUnusable if self.spec.template else MachineStartFailed)
        return kind(found.message, **found.context)

    async def checkpoint(self, directory: Path, name: str,
                         while_still: Callable[[], None]) -> Checkpoint:
        async with self._checkpointing:
            from vmjob.machine.virtualbox import saving  # not at start-up: most never need it

            self._running_process()
            if self.spec.foreign is not None:  # `Capabilities.kept_foreign` is empty
                raise NotSupported("a machine of its user's own disk is not kept")
            if not able(self._bad).checkpoint:
                raise NotSupported("this version of VirtualBox is not trusted with checkpoints")
            self._saver = self._saver or saving.Saver(self.spec, self._manage, self._layers,
                                                      self._version, self._hurried)
            return await unbroken(self._saver.take(directory, name, while_still, self._standing))

    async def set_priority(self, priority: Priority) -> None:
        self._running_process()
        self._priority = priority
        self._prioritize(priority)

    @contextlib.contextmanager
    def _hurried(self) -> Iterator[None]:
        """Let it stop and save itself like any program.

        The thread that is the guest's processor also writes its state. At a low priority the
        machine would stand still for long on a busy computer: for 8 to 30 s instead of 0.4, with
        five busy programs on two processors (measured).
        """
        self._prioritize(Priority.NORMAL)
        try:
            yield
        finally:
            if self._status is not Status.STOPPED:
                self._prioritize(self._priority)

    def _prioritize(self, priority: Priority) -> None:
        threads = []
        with contextlib.suppress(OSError):  # it may be ending
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    if (task / "comm").read_text(encoding="utf-8").startswith("EMT"):
                        threads.append(int(task.name))
        set_processor_priority(threads, low=priority is Priority.LOW)

    async def freeze(self) -> list[str]:
        if not self.spec.freezable:
            raise WrongState("the machine was not started to be frozen")
        process = self._running_process()
        self._asked_to_end = True
        try:
            with self._hurried():
                answer = await self._manage.ask("controlvm", definition.NAME, "savestate",
                                                deadline=SAVE_DEADLINE)
            if answer.fault is not None:  # its log may know the cause
                raise classify(answer.stderr, *complaints(process.logged())).error(
                    "VirtualBox did not save the machine", exit_code=answer.exit_code,
                    log=process.logged()[-LOG_TOLD:])
        except BaseException:
            self._asked_to_end = False
            raise
        try:
            with anyio.fail_after(KILL_DEADLINE):
                await self.ended()
            await self._manage.close()
            state, = (self.settings.parent / "Snapshots").glob("*.sav")
            state.rename(self.spec.directory / STATE)
        except (TimeoutError, ValueError, OSError) as error:
            raise MachineError(f"VirtualBox did not keep the machine's state: {error}") from error
        return [STATE, media.BOOT_CD, *(path.name for path in self._layers)]

    async def forward(self, host_port: int, guest_port: int, *, remote: bool = False) -> int:
        process = self._running_process()
        if self.spec.network == "none":
            raise NotSupported("the machine has no network")
        self._forwards = self._forwards or Forwards(self._manage, process)
        return await self._forwards.add(host_port, guest_port, remote=remote)

    async def unforward(self, host_port: int) -> None:
        self._running_process()
        if self._forwards:
            await self._forwards.remove(host_port)

    async def set_network(self, available: bool) -> None:
        self._running_process()
        if self.spec.network == "none":
            raise NotSupported("the machine has no network")
        await self._manage.run("controlvm", definition.NAME, "setlinkstate1",
                               "on" if available else "off")

    def traffic(self) -> tuple[int, int]:
        return self._traffic.counted() if self._traffic else (0, 0)

    def console_address(self) -> ConsoleAddress:
        self._running_process()
        if self._address is None:
            raise NotSupported("the machine has no display")
        return self._address

    async def screenshot(self, path: Path) -> None:
        self._running_process()
        if self._address is None:
            raise NotSupported("the machine has no display")
        await display.screenshot(self._manage, self.spec.directory, path)

    async def suspend(self) -> None:
        if self._status is Status.SUSPENDED:
            return
        self._running_process()
        with self._hurried():
            await self._standing.suspend()
        if self._status is Status.RUNNING:  # and has not ended meanwhile
            self._status = Status.SUSPENDED

    async def resume(self) -> None:
        if self._status is Status.RUNNING and self._standing.runs:
            return
        self._running_process()
        async with self._checkpointing:
            await self._standing.resume()
            if self._status is Status.SUSPENDED:
                self._status = Status.RUNNING

    async def stop(self) -> None:
        if self._process is None or self._ended is None:
            if self._status is Status.CREATED:
                self._status = Status.STOPPED
            await self._closed()
            return
        self._asked_to_end = True
        # A throw-away machine has nothing to save; SIGKILL cannot be blocked or delayed.
        self._process.kill()
        with anyio.CancelScope(shield=True), anyio.fail_after(KILL_DEADLINE):
            await asyncio.shield(self._ended)
        await self._closed()

    async def _closed(self) -> None:
        """End what served it, and leave word of what VBoxManage was asked."""
        await self._manage.close()
        calls = [call.as_dict() for call in self._manage.transcript]
        with contextlib.suppress(OSError):
            (self.spec.directory / TRANSCRIPT).write_text(json.dumps(calls, indent=1),
                                                          encoding="utf-8")

    async def destroy(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self.stop()
            finally:
                await anyio.to_thread.run_sync(remove_tree, self.spec.directory)
                self._status = Status.DESTROYED

    @property
    def logs(self) -> tuple[str, ...]:
        return ("console.log", MESSAGES, f"{definition.NAME}/Logs/VBox.log", TRANSCRIPT)

    @property
    def worn(self) -> bool:
        return self._saver is not None and self._saver.worn

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def get_status(self) -> Status:
        return self._status

    async def ended(self) -> Ended:
        if self._ended is None:
            raise WrongState("the machine was never started")
        return await asyncio.shield(self._ended)

    def console(self) -> str:
        return self._console.text() if self._console else ""

    def facts(self) -> dict[str, Any]:
        return {"hypervisor": "virtualbox",
                "version": self._version,
                "accelerator": self.spec.accelerator, "cpu_model": self.spec.cpu_model,
                "machine_type": "piix3", "flaws": sorted(self._bad),
                "started_from": "disk" if self.spec.foreign else (
                    "template" if self.spec.template else "image"),
                "memory_mb": self.spec.memory_mb, "cpus": self.spec.cpus,
                "disk_gb": self.spec.disk_gb, "network": self.spec.network}

    # -- behind it -----------------------------------------------------------------------------

    def _running_process(self) -> Process:
        if self._process is None or self._status not in (Status.RUNNING, Status.SUSPENDED):
            raise WrongState(f"the machine is {self._status}, not running")
        return self._process

    async def _watch(self) -> Ended:
        assert self._process is not None
        code = await self._process.ended()
        try:
            if self._console:
                await self._console.close()
            if self._carrier:
                await anyio.to_thread.run_sync(self._carrier.close)
        finally:
            if self._traffic:
                self._traffic.close()
            self._status = Status.STOPPED
            self._process.close()
        return explain_end(self._asked_to_end, code, self._process.logged(), self.console(),
                           self._process.said(), self._process.halted)


@contextlib.contextmanager
def _listen(place: int, number: int) -> Iterator[socket.socket]:
    """A socket in the directory with the descriptor ``place``."""
    with socket.socket(socket.AF_UNIX) as each:
        each.bind(f"/proc/self/fd/{place}/serial-{number}")
        each.listen(1)
        each.setblocking(False)
        yield each
