"""From what a user asks for to what a machine needs: the image found, an accelerator chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import anyio.to_thread

from vmjob.errors import HostMemoryLow, MachineError
from vmjob.home import Home
from vmjob.host.facts import memory_total
from vmjob.image.recipe import DEFAULT_NAME, Recipe
from vmjob.image.store import Image, ImageStore
from vmjob.machine.contract import BootParts, MachineSpec
from vmjob.machine.qemu import accelerators

__all__ = ["doubt", "machine_shape"]

MIB = 1 << 20


async def machine_shape(home: Home, image: str, accel: str, *, memory_mb: int, cpus: int,
                        disk_gb: int, network: str, cpu: str,
                        progress: Callable[[float, str], None] | None = None,
                        allowed: Collection[str] | None = None) -> tuple[MachineSpec, Image, str]:
    """What a QEMU machine from ``image`` needs; the default image is built when it is missing.

    Returns the shape (id and directory still open), the image and why this accelerator was
    chosen. ``cpu`` as in `MachineSpec.cpu_model`; ``allowed``: the accelerators that may be used,
    None: all. Raises `ImageMissing`, `ImageCorrupt`,
    `ImageBuildFailed`, `AcceleratorUnusable`, `HostMemoryLow`.
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
    proof = await accelerators.choose(home, accel, boot, allowed)
    shape = MachineSpec(id="", directory=home.root, boot=boot, memory_mb=memory_mb, cpus=cpus,
                        disk_gb=disk_gb, network=network, accelerator=proof.accelerator,
                        cpu_model=cpu)
    return shape, found, proof.why


def doubt(home: Home, shape: MachineSpec, error: Mapping[str, Any] | None) -> None:
    """Learn from how a machine ended: its accelerator is proved again if that may be the cause.

    ``error``: the form that `VmjobError.as_dict` gives.
    """
    if error is not None and error["code"] in {kind.code for kind in MachineError.__subclasses__()}:
        accelerators.doubt(home, shape.accelerator, error["message"])


def _unheard(fraction: float, text: str) -> None:
    """Progress that nobody asked for."""
