"""The QEMU driver: one process per machine, joined to us by socket pairs and nothing else.

There are no socket files: every connection is one end of a socket pair that QEMU
inherits, so nobody else can connect, no path can be too long, and all of it is
gone with the two processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from vmjob.errors import (
    CheckpointUnusable,
    DiskUnusable,
    HostDiskFull,
    MachineDied,
    MachineError,
    MachineStartFailed,
    NotSupported,
    TemplateUnusable,
    WrongState,
)
from vmjob.guest.agent.wire import LANES
from vmjob.home import remove_tree
from vmjob.host.facts import processor
from vmjob.host.guard import guarded
from vmjob.host.priority import set_processor_priority
from vmjob.host.unbroken import unbroken
from vmjob.machine.console import Console
from vmjob.machine.contract import (
    TEMPLATE_DISK_GB,
    BootParts,
    Capabilities,
    Checkpoint,
    ConsoleAddress,
    Ended,
    EndReason,
    MachineSpec,
    Priority,
    Status,
)
from vmjob.machine.qemu import argv, frozen, programs
from vmjob.machine.qemu.display import Display
from vmjob.machine.qemu.foreign import Disk, Media, look_at, look_at_attached
from vmjob.machine.qemu.forwards import Forwards
from vmjob.machine.qemu.monitor import Monitor
from vmjob.machine.qemu.traffic import Traffic

if TYPE_CHECKING:
    from vmjob.machine.qemu import saving

__all__ = ["QemuDriver", "QemuMachine"]

GIB = 1 << 30
#: Memory that is a file of its own is not written into the stream of devices.
IGNORE_SHARED = [{"capability": "x-ignore-shared", "state": True}]
#: Seconds from SIGKILL until a process must be gone.
KILL_DEADLINE = 30.0
#: Seconds in which a QEMU that failed has ended, so that one can tell how.
END_PATIENCE = 1.0
#: Seconds for loading a checkpoint: as fast as the disk reads, up to the machine's whole memory.
RESTORE_DEADLINE = 600.0
#: Bytes of QEMU's own messages that are shown.
STDERR_SHOWN = 2000


class QemuDriver:
    """Makes machines that are QEMU processes."""

    name = "qemu"
    capabilities = Capabilities(suspend=True, checkpoint=True,
                                networks=frozenset({"none", "nat"}), console=True, templates=True,
                                isolated=True, display=True, foreign=True, forwards=True,
                                attached=True,
                                kept_foreign=frozenset({"raw", "qcow2"}))

    async def create(self, spec: MachineSpec) -> QemuMachine:
        """Make the machine's overlay; nothing runs yet."""
        if spec.saved is not None:
            from vmjob.machine.qemu import saving  # not at start-up: most machines never need it

            boot, foreign, attached = saving.source(spec.saved)
            spec = replace(spec, template=None, boot=boot, foreign=foreign, attached=attached)
        machine = QemuMachine(spec)
        if spec.foreign is not None:
            await machine.make_foreign_disks()
        elif spec.boot is None:
            raise WrongState("a QEMU machine needs an image")
        elif spec.attached is not None:
            await machine.make_disk_beside_attached()
        elif spec.template is not None:
            frozen.copy_blank(spec.template, machine.overlay)
        else:
            await anyio.to_thread.run_sync(frozen.make_disk, machine.overlay, spec.disk_gb * GIB)
        return machine

    def identity(self, spec: MachineSpec) -> dict[str, Any]:
        """The program, its command line without what differs from machine to machine, the CPU."""
        binary = programs.find(programs.system_binary())
        nowhere = Path("/")
        shape = replace(spec, id="", directory=nowhere, template=None, saved=None, freezable=False,
                        attached=None, disk_gb=0,
                        boot=BootParts("", nowhere, nowhere, nowhere, nowhere))
        none = argv.Descriptors(-1, -1, dict.fromkeys(LANES, -1))
        found = {"argv": argv.command_line(binary, shape, nowhere, none),
                 "program": programs.identity(binary)}
        if spec.runs_natively:  # then it is this computer's processor that the guest saw
            found["processor"] = processor()
        return found

    async def load(self, spec: MachineSpec) -> QemuMachine:
        """Take up a machine whose overlay exists."""
        machine = QemuMachine(spec)
        only_cd = spec.foreign is not None and spec.foreign.disk is None
        if not (spec.directory if only_cd else machine.overlay).exists():
            raise WrongState(f"there is no machine in {spec.directory}")
        return machine


