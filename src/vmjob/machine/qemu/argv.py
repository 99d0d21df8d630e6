"""QEMU's command line, built by pure functions from data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmjob.errors import UsageError
from vmjob.guest.agent.wire import LANES, PORT_PREFIX
from vmjob.machine.contract import BootParts, MachineSpec
from vmjob.machine.qemu.foreign import Disk, Media

__all__ = ["CACHE_FILE", "DISK", "MACHINE", "MEMORY_FILE", "NETWORK", "Descriptors", "command_line",
           "cpu_model", "kernel_arguments", "layer", "machine_type", "overlay_command"]

#: Kernel parameters of every machine. ``panic=-1`` restarts at once, which ends the machine;
#: leaving out self-tests and idle serial ports saves 0.3 s of a 1.6 s boot under TCG (measured).
KERNEL_ARGUMENTS = ("console=ttyS0", "quiet", "panic=-1", "cryptomgr.notests", "audit=0",
                    "random.trust_cpu=on", "8250.nr_uarts=1", "no_timer_check", "nowatchdog",
                    "psi=0")

#: Under TCG only. QEMU keeps translated code by virtual address, so every program that is loaded at
#: a new random address is translated anew: starting /bin/true takes 23 ms with address
#: randomization and 4 ms without (measured). An emulated processor does not speculate, so the
#: kernel's mitigations cost time and protect nothing.
#: See docs/decisions/002-guest-address-randomization.md.
#: The watchdog of the time stamp counter, which is QEMU's own clock, wakes an idle machine twice a
#: second.
#: Zeroing what the kernel allocates for itself, and asking security modules that have no policy,
#: cost 2 to 8 % of a command (docs/decisions/008-guest-hardening.md).
TCG_KERNEL_ARGUMENTS = ("norandmaps", "mitigations=off", "tsc=reliable", "init_on_alloc=0",
                        "lsm=landlock,yama")

#: The same with a display, where messages are to be seen; the last console is the kernel's own.
DISPLAY_KERNEL_ARGUMENTS = ("console=tty0", *(word for word in KERNEL_ARGUMENTS if word != "quiet"),
                            "vmjob.display")

#: q35 without what no job needs. microvm boots 0.4 s faster, but 3 of 8 boots of Debian's kernel
#: hung under TCG (docs/decisions/001-machine-type.md).
MACHINE = "q35,usb=off,vmport=off,smbus=off,sata=off,graphics=off"
#: A screen whose memory (MiB) is enough for 1920 x 1080, and no picture of it can be larger. Who
#: may look is said when QEMU runs (`vmjob.machine.qemu.display`); until then nobody may.
DISPLAY = ("-device", "VGA,vgamem_mb=8", "-vnc", "none,password=on")

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

#: Host CPU for hardware accelerators; for TCG everything it can emulate, except ``rep movsb``
#: being announced as fast: TCG runs it byte by byte, and copies are 3 times slower (measured). And
#: except SMAP and a fifth level of page tables, which make looking up a page dearer: 5 % of a
#: command (docs/decisions/008-guest-hardening.md).
CPU_MODELS = {"tcg": "max,erms=off,fsrm=off,la57=off,smap=off", "kvm": "host", "hvf": "host",
              "whpx": "max"}

#: QEMU's name for the machine's network.
NETWORK = "net0"
#: Node name of the machine's writable disk, of a second one, of a CD, and of the first of a user's
#: disks in a machine that boots an image.
DISK = "scratch"
CACHE = "cache"
CD = "cd"
ATTACHED = "attached"
#: Programs of a Linux before 2013 ask the kernel for the time in a way that Debian's lets be a
#: fault by default.
ATTACHED_KERNEL_ARGUMENTS = ("vsyscall=xonly",)
#: The guest's memory, in the directory of a machine that is to be frozen.
MEMORY_FILE = "memory"
#: What is written to a foreign machine's second disk, likewise.
CACHE_FILE = "cache.qcow2"


#: What every x86 computer since 2009 has, to the letter: programs that choose their code by the
#: processor's flags choose the same everywhere (docs/explanation/processors.md). QEMU's model lacks
#: RDTSCP, which the processor had and GROMACS refuses to run without.
CPU_BASELINE = "Nehalem-v1,+rdtscp"
_CPU_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(,[+-]?[a-z0-9._-]+(=[a-z0-9._-]+)?)*")
_MACHINE_TYPE = re.compile(r"pc-q35-[0-9.]{1,12}")


@dataclass(frozen=True)
class Descriptors:
    """Numbers of the descriptors that QEMU inherits: one end of a socket pair each."""

    monitor: int
    console: int
    lanes: Mapping[str, int]
    #: Of the template that the machine is a copy of: its memory.
    template_memory: int | None = None
    #: The read-only layers of the machine's disk above the image's, lowest first.
    layers: tuple[int, ...] = ()
    #: Where QEMU writes what passes the network's cable: from the guest, to the guest.
    traffic: tuple[int, int] | None = None


def cpu_model(accelerator: str, wanted: str) -> str:
    """QEMU's name for a processor; raises `UsageError` for what cannot be one."""
    if wanted == "baseline":
        return CPU_BASELINE
    if wanted == "host":
        return CPU_MODELS[accelerator]
    if not _CPU_MODEL.fullmatch(wanted):
        raise UsageError(f"{wanted!r} is not a processor model",
                         advice="Use host, baseline or a name that `qemu-system-x86_64 -cpu help` "
                                "lists.")
    return wanted


