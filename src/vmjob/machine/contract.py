"""What a driver is: the code for one hypervisor, as the engine sees it.

The same contract in words, with the order of calls and what each may assume, is
``docs/reference/driver-contract.md``. One test suite (``tests/contract``) holds
every driver to it. Differences between hypervisors are data (`Capabilities`):
nobody asks "is it QEMU?".
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vmjob.image.store import Image

__all__ = ["ATTACHED_PARTS", "Attached", "BootParts", "Capabilities", "Checkpoint",
           "ConsoleAddress", "Driver", "Ended", "EndReason", "Foreign", "Machine", "MachineSpec",
           "Priority", "Saved", "Status", "TEMPLATE_DISK_GB"]


#: Largest disk of a template's machine, GiB. A copy that is to have a larger one is grown by its
#: driver after the start; growing the file system to this size takes 80 ms under TCG, which is
#: spent once per template.
TEMPLATE_DISK_GB = 10


#: Accelerators that are no emulation.
NATIVE = frozenset({"kvm", "hvf", "whpx", "hm"})
#: How much longer everything takes with an accelerator than with QEMU's emulation; 1 for others.
#: VirtualBox's interpreter boots Debian's kernel in 60 to 110 s, QEMU in 2 (measured).
SLOWNESS = {"interpreter": 40.0}


class Status(enum.StrEnum):
    """Where a machine is in its life."""

    CREATED = "created"  # made, not started; costs disk only
    RUNNING = "running"
    SUSPENDED = "suspended"  # stands still; keeps its memory, uses no CPU
    STOPPED = "stopped"  # its process is gone, its directory is not
    DESTROYED = "destroyed"  # nothing is left of it


class EndReason(enum.StrEnum):
    """Why a machine's process ended."""

    ASKED = "asked"  # `Machine.stop` or `Machine.destroy`
    POWERED_OFF = "powered-off"  # the guest switched itself off
    PANIC = "panic"  # the guest's kernel gave up
    RESET = "reset"  # the guest restarted itself, which ends a machine (its agent died)
    NO_SPACE = "no-space"  # this computer had no room left for the machine's disk
    KILLED = "killed"  # somebody killed the hypervisor, this computer out of memory for one
    CRASHED = "crashed"  # the hypervisor failed


@dataclass(frozen=True)
class Ended:
    """The end of a machine; ``detail`` is a sentence for the user."""

    reason: EndReason
    detail: str


@dataclass(frozen=True)
class Capabilities:
    """What a driver can do, as plain data.

    ``suspend``: a machine can stand still and go on in the same process.
    ``checkpoint``: memory, devices and disk can be kept and continued in a new process.
    ``networks``: values of `MachineSpec.network` that it can give.
    ``console``: the guest's console output is kept.
    ``templates``: a machine can be frozen and others started as its copies.
    ``isolated``: the guest cannot reach the host but through its lanes; false for the fake,
    whose jobs are processes of this computer.
    ``growing``: the disk of a copy can be larger than its template's.
    ``own_addresses``: a copy's network card can be given an address of its own; where it cannot,
    all copies have the same one, each on a network of its own.
    ``display``: a machine can have a screen.
    ``foreign``: a machine can boot a disk of its user's.
    ``forwards``: ports of this computer can lead to a machine with a network.
    ``kept_foreign``: formats of the disk (`Foreign.disk`) with which a machine that boots it can be
    kept in checkpoints without a copy of the disk, where there is no second one.
    ``attached``: a machine can have disks of its user's besides its own.
    ``folders``: the guest on a disk of its user's can mount directories of this computer by itself.
    ``floppy``: it can have a floppy disk.
    """

    suspend: bool
    checkpoint: bool
    networks: frozenset[str]
    console: bool
    templates: bool
    isolated: bool
    own_addresses: bool = True
    growing: bool = True
    display: bool = False
    foreign: bool = False
    forwards: bool = False
    attached: bool = False
    kept_foreign: frozenset[str] = frozenset()
    folders: bool = False
    floppy: bool = False


