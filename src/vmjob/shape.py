"""From what a user asks for to what a machine needs: the image found, a hypervisor chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from vmjob.errors import AcceleratorUnusable, HostMemoryLow, MachineError, UsageError, VmjobError
from vmjob.home import Home
from vmjob.host.facts import memory_total
from vmjob.image.recipe import DEFAULT_NAME, Recipe
from vmjob.image.store import Image, ImageStore
from vmjob.machine import proofs
from vmjob.machine.contract import NATIVE, BootParts, Driver, MachineSpec
from vmjob.machine.proofs import Proof
from vmjob.machine.qemu import accelerators
from vmjob.machine.virtualbox.device import why_not as virtualbox_why_not

__all__ = ["ACCELERATORS", "HYPERVISORS", "Shape", "choose", "doubt", "machine_shape"]

MIB = 1 << 20
#: The accelerators of each hypervisor; each belongs to one.
HYPERVISORS = {"qemu": ("kvm", "hvf", "whpx", "tcg"), "virtualbox": ("hm", "interpreter")}
ACCELERATORS = tuple(name for names in HYPERVISORS.values() for name in names)


@dataclass(frozen=True)
class Shape:
    """What a machine is to be: its driver, its spec (id and directory still open), its image.

    ``why``: how its hypervisor and accelerator were chosen.
    """

    driver: Driver
    spec: MachineSpec
    image: Image
    why: str


async def machine_shape(home: Home, image: str, accel: str, *, memory_mb: int, cpus: int,
                        disk_gb: int, network: str, cpu: str, hypervisor: str = "auto",
                        progress: Callable[[float, str], None] | None = None,
                        allowed: Collection[str] | None = None) -> Shape:
    """What a machine from ``image`` needs; the default image is built when it is missing.

    ``hypervisor`` is ``auto``, ``qemu`` or ``virtualbox``, ``accel`` ``auto`` or one of theirs.
    ``cpu`` as in `MachineSpec.cpu_model`; ``allowed``: the accelerators that may be used,
    None: all. Raises `ImageMissing`, `ImageCorrupt`, `ImageBuildFailed`, `AcceleratorUnusable`,
    `HostMemoryLow`, `ProgramMissing`, `UsageError`.
    """
    if memory_mb * MIB > (total := memory_total()):
        raise HostMemoryLow(f"the machine is to have {memory_mb} MiB of memory; this computer has "
                            f"{total // MIB}")

    def find() -> Image:
        store = ImageStore(home)
        if image == DEFAULT_NAME:
            store.ensure(Recipe(), progress or _unheard)
        return store.verified(image)

    found = await anyio.to_thread.run_sync(find)
    boot = BootParts.of(found)
    proof = await _choose(home, hypervisor, accel, boot, allowed)
    spec = MachineSpec(id="", directory=home.root, boot=boot, memory_mb=memory_mb, cpus=cpus,
                       disk_gb=disk_gb, network=network, accelerator=proof.accelerator,
                       cpu_model=cpu)
    return Shape(_driver(proof.accelerator), spec, found, proof.why)


async def choose(home: Home, boot: BootParts) -> Proof:
    """What a machine gets that asks for nothing; raises what `machine_shape` raises."""
    return await _choose(home, "auto", "auto", boot, None)


async def _choose(home: Home, hypervisor: str, accel: str, boot: BootParts,
                  allowed: Collection[str] | None) -> Proof:
    """The accelerator, and with it the hypervisor.

    The fastest that is proved: the processor's own virtualization with QEMU, then with VirtualBox,
    then QEMU's emulation. VirtualBox's interpreter, 40 times slower than that, only by its name;
    and a VirtualBox whose version cannot keep machines after QEMU's emulation: a job that is slow
    and survives comes to its end.
    """
    if hypervisor not in ("auto", *HYPERVISORS):
        raise UsageError(f"{hypervisor!r} is not a hypervisor: use auto, qemu or virtualbox")
    if accel != "auto":
        owner = next((name for name, own in HYPERVISORS.items() if accel in own), None)
        if owner is None or hypervisor not in ("auto", owner):
            raise UsageError(f"{accel!r} is not an accelerator of "
                             + ("any hypervisor" if owner is None else hypervisor))
        hypervisor = owner
    if hypervisor == "virtualbox":
        return await _in_virtualbox(home, "hm" if accel == "auto" else accel, allowed)
    if hypervisor == "qemu":
        return await accelerators.choose(home, accel, boot, allowed)
    try:
        best = await accelerators.choose(home, "auto", boot, allowed)
        missing: VmjobError | None = None
        if best.accelerator in NATIVE:
            return best
    except VmjobError as error:  # no QEMU, or nothing of it that may be used
        best, missing = None, error
    if best is not None and virtualbox_why_not():
        return best  # without loading what knows VirtualBox: 40 ms of each start
    try:
        native = await _in_virtualbox(home, "hm", allowed)
    except VmjobError:
        if best is not None:
            return best
        assert missing is not None
        raise missing from None
    keeps = _driver(native.accelerator).capabilities.checkpoint
    return native if best is None or keeps else best


async def _in_virtualbox(home: Home, accel: str, allowed: Collection[str] | None) -> Proof:
    """The proof that VirtualBox works; raises where it does not."""
    from vmjob.machine.virtualbox.accelerators import prove

    if allowed is not None and accel not in allowed:
        raise AcceleratorUnusable(f"{accel} is not allowed here",
                                  advice=f"What is allowed: {', '.join(sorted(allowed)) or '-'}")
    proof = await prove(home, accel)
    if not proof.works:
        raise AcceleratorUnusable(
            f"VirtualBox does not work here: {proof.why}",
            advice="`vmjob doctor` tells more. --accel interpreter needs nothing, and is slow.")
    return proof


def _driver(accelerator: str) -> Driver:
    """The driver whose accelerator that is."""
    if accelerator in HYPERVISORS["virtualbox"]:
        from vmjob.machine.virtualbox.driver import VirtualBoxDriver

        return VirtualBoxDriver()
    from vmjob.machine.qemu.driver import QemuDriver

    return QemuDriver()


def doubt(home: Home, shape: MachineSpec, error: Mapping[str, Any] | None) -> None:
    """Learn from how a machine ended: its accelerator is proved again if that may be the cause.

    ``error``: the form that `VmjobError.as_dict` gives.
    """
    if error is not None and error["code"] in {kind.code for kind in MachineError.__subclasses__()}:
        proofs.doubt(proofs.place(home, shape.accelerator), error["message"])


def _unheard(fraction: float, text: str) -> None:
    """Progress that nobody asked for."""