def machine_type(spec: MachineSpec) -> str:
    """QEMU's machine; one that continues from a checkpoint is of the version that it had there."""
    name, *options = MACHINE.split(",")
    if spec.saved is not None:
        name = str(spec.saved.state["machine_type"])
        if not _MACHINE_TYPE.fullmatch(name):
            raise ValueError("a checkpoint of a machine of an unknown type")
    needed = {"graphics=off": spec.display, "sata=off": spec.foreign is not None}
    return ",".join((name, *(word for word in options if not needed.get(word))))


def kernel_arguments(spec: MachineSpec) -> str:
    """The guest kernel's command line."""
    network = ("vmjob.net=nat",) if spec.network == "nat" else ()
    emulated = TCG_KERNEL_ARGUMENTS if spec.accelerator == "tcg" else ()
    common = DISPLAY_KERNEL_ARGUMENTS if spec.display else KERNEL_ARGUMENTS
    old = ATTACHED_KERNEL_ARGUMENTS if spec.attached is not None else ()
    return " ".join((*common, *emulated, *network, *old))


def layer(name: str, path: str, driver: str, *, read_only: bool,
          backing: str | None = None) -> list[dict[str, Any]]:
    """A layer of a disk as the options of its two nodes: the file, and the format on it."""
    # A machine's disk need not survive the machine; what a checkpoint needs of it is synced then.
    common: dict[str, Any] = {"read-only": read_only, "cache": {"direct": False, "no-flush": True}}
    if not read_only:
        common["discard"] = "unmap"
    file = {"driver": "file", "filename": path, "node-name": f"{name}-file", **common}
    node = {"driver": driver, "node-name": name, "file": f"{name}-file", **common}
    if driver == "qcow2":
        node["backing"] = backing
    return [file, node]


def _layer(name: str, path: str, driver: str, *, read_only: bool,
           backing: str | None = None) -> list[str]:
    """JSON, because a path may hold commas, blanks and any letter."""
    nodes = layer(name, path, driver, read_only=read_only, backing=backing)
    return [word for node in nodes for word in ("-blockdev", json.dumps(node))]


def _device(name: str) -> list[str]:
    return ["-device", f"virtio-blk-pci,drive={name},id={name}-disk"]


def _disks(boot: BootParts, overlay: Path, fds: Descriptors) -> list[str]:
    """The image's root, and the machine's disk: an overlay on the image's or on a template's."""
    return [*_layer("root", str(boot.root), "raw", read_only=True), *_device("root"),
            *_writable(str(boot.scratch), "qcow2", overlay, fds), *_device(DISK)]


def _writable(base: str, kind: str, overlay: Path, fds: Descriptors) -> list[str]:
    """The machine's own disk, from the lowest layer to the one that the guest writes to.

    The layers are named here and not taken from the files: what is opened is what was checked.
    """
    layers = _layer("base", base, kind, read_only=True)
    below = "base"
    for number, fd in enumerate(fds.layers):
        name = f"layer{number}"
        layers += _layer(name, f"/proc/self/fd/{fd}", "qcow2", read_only=True, backing=below)
        below = name
    return [*layers, *_layer(DISK, str(overlay), "qcow2", read_only=False, backing=below)]


def _attached(disks: Mapping[str, Disk]) -> list[str]:
    """A user's disks besides the machine's own, by the fields of `Attached`.

    A VDI is given to the guest as it is: QEMU's driver for it would forbid checkpoints. After all
    others, so that they are what they are without these.
    """
    words: list[str] = []
    for part, disk in disks.items():
        name = f"{ATTACHED}-{part}"
        driver, shown = ("raw", "vdi") if disk.format == "vdi" else (disk.format, "raw")
        words += [*_layer(name, str(disk.path), driver, read_only=True), "-device",
                  f"virtio-blk-pci,drive={name},id={name}-disk,serial=vmjob-{part}-{shown}"]
    return words