@dataclass(frozen=True)
class BootParts:
    """The parts of an image that a machine boots from; none is ever written.

    ``digest`` changes when any of them does.
    """

    digest: str
    kernel: Path
    initrd: Path
    root: Path
    scratch: Path
    #: Where kernel and ramdisk are started from a CD; None in images that have none.
    loader: Path | None = None

    @classmethod
    def of(cls, image: Image) -> BootParts:
        """The parts of an image of the store, where they really are.

        A checkpoint gives them further names, which a symbolic link cannot have.
        """
        kernel, initrd, root, scratch = (part.resolve() for part in (
            image.kernel, image.initrd, image.root, image.scratch))
        return cls(image.digest, kernel, initrd, root, scratch,
                   image.loader and image.loader.resolve())


@dataclass(frozen=True)
class Foreign:
    """What a machine boots from instead of an image: there is no agent in it, and no lane to it.

    Files of this computer, never written: what the guest writes goes to the machine's directory and
    is lost with it. ``disk``: a raw, qcow2 or VDI image that needs no other file; ``iso``: a CD,
    which is booted where there is no disk, or ``iso_first``. ``cache_disk``: a second disk. It
    starts as a PC does, by its BIOS; `MachineSpec.disk_gb` means nothing for it.

    ``folders``: names under which its guest can mount directories of this computer with what it
    has for that hypervisor, and whether it may write there. They are `MachineSpec.folder`; the
    caller makes them. A guest makes no links there, but anything else. ``floppy``: there is a
    floppy disk of 1.44 MB, whose content is `MachineSpec.floppy` and is written as it is.
    """

    disk: Path | None = None
    iso: Path | None = None
    iso_first: bool = False
    cache_disk: Path | None = None
    folders: Mapping[str, bool] = field(default_factory=dict)
    floppy: bool = False


@dataclass(frozen=True)
class Attached:
    """What a machine that boots an image has of its user's besides, only to be read.

    Images as in `Foreign`. The guest knows each by its serial number, ``vmjob-FIELD-vdi`` where it
    sees a VDI as it is, in which it finds the disk by itself, and ``vmjob-FIELD-raw`` where it sees
    the disk. A CD is a disk like the others; what the guest would write goes to its own disk.
    """

    disk: Path
    iso: Path | None = None
    cache_disk: Path | None = None

    def parts(self) -> dict[str, Path]:
        """Those that there are, by their fields' names."""
        return {name: path for name in ATTACHED_PARTS
                if (path := getattr(self, name)) is not None}


#: Fields of `Attached`.
ATTACHED_PARTS = ("disk", "iso", "cache_disk")