class QemuMachine:
    """One QEMU process and its overlay. Implements `vmjob.machine.contract.Machine`."""

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self.overlay = spec.directory / "overlay.qcow2"
        self._status = Status.CREATED
        self._process: asyncio.subprocess.Process | None = None
        self._pidfd = -1
        self._monitor: Monitor | None = None
        self._console: Console | None = None
        self._asked_to_end = False
        self._ended: asyncio.Task[Ended] | None = None
        #: Held while a checkpoint is made: the guest is then let go on by who makes it.
        self._checkpointing = anyio.Lock()
        self._merging: asyncio.Future[None] | None = None
        self._forwards: Forwards | None = None
        self._display: Display | None = None
        self._media: Media | None = None
        self._attached: dict[str, Disk] = {}
        self._saver: saving.Saver | None = None
        self._traffic: Traffic | None = None

    # -- the contract --------------------------------------------------------------------------

    async def start(self) -> Mapping[str, socket.socket]:
        if self._status is not Status.CREATED:
            raise WrongState(f"the machine is {self._status}, not created")
        with contextlib.ExitStack() as files:
            source: frozen.Opened | saving.Opened | None = None
            if self.spec.saved is not None:
                from vmjob.machine.qemu import saving

                source = files.enter_context(saving.opened(self.spec.saved, self.spec.memory_mb))
            elif self.spec.template is not None:
                source = files.enter_context(
                    frozen.opened(self.spec.template, self.spec.memory_mb))
            return await self._start(source)

    async def _start(self, source: frozen.Opened | saving.Opened | None,
                     ) -> Mapping[str, socket.socket]:
        binary = programs.find(programs.system_binary())
        await self._look_at_disks()  # again: hours may have passed since it was made
        names = () if self._media else LANES
        ours: dict[str, socket.socket] = {}
        theirs: dict[str, socket.socket] = {}
        for name in ("monitor", "console", *names):
            ours[name], theirs[name] = socket.socketpair()
        try:
            if self.spec.network != "none":
                self._traffic = Traffic.opened()
            pipes = self._traffic.inherited if self._traffic else None
            fds = argv.Descriptors(theirs["monitor"].fileno(), theirs["console"].fileno(),
                                   {name: theirs[name].fileno() for name in names},
                                   source.memory if source else None,
                                   source.layers if source else (), pipes)
            inherited = [sock.fileno() for sock in theirs.values()] + list(pipes or ())
            if source:
                inherited += [fd for fd in (source.memory, *source.layers) if fd is not None]
            if isinstance(source, frozen.Opened):
                inherited.append(source.devices)
            command = argv.command_line(binary, self.spec, self.overlay, fds, self._media,
                                        self._attached)
            self._keep("argv.json", json.dumps(command, indent=1))
            await self._spawn(command, inherited)
            if self._traffic:
                self._traffic.given()
        except BaseException:
            for sock in ours.values():
                sock.close()
            if self._traffic:
                self._traffic.close()
            raise
        finally:
            for sock in theirs.values():
                sock.close()
        assert self._process is not None
        self._status = Status.RUNNING
        self._console = Console(ours["console"], self.spec.directory / "console.log")
        self._monitor = Monitor(self.spec.id, self._kill)
        self._ended = asyncio.get_running_loop().create_task(self._watch())
        lanes = {name: ours[name] for name in names}
        began = False
        try:
            await self._monitor.connect(ours["monitor"])
            began = True
            if isinstance(source, frozen.Opened):
                await self._thaw(source)
            elif source:
                await self._restore(source)
            await self.set_priority(self.spec.priority)
            if self.spec.display:
                self._display = await Display.opened(self._monitor, self.spec.directory)
        except Exception as error:
            for sock in lanes.values():
                sock.close()
            await asyncio.wait([self._ended], timeout=END_PATIENCE)
            ended = self._ended.result() if self._ended.done() else None
            await self.stop()
            if ended is not None and ended.reason is EndReason.KILLED:
                raise MachineDied(ended.detail, reason=str(ended.reason)) from error
            programs.version(binary)  # raises when that is what is wrong
            kind: type[MachineError] = MachineStartFailed
            if isinstance(source, frozen.Opened):
                kind = TemplateUnusable
            elif source and (began or "-blockdev" in self._messages()):
                kind = CheckpointUnusable  # QEMU works, but does not take this state, or this disk
            raise kind(f"QEMU did not start: {self._messages() or error}",
                       **self.facts()) from error
        except BaseException:
            for sock in lanes.values():
                sock.close()
            raise
        return lanes

    async def _thaw(self, template: frozen.Opened) -> None:
        """Load a template's state into the waiting QEMU; returns when the guest runs."""
        assert self._monitor is not None
        await self._monitor.execute("migrate-set-capabilities", capabilities=IGNORE_SHARED)
        await self._monitor.execute("migrate-incoming", uri=f"fd:{template.devices}")
        await self._before_its_end(self._monitor.resumed())
        if self.spec.disk_gb > TEMPLATE_DISK_GB:
            await self._monitor.execute("block_resize", **{
                "node-name": argv.DISK, "size": self.spec.disk_gb * GIB})

    async def _restore(self, saved: saving.Opened) -> None:
        """Load a checkpoint's state into the waiting QEMU; returns when the guest runs."""
        monitor = self._monitor
        assert monitor is not None
        from vmjob.machine.qemu import saving

        ours, theirs = socket.socketpair()
        feeding = asyncio.ensure_future(
            anyio.to_thread.run_sync(saving.feed, ours, saved.stream))
        try:
            with theirs:
                await monitor.execute("migrate-set-capabilities", capabilities=[
                    {"capability": "events", "state": True}])
                await monitor.pass_descriptor("checkpoint", theirs.fileno())
            await monitor.execute("migrate-incoming", uri="fd:checkpoint")
            await self._before_its_end(self._loaded(monitor))
            await feeding
        except BaseException as caught:
            if isinstance(caught, Exception) and self._ended is not None:
                await asyncio.wait([self._ended], timeout=END_PATIENCE)  # perhaps that is the cause
            self._asked_to_end = self._status is not Status.STOPPED
            self._kill()  # it takes what is fed no more: so the feeding ends, too
            with anyio.CancelScope(shield=True):
                await asyncio.wait([feeding])
            error = None if feeding.cancelled() else feeding.exception()  # now it was heard of
            if isinstance(caught, Exception) and error:
                raise error from None
            raise
        await monitor.execute("cont")

    async def _loaded(self, monitor: Monitor) -> None:
        if not await monitor.migration_reaches("completed", RESTORE_DEADLINE):
            raise MachineError("QEMU did not load the machine's state in time")

    async def checkpoint(self, directory: Path, name: str,
                         while_still: Callable[[], None]) -> Checkpoint:
        from vmjob.machine.qemu import saving

        monitor = self._running_monitor()
        disk = self._media.disk if self._media else None
        size = disk.size if disk else self.spec.disk_gb * GIB
        async with self._checkpointing:
            saver = self._saver = self._saver or saving.Saver(self.spec, self.overlay, size)
            await self._end_merging(patience=saving.MERGE_PATIENCE if saver.crowded else 0)
            try:
                return await unbroken(
                    saver.take(monitor, directory, name, while_still,
                               lambda: self._status is Status.SUSPENDED),
                    may_cancel=lambda: not saver.committed)
            finally:
                self._merging = asyncio.ensure_future(saver.merge(monitor, directory))

    async def _end_merging(self, patience: float = 0) -> None:
        """Give up a merging of disk layers that is not over by then; the next one does its work."""
        if self._merging is not None:
            await asyncio.wait([self._merging], timeout=patience)
            self._merging.cancel()
            await asyncio.gather(self._merging, return_exceptions=True)
            self._merging = None

    async def set_priority(self, priority: Priority) -> None:
        processors = await self._running_monitor().execute("query-cpus-fast")
        set_processor_priority([int(each["thread-id"]) for each in processors],
                               low=priority is Priority.LOW)

    async def forward(self, host_port: int, guest_port: int, *, remote: bool = False) -> int:
        monitor = self._running_monitor()
        if self.spec.network == "none":
            raise NotSupported("the machine has no network")
        self._forwards = self._forwards or Forwards(monitor)
        return await self._forwards.add(host_port, guest_port, remote=remote)

    async def unforward(self, host_port: int) -> None:
        self._running_monitor()
        if self._forwards:
            await self._forwards.remove(host_port)

    async def set_network(self, available: bool) -> None:
        monitor = self._running_monitor()
        if self.spec.network == "none":
            raise NotSupported("the machine has no network")
        await monitor.execute("set_link", name=argv.NETWORK, up=available)

    def traffic(self) -> tuple[int, int]:
        return self._traffic.bytes() if self._traffic else (0, 0)

    def console_address(self) -> ConsoleAddress:
        return self._running_display().address

    async def screenshot(self, path: Path) -> None:
        await self._running_display().screenshot(path)

    async def freeze(self) -> list[str]:
        if not self.spec.freezable:
            raise WrongState("the machine was not started to be frozen")
        monitor = self._running_monitor()
        try:
            await monitor.execute("migrate-set-capabilities", capabilities=IGNORE_SHARED)
            with (self.spec.directory / frozen.DEVICES).open("wb") as file:
                await monitor.pass_descriptor("devices", file.fileno())
                await monitor.execute("migrate", uri="fd:devices")
                await monitor.migrated()
        except MachineError:
            with anyio.move_on_after(1):  # a full disk ends QEMU: then that is the better story
                await self.ended()
            raise
        except OSError as error:
            raise HostDiskFull(f"cannot freeze the machine: {error.strerror}") from error
        self._asked_to_end = True
        with contextlib.suppress(MachineError):  # it may close the connection before it answers
            await monitor.execute("quit")  # not killed: the disk's tables are still to be written
        try:
            with anyio.fail_after(KILL_DEADLINE):
                await self.ended()
        except TimeoutError:
            raise MachineError("QEMU did not end after it wrote the machine's state") from None
        await anyio.to_thread.run_sync(frozen.dig_holes, self.spec.directory / frozen.MEMORY)
        await anyio.to_thread.run_sync(frozen.make_disk, self.spec.directory / frozen.BLANK,
                                       self.spec.disk_gb * GIB)
        return frozen.FILES

    async def suspend(self) -> None:
        if self._status is Status.SUSPENDED:
            return
        monitor = self._running_monitor()
        self._status = Status.SUSPENDED  # a checkpoint under way must not let it go on
        await monitor.execute("stop")

    async def resume(self) -> None:
        if self._status is Status.RUNNING:
            return
        monitor = self._running_monitor()
        async with self._checkpointing:
            await monitor.execute("cont")
            self._status = Status.RUNNING

    async def stop(self) -> None:
        if self._process is None or self._ended is None:
            if self._status is Status.CREATED:
                self._status = Status.STOPPED
            return
        self._asked_to_end = True
        await self._end_merging()
        # A throw-away machine has nothing to save; SIGKILL cannot be blocked or delayed.
        self._kill()
        with anyio.CancelScope(shield=True), anyio.fail_after(KILL_DEADLINE):
            await asyncio.shield(self._ended)

    async def destroy(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self.stop()
            finally:
                await anyio.to_thread.run_sync(remove_tree, self.spec.directory)
                self._status = Status.DESTROYED

    def get_status(self) -> Status:
        return self._status

    async def ended(self) -> Ended:
        if self._ended is None:
            raise WrongState("the machine was never started")
        return await asyncio.shield(self._ended)

    def console(self) -> str:
        return self._console.text() if self._console else ""

    def facts(self) -> dict[str, Any]:
        return {"hypervisor": "qemu", "version": self._monitor and self._monitor.version(),
                "accelerator": self.spec.accelerator,
                "cpu_model": argv.cpu_model(self.spec.accelerator, self.spec.cpu_model),
                "machine_type": argv.MACHINE.partition(",")[0],
                "started_from": "disk" if self.spec.foreign else (
                    "template" if self.spec.template else "image"),
                "memory_mb": self.spec.memory_mb, "cpus": self.spec.cpus,
                "disk_gb": self.spec.disk_gb, "network": self.spec.network}

    # -- inside ----------------------------------------------------------------------------------

    async def make_foreign_disks(self) -> None:
        """Make the overlays of what a user brings; raises `DiskUnusable`."""
        if self.spec.template is not None or self.spec.freezable:
            raise WrongState("a machine that boots its user's disk is no template, nor a copy")
        media = await self._look_at_disks()
        assert media is not None
        for disk, name in ((media.disk, self.overlay.name), (media.cache, argv.CACHE_FILE)):
            if disk is not None:
                await anyio.to_thread.run_sync(
                    frozen.make_disk, self.overlay.with_name(name), disk.size)

    async def make_disk_beside_attached(self) -> None:
        """Make the overlay of a machine that has disks of its user's besides."""
        if self.spec.template is not None or self.spec.freezable:
            raise WrongState("a machine with its user's disks is no template, nor a copy")
        await self._look_at_disks()
        await anyio.to_thread.run_sync(frozen.make_disk, self.overlay, self.spec.disk_gb * GIB)

    @property
    def logs(self) -> tuple[str, ...]:
        return "console.log", "qemu.log", "argv.json", "qmp.json"

    @property
    def worn(self) -> bool:
        return False

    @property
    def pid(self) -> int | None:
        """Process id of QEMU, while it runs."""
        return self._process.pid if self._process else None

    async def _before_its_end(self, event: Coroutine[Any, Any, None]) -> None:
        """Wait for something that QEMU may die instead of doing."""
        assert self._ended is not None
        waiting = asyncio.ensure_future(event)
        try:
            await asyncio.wait([waiting, self._ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if not waiting.done() or waiting.cancelled():
            raise MachineError("QEMU ended")
        waiting.result()

    def _running_monitor(self) -> Monitor:
        if self._monitor is None or self._status not in (Status.RUNNING, Status.SUSPENDED):
            raise WrongState(f"the machine is {self._status}, not running")
        return self._monitor

    async def _look_at_disks(self) -> Media | None:
        if self.spec.foreign is not None or self.spec.attached is not None:
            try:
                if self.spec.foreign is not None:
                    self._media = await anyio.to_thread.run_sync(look_at, self.spec.foreign)
                elif self.spec.attached is not None:
                    self._attached = await anyio.to_thread.run_sync(look_at_attached,
                                                                    self.spec.attached)
            except DiskUnusable as error:
                if self.spec.saved is None:
                    raise
                raise CheckpointUnusable(f"a checkpoint cannot be read: {error.message}") from error
        return self._media

    def _running_display(self) -> Display:
        self._running_monitor()
        if self._display is None:
            raise NotSupported("the machine has no display")
        return self._display

    def _kill(self) -> None:
        """End QEMU; not by asyncio's own way, which may reap it before the one who waits does."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _spawn(self, command: list[str], fds: list[int]) -> None:
        programs.find("setpriv")
        command = guarded(command, os.getpid(), drop_capabilities=os.geteuid() == 0)
        with (self.spec.directory / "qemu.log").open("wb") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds,
                    start_new_session=True)
            except OSError as error:
                raise MachineStartFailed(f"cannot start QEMU: {error.strerror}") from error
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            self._pidfd = os.pidfd_open(self._process.pid)

    async def _watch(self) -> Ended:
        """Wait for the process, settle the status, keep what a failure report needs."""
        assert self._process is not None
        assert self._monitor is not None
        assert self._console is not None
        code = await self._process.wait()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        await self._console.close()
        await self._monitor.close()
        if self._traffic:
            self._traffic.close()
        self._status = Status.STOPPED
        self._keep("qmp.json", json.dumps(list(self._monitor.transcript), indent=1))
        if self._monitor.out_of_space and not self._asked_to_end:
            return Ended(EndReason.NO_SPACE, "there was no room left for the machine's disk in "
                         f"{self.spec.directory}")
        return explain_end(self._asked_to_end, code, self._monitor.shutdown_reason,
                           self._console.text(), self._messages())

    def _messages(self) -> str:
        """What QEMU itself printed."""
        try:
            data = (self.spec.directory / "qemu.log").read_bytes()
        except OSError:
            return ""
        return data[-STDERR_SHOWN:].decode("utf-8", "replace").strip()

    def _keep(self, name: str, text: str) -> None:
        try:
            Path(self.spec.directory / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise HostDiskFull(f"cannot write {name}: {error.strerror}") from error


def explain_end(asked: bool, code: int, reason: str | None, console: str, messages: str) -> Ended:
    """Why a machine's process ended, from all that is known about it."""
    if asked:
        return Ended(EndReason.ASKED, "the machine was stopped")
    # A machine that may restart can have done so after a panic, and ended well.
    if code == 0 and reason == "guest-shutdown":
        return Ended(EndReason.POWERED_OFF, "the machine switched itself off")
    if "Kernel panic" in console:
        line = console[console.index("Kernel panic"):].partition("\n")[0]
        return Ended(EndReason.PANIC, f"the machine's kernel gave up: {line[:200]}")
    if reason == "guest-reset":
        said = [line for line in console.splitlines() if "vmjob-init:" in line]
        cause = said[-1].partition("vmjob-init:")[2].strip() if said else "it restarted itself"
        return Ended(EndReason.RESET, f"the machine ended: {cause[:200]}")
    if code == 0 and reason == "host-signal":
        return Ended(EndReason.KILLED, "somebody told QEMU to end, as happens when this computer "
                     "is switched off")
    if code == -signal.SIGKILL:
        return Ended(EndReason.KILLED, "QEMU was killed (signal 9): by somebody, or because this "
                     "computer was out of memory")
    how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    return Ended(EndReason.CRASHED, f"QEMU {how}" + (f": {messages}" if messages else ""))
