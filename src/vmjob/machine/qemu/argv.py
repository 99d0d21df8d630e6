"""QEMU's command line, built by pure functions from data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmjob.guest.agent.wire import LANES, PORT_PREFIX
from vmjob.machine.contract import MachineSpec

__all__ = ["Descriptors", "command_line", "kernel_arguments", "overlay_command"]

#: Kernel parameters of every machine. ``panic=-1`` restarts at once, which ends the machine;
#: leaving out self-tests and idle serial ports saves 0.3 s of a 1.6 s boot under TCG (measured).
KERNEL_ARGUMENTS = ("console=ttyS0", "quiet", "panic=-1", "cryptomgr.notests", "audit=0",
                    "random.trust_cpu=on", "8250.nr_uarts=1", "no_timer_check")

#: Under TCG only. QEMU keeps translated code by virtual address, so every program that is loaded at
#: a new random address is translated anew: starting /bin/true takes 23 ms with address
#: randomization and 4 ms without (measured). An emulated processor does not speculate, so the
#: kernel's mitigations cost time and protect nothing.
#: See docs/decisions/002-guest-address-randomization.md.
TCG_KERNEL_ARGUMENTS = ("norandmaps", "mitigations=off")

#: q35 without what no job needs. microvm boots 0.4 s faster, but 3 of 8 boots of Debian's kernel
#: hung under TCG (docs/decisions/001-machine-type.md).
MACHINE = "q35,usb=off,vmport=off,smbus=off,sata=off,graphics=off"

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

#: Host CPU for hardware accelerators; for TCG everything it can emulate, except ``rep movsb``
#: being announced as fast: TCG runs it byte by byte, and copies are 3 times slower (measured).
CPU_MODELS = {"tcg": "max,erms=off,fsrm=off", "kvm": "host", "hvf": "host", "whpx": "max"}

@dataclass(frozen=True)
class Descriptors:
    """Numbers of the descriptors that QEMU inherits: one end of a socket pair each."""

    monitor: int
    console: int
    lanes: Mapping[str, int]


def kernel_arguments(spec: MachineSpec) -> str:
    """The guest kernel's command line."""
    network = ("vmjob.net=nat",) if spec.network == "nat" else ()
    emulated = TCG_KERNEL_ARGUMENTS if spec.accelerator == "tcg" else ()
    return " ".join((*KERNEL_ARGUMENTS, *emulated, *network))


def _json(**content: Any) -> str:
    return json.dumps({key.replace("_", "-"): value for key, value in content.items()})


def _disk(name: str, path: Path, driver: str, *, read_only: bool) -> list[str]:
    """A block device; JSON, because a path may hold commas, blanks and any letter."""
    cache = {"direct": False, "no-flush": True}  # a machine's disk need not survive the machine
    file = {"driver": "file", "filename": str(path), "node-name": f"{name}-file",
            "read-only": read_only, "cache": cache}
    if not read_only:
        file["discard"] = "unmap"
    return ["-blockdev", json.dumps(file),
            "-blockdev", json.dumps({"driver": driver, "node-name": name, "file": f"{name}-file",
                                     "read-only": read_only, "cache": cache}
                                    | ({} if read_only else {"discard": "unmap"})),
            "-device", f"virtio-blk-pci,drive={name},id={name}-disk"]


def _lane(name: str, fd: int) -> list[str]:
    return ["-chardev", f"socket,id=lane-{name},fd={fd}",
            "-device", f"virtserialport,chardev=lane-{name},name={PORT_PREFIX}{name}"]


def _network(kind: str) -> list[str]:
    if kind == "none":
        return ["-nic", "none"]
    return ["-netdev", "user,id=net0,ipv6=off", "-device", "virtio-net-pci,netdev=net0,romfile="]


def command_line(binary: str, spec: MachineSpec, overlay: Path, fds: Descriptors) -> list[str]:
    """The whole command line of a machine that boots from its image."""
    if spec.boot is None:
        raise ValueError("a QEMU machine needs an image")
    accelerator = "tcg,thread=multi" if spec.accelerator == "tcg" else spec.accelerator
    lanes = [word for name in LANES for word in _lane(name, fds.lanes[name])]
    return [
        binary, "-name", f"vmjob-{spec.id}",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", SANDBOX,
        "-machine", MACHINE, "-accel", accelerator,
        "-cpu", spec.cpu_model or CPU_MODELS[spec.accelerator],
        "-smp", str(spec.cpus), "-m", f"{spec.memory_mb}M",
        "-chardev", f"socket,id=monitor,fd={fds.monitor}",
        "-mon", "chardev=monitor,mode=control",
        "-chardev", f"socket,id=console,fd={fds.console}", "-serial", "chardev:console",
        "-kernel", str(spec.boot.kernel), "-initrd", str(spec.boot.initrd),
        "-append", kernel_arguments(spec),
        *_disk("root", spec.boot.root, "raw", read_only=True),
        *_disk("scratch", overlay, "qcow2", read_only=False),
        "-device", "virtio-serial-pci,max_ports=8",
        *lanes,
        "-object", "rng-random,id=rng0,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=rng0",
        *_network(spec.network),
    ]


def overlay_command(binary: str, base: Path, overlay: Path, size_gb: int) -> list[str]:
    """Make the thin writable disk of one machine on the image's, at least as large as that."""
    backing = _json(driver="qcow2", file={"driver": "file", "filename": str(base)})
    return [binary, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"json:{backing}",
            str(overlay), f"{size_gb}G"]