def _foreign(media: Media, overlay: Path, fds: Descriptors) -> list[str]:
    """The disks that a user brought, where a PC has them: at the controller of the chipset.

    It may restart itself as a PC may.
    """
    words: list[str] = []
    # The BIOS takes the second when it cannot start from the first.
    order = (1, 0) if media.iso_first else (0, 1)
    if media.disk:
        words += [*_writable(str(media.disk.path), media.disk.format, overlay, fds),
                  "-device", f"ide-hd,drive={DISK},id={DISK}-disk,bus=ide.0,bootindex={order[0]}"]
    if media.cache:
        below = f"{CACHE}-base"
        words += [*_layer(below, str(media.cache.path), media.cache.format, read_only=True),
                  *_layer(CACHE, str(overlay.with_name(CACHE_FILE)), "qcow2", read_only=False,
                          backing=below),
                  "-device", f"ide-hd,drive={CACHE},id={CACHE}-disk,bus=ide.1"]
    if media.iso:
        words += [*_layer(CD, str(media.iso.path), "raw", read_only=True),
                  "-device", f"ide-cd,drive={CD},id={CD}-disk,bus=ide.2,bootindex={order[1]}"]
    return words


def _memory(spec: MachineSpec, overlay: Path, fds: Descriptors) -> tuple[str, list[str]]:
    """The guest's memory: more of the machine's options, and its backend if it has one.

    That of a template is its file; a copy maps it privately and copies a page when it writes it.
    """
    if fds.template_memory is not None:
        path, share = f"/proc/self/fd/{fds.template_memory}", False
    elif spec.freezable:
        path, share = str(overlay.with_name(MEMORY_FILE)), True
    else:
        return "", []
    backend = {"qom-type": "memory-backend-file", "id": "memory", "mem-path": path, "share": share,
               "size": spec.memory_mb << 20}
    return ",memory-backend=memory", ["-object", json.dumps(backend)]


def _lane(name: str, fd: int) -> list[str]:
    return ["-chardev", f"socket,id=lane-{name},fd={fd}",
            "-device", f"virtserialport,chardev=lane-{name},name={PORT_PREFIX}{name}"]


def _kernel(boot: BootParts, spec: MachineSpec) -> list[str]:
    """What a copy of a frozen machine has in its memory already; loading it again takes 5 ms."""
    if spec.template is not None or spec.saved is not None:
        return []
    return ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd),
            "-append", kernel_arguments(spec)]


def _network(spec: MachineSpec, fds: Descriptors) -> list[str]:
    if spec.network == "none":
        return ["-nic", "none"]
    # Systems that know no virtio know this card: it is VirtualBox's, too.
    card = "e1000" if spec.foreign else "virtio-net-pci"
    words = ["-netdev", f"user,id={NETWORK},ipv6=off",
             "-device", f"{card},netdev={NETWORK},romfile="]
    # A queue is named as the card sees it from the cable's other end.
    for queue, fd in zip(("rx", "tx"), fds.traffic or (), strict=False):
        words += ["-object", (f"filter-dump,id=count-{queue},netdev={NETWORK},queue={queue},"
                             f"file=/proc/self/fd/{fd},maxlen=1")]
    return words


def command_line(binary: str, spec: MachineSpec, overlay: Path, fds: Descriptors,
                 media: Media | None = None,
                 attached: Mapping[str, Disk] | None = None) -> list[str]:
    """The whole command line of a machine; ``media`` of one that boots what its user brings.

    ``attached``: the disks of its user's that it has besides its own.
    """
    accelerator = "tcg,thread=multi" if spec.accelerator == "tcg" else spec.accelerator
    option, backend = _memory(spec, overlay, fds)
    return [
        binary, "-name", f"vmjob-{spec.id}",
        "-nodefaults", "-no-user-config", "-display", "none",
        "-sandbox", SANDBOX,
        "-machine", machine_type(spec) + option, *backend, "-accel", accelerator,
        "-cpu", cpu_model(spec.accelerator, spec.cpu_model),
        "-smp", str(spec.cpus), "-m", f"{spec.memory_mb}M",
        "-chardev", f"socket,id=monitor,fd={fds.monitor}",
        "-mon", "chardev=monitor,mode=control",
        "-chardev", f"socket,id=console,fd={fds.console}", "-serial", "chardev:console",
        *(_foreign(media, overlay, fds) if media else _own(spec, overlay, fds)),
        *_attached(attached or {}),
        "-object", "rng-random,id=rng0,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=rng0",
        *_network(spec, fds),
        *(DISPLAY if spec.display else ()),
        *(["-incoming", "defer"] if spec.template or spec.saved else []),
    ]


def _own(spec: MachineSpec, overlay: Path, fds: Descriptors) -> list[str]:
    """What a machine has that boots from an image: its kernel, disks and lanes."""
    if spec.boot is None:
        raise ValueError("a QEMU machine needs an image")
    return ["-no-reboot", *_kernel(spec.boot, spec), *_disks(spec.boot, overlay, fds),
            "-device", "virtio-serial-pci,max_ports=8",
            *(word for name in LANES for word in _lane(name, fds.lanes[name]))]


def overlay_command(binary: str, overlay: Path, size: int) -> list[str]:
    """Make a thin writable disk of so many bytes; what it lies on is said when it is used."""
    return [binary, "create", "-q", "-f", "qcow2", str(overlay), str(size)]