@dataclass(frozen=True)
class Checkpoint:
    """What `Machine.checkpoint` has made.

    ``files``: the names of all files in the checkpoint directory that it needs, new ones and ones
    of earlier checkpoints; none of them is ever changed again. ``state``: what `Saved.state` is to
    be, JSON-compatible. ``still_seconds``: how long the guest stood still. ``written_bytes``: of
    new files, those that the machine's own disk writes filled not counted.
    """

    files: tuple[str, ...]
    state: dict[str, Any]
    still_seconds: float
    written_bytes: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint to start from: its directory and its `Checkpoint.state`."""

    directory: Path
    state: Mapping[str, Any]


@dataclass(frozen=True)
class ConsoleAddress:
    """Where a VNC viewer of this computer finds a machine's screen and keyboard.

    ``password`` is new for each process of a machine and has 8 characters: VNC's own authentication
    looks at no more, and encrypts nothing else. So ``host`` is always loopback.
    """

    host: str
    port: int
    password: str


class Priority(enum.StrEnum):
    """How much of a busy computer a machine may take from others."""

    LOW = "low"  # what nobody else wants
    NORMAL = "normal"  # as much as any program


@dataclass(frozen=True)
class MachineSpec:
    """What a machine is to be.

    ``directory`` exists, is empty (but for `folder` and `floppy`) and belongs to this machine
    alone; everything the driver writes is below it. ``memory_mb`` in MiB, ``disk_gb`` in GiB (the
    most that the machine's disk writes may take). ``network`` is ``none`` or ``nat``.
    ``accelerator`` is one
    that was proved to work; ``cpu_model`` is ``host`` (whatever is fastest with
    that accelerator), ``baseline`` (one fixed model, so that programs give the same answers
    everywhere) or a model that the hypervisor knows. ``display``: it has a screen and a keyboard;
    the guest's kernel writes there, too, and the job may (``/dev/tty1``). ``foreign``: it boots
    that and not ``boot``; it can be neither a template nor a copy of one. ``attached``: what a
    machine that boots an image has of its user's besides; it can be neither of these two, either.

    ``template``: the directory of a frozen machine of which this one is a copy. ``freezable``: it
    is to become such a template itself (see `Machine.freeze`). ``saved``: it continues from there;
    ``boot`` is then not needed.
    """

    id: str
    directory: Path
    boot: BootParts | None
    memory_mb: int = 512
    cpus: int = 1
    disk_gb: int = 10
    network: str = "none"
    accelerator: str = "tcg"
    cpu_model: str = "host"
    display: bool = False
    foreign: Foreign | None = None
    attached: Attached | None = None
    template: Path | None = None
    freezable: bool = False
    saved: Saved | None = None
    priority: Priority = Priority.LOW
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs_natively(self) -> bool:
        """Whether the guest's code runs on this computer's own processor, whose kind it sees."""
        return self.accelerator in NATIVE

    def folder(self, name: str) -> Path:
        """One of `Foreign.folders` on this computer."""
        return self.directory / "folders" / name

    @property
    def floppy(self) -> Path:
        """The file of `Foreign.floppy`; the caller makes it."""
        return self.directory / "floppy.img"

    @property
    def slowness(self) -> float:
        """By how much a deadline is to be longer that was chosen for QEMU's emulation."""
        return SLOWNESS.get(self.accelerator, 1.0)


class Machine(Protocol):
    """One machine. Calls come one at a time, except `ended`, `console` and `get_status`."""

    @property
    def spec(self) -> MachineSpec: ...

    @property
    def pid(self) -> int | None:
        """The process that the guest runs in, once it was started; None where it has none."""
        ...

    @property
    def logs(self) -> tuple[str, ...]:
        """Files of its directory that tell what happened to it, as relative paths.

        The one with the guest's console is called ``console.log``. Any may be missing.
        """
        ...

    async def start(self) -> Mapping[str, socket.socket]:
        """Begin to run; returns the host's end of each lane (the caller closes them).

        A machine that boots what its user brings (`MachineSpec.foreign`) has no lanes: `ended` and
        `console` are all that is heard of it.

        Returns when the machine has *begun*; it is ready when the agent answers. Raises
        `MachineStartFailed`, `ProgramMissing`, `QemuTooOld`, `HostDiskFull`, `TemplateUnusable`,
        `CheckpointUnusable`.
        """
        ...

    async def suspend(self) -> None:
        """Stand still. A machine that already does is left alone."""
        ...

    async def resume(self) -> None:
        """Go on after `suspend`. A machine that runs is left alone."""
        ...

    async def checkpoint(self, directory: Path, name: str,
                         while_still: Callable[[], None]) -> Checkpoint:
        """Keep memory, devices and disk as they are at one instant, and go on.

        ``directory`` is the same for all checkpoints of a machine and of those that continue from
        them, on the same file system as the machine's own; ``name`` is new and begins the names of
        all new files. ``while_still`` is called at that instant, while the guest stands still; what
        the caller notes then belongs to the checkpoint. New files are complete when this returns,
        but not yet safe on the disk. A suspended machine stays suspended.

        When it fails, the machine goes on and earlier checkpoints stay good. Raises
        `CheckpointFailed`, `HostDiskFull`; `NotSupported` where there are none.
        """
        ...

    @property
    def worn(self) -> bool:
        """Whether its checkpoints have left behind what only a new process is rid of.

        Who can lets its end follow on a checkpoint then, and goes on from that.
        """
        ...

    async def set_priority(self, priority: Priority) -> None:
        """Change how much of a busy computer the machine may take; not kept by a checkpoint."""
        ...

    async def freeze(self) -> list[str]:
        """Keep a ``freezable`` machine as it is now and end its process.

        Returns the names of the files in its directory that a template consists of; together,
        under their names in any one directory, they are a `MachineSpec.template`. `NotSupported`
        where there are no templates.
        """
        ...

    async def forward(self, host_port: int, guest_port: int, *, remote: bool = False) -> int:
        """Let a TCP port of this computer lead to one of the guest; returns this computer's.

        ``host_port`` 0: any that is free. It can be reached from this computer only (127.0.0.1),
        with ``remote`` at all its IPv4 addresses. It lasts as long as the machine's process or
        until `unforward`; a checkpoint does not keep it, so who continues from one asks again.

        Raises `PortTaken` when another program has it, or this user may not; `NotSupported` for a
        machine without a network.
        """
        ...

    async def unforward(self, host_port: int) -> None:
        """Take back a port; connections that there are go on. One that leads nowhere is fine."""
        ...

    async def set_network(self, available: bool) -> None:
        """Plug the network's cable in, or pull it: then nothing passes, forwards included.

        It is plugged in when a machine starts; who continues from a checkpoint says it again.
        Raises `NotSupported` for a machine without a network.
        """
        ...

    def traffic(self) -> tuple[int, int]:
        """Bytes that the guest has sent, and those that it was sent, since this process's start.

        Of the cable, packets' headers included; 0 where nobody counts. May be called at any time.
        """
        ...

    def console_address(self) -> ConsoleAddress:
        """Where its screen can be seen while it runs.

        Raises `WrongState` when it does not run, `NotSupported` for a machine without a display.
        """
        ...

    async def screenshot(self, path: Path) -> None:
        """Write what is on its screen now to ``path``, a PNG file, all or nothing.

        Also while it stands still. At most 32 MiB, whatever the guest does. Raises `NotSupported`
        for a machine without a display, `MachineError`, `HostDiskFull`.
        """
        ...

    async def stop(self) -> None:
        """End the machine's process now. A machine that is not running is left alone."""
        ...

    async def destroy(self) -> None:
        """`stop`, and remove everything. Idempotent, and never fails half-way."""
        ...

    def get_status(self) -> Status:
        """Where it is in its life."""
        ...

    async def ended(self) -> Ended:
        """Wait until the machine's process has ended, and say why."""
        ...

    def console(self) -> str:
        """The last of the guest's console output, decoded leniently; '' where not kept."""
        ...

    def facts(self) -> dict[str, Any]:
        """JSON-compatible facts for the job's record: hypervisor, version, accelerator, CPU."""
        ...


class Driver(Protocol):
    """The code for one hypervisor."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    async def create(self, spec: MachineSpec) -> Machine:
        """Make a machine from an image, a template or a checkpoint; nothing runs yet.

        Raises as `Machine.start` does; `DiskUnusable` for what `MachineSpec.foreign` and
        `MachineSpec.attached` name;
        `NotSupported` for what `Capabilities` does not have.
        """
        ...

    def identity(self, spec: MachineSpec) -> dict[str, Any]:
        """Everything of the hypervisor and of ``spec`` that a template depends on, as JSON.

        A template made under one identity is never used under another.
        """
        ...

    async def load(self, spec: MachineSpec) -> Machine:
        """Take up a machine that `create` made in ``spec.directory``, in a new process of ours."""
        ...
