"""A machine's disks and CD, as files in its directory and as what VirtualBox is told of them.

    boot.iso        starts the image's kernel
    root.vmdk       describes the image's root, which stays where it is; never written
    exchange        what long pieces of the lanes go over; exchange.vmdk describes it
    layer-0.vdi     the writable disk's start; then one layer for each template, checkpoint or
    layer-N.vdi     machine that lies on it. Only the topmost is written
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio.to_thread

from vmjob.errors import (
    DiskUnusable,
    HomeUnusable,
    HostDiskFull,
    HypervisorRefused,
    ImageOutdated,
)
from vmjob.guest.agent.trunk import EXCHANGE_SIZE
from vmjob.image.iso import write_iso
from vmjob.machine.contract import BootParts, Foreign, MachineSpec
from vmjob.machine.disks import CD_HEAD, HEAD, check_cd, format_of
from vmjob.machine.links import link_or_copy
from vmjob.machine.virtualbox import definition
from vmjob.machine.virtualbox.definition import Medium
from vmjob.machine.virtualbox.lanes import make_exchange
from vmjob.machine.virtualbox.manage import Manage
from vmjob.machine.virtualbox.scratch import make_scratch

__all__ = ["BOOT_CD", "EXCHANGE", "attach_foreign", "attach_image", "layer", "layers_in",
           "link_layers", "make_first", "new_layer"]

GIB = 1 << 30
#: What VirtualBox says of a disk whose parent it does not know. On a busy computer, about once in
#: 30 times, its answer to the parent's `showmediuminfo` takes 10 seconds, and is not kept.
FORGOTTEN, TRIES = "is not found in the media registry", 3
BOOT_CD, EXCHANGE = "boot.iso", "exchange"
#: The same in every machine: a layer names what it lies on.
ROOT_UUID = uuid.UUID("766d6a6f-6200-4000-8000-000000000010")
EXCHANGE_UUID = uuid.UUID("766d6a6f-6200-4000-8000-000000000011")

ATTACHED_UUID = uuid.UUID("766d6a6f-6200-4000-8000-000000000012")
ATTACHED_UUIDS = {"disk": ATTACHED_UUID,
                  "iso": uuid.UUID("766d6a6f-6200-4000-8000-000000000013"),
                  "cache_disk": uuid.UUID("766d6a6f-6200-4000-8000-000000000014")}


def layer(directory: Path, number: int) -> Path:
    """The path of a layer of the writable disk."""
    return directory / f"layer-{number}.vdi"


def layers_in(directory: Path) -> list[Path]:
    """The layers of a machine's writable disk, the lowest first."""
    found: list[Path] = []
    while (path := layer(directory, len(found))).exists():
        found.append(path)
    return found


def make_first(spec: MachineSpec, boot: BootParts) -> None:
    """Make what a machine has that boots: its CD, and an empty writable disk; blocks.

    Raises `ImageOutdated`, `ImageCorrupt`, `HostDiskFull`.
    """
    if boot.loader is None:
        raise ImageOutdated("the image was built by an older vmjob, for QEMU only: it has no boot "
                            "loader")
    write_iso(spec.directory / BOOT_CD, boot.loader, boot.kernel, boot.initrd,
              definition.kernel_arguments(spec))
    try:
        make_scratch(boot.scratch, layer(spec.directory, 0), spec.disk_gb * GIB, uuid.uuid4())
    except OSError as error:
        raise HostDiskFull(f"cannot make a machine's disk: {error.strerror}") from error


async def attach_image(manage: Manage, spec: MachineSpec, boot: BootParts,
                       layers: Sequence[Path]) -> None:
    """Give a machine its disks and its CD; ``layers`` are of its disk, known to VirtualBox.

    Raises `HostDiskFull`, `DiskUnusable`, `HomeUnusable`.
    """
    directory = spec.directory
    try:
        make_exchange(directory / EXCHANGE)
        _describe(directory / "root.vmdk", boot.root, boot.root.stat().st_size, ROOT_UUID)
        _describe(directory / "exchange.vmdk", directory / EXCHANGE, EXCHANGE_SIZE, EXCHANGE_UUID)
    except OSError as error:
        raise HostDiskFull(f"cannot make a machine's disks: {error.strerror}") from error
    except ValueError as error:
        raise HomeUnusable(f"VirtualBox can use no file there: {error} ({directory}, "
                           f"{boot.root})") from error
    scsi = definition.SCSI
    for medium in (
            # What its guest writes there goes to a layer that VirtualBox makes.
            Medium(scsi, definition.ROOT_PLACE, "hdd", str(directory / "root.vmdk"), "immutable"),
            Medium(scsi, definition.SCRATCH_PLACE, "hdd", str(layers[-1])),
            # Not part of snapshots, which would give it a layer that we do not read.
            Medium(scsi, definition.EXCHANGE_PLACE, "hdd", str(directory / "exchange.vmdk"),
                   "writethrough"),
            Medium(definition.IDE, 0, "dvddrive", str(directory / BOOT_CD))):
        await _asked(manage, layers if medium.path == str(layers[-1]) else (),
                     *definition.attach(medium))
    for part, path in (spec.attached.parts() if spec.attached else {}).items():
        await _attach_beside(manage, directory, part, path)


async def _attach_beside(manage: Manage, directory: Path, part: str, disk: Path) -> None:
    """A disk of its user's besides the others; a VDI as the file that it is, as with QEMU."""
    path, kind = await anyio.to_thread.run_sync(_look_at, disk)
    place = definition.ATTACHED_PLACES.get((part, kind))
    if place is None:
        raise DiskUnusable(f"{disk} is no image of a CD") if part == "iso" else _unknown(disk, kind)
    described = directory / f"attached-{part}.vmdk"
    try:
        _describe(described, path, path.stat().st_size, ATTACHED_UUIDS[part])
    except (OSError, ValueError) as error:
        raise DiskUnusable(f"{disk} cannot be used: {error}") from error
    await manage.run(*definition.attach(Medium(
        definition.SCSI, place, "hdd", str(described), "immutable")))


async def attach_foreign(manage: Manage, directory: Path, foreign: Foreign) -> None:
    """Give a machine the disks and the CD that its user brings; none of them is written.

    Raises `DiskUnusable`.
    """
    disks = [each for each in (foreign.disk, foreign.cache_disk) if each is not None]
    for place, disk in enumerate(disks):
        below = await anyio.to_thread.run_sync(_opened, disk, directory / f"disk-{place}.vmdk",
                                               place)
        top = directory / f"foreign-{place}.vdi"
        try:
            await _lay(manage, top, [below])
        except HypervisorRefused as error:  # one that is silent says nothing of the disk
            raise DiskUnusable(f"{disk} cannot be used by VirtualBox: {error.message}") from error
        await _asked(manage, [below, top], *definition.attach(
            Medium(definition.SATA, place, "hdd", str(top))))
    if foreign.iso is not None:
        path = await anyio.to_thread.run_sync(_cd, foreign.iso)
        await manage.run(*definition.attach(
            Medium(definition.IDE, 0, "dvddrive", str(path))))


def _look_at(disk: Path) -> tuple[Path, str]:
    """Where a user's disk really is, and its format; raises `DiskUnusable`."""
    path, head = _beginning(disk, HEAD)
    with _named(disk):
        return path, format_of(head)


def _cd(image: Path) -> Path:
    """Where a user's image of a CD really is; raises `DiskUnusable`."""
    path, head = _beginning(image, CD_HEAD)
    with _named(image):
        check_cd(head)
    return path


def _beginning(disk: Path, size: int) -> tuple[Path, bytes]:
    try:
        path = disk.resolve(strict=True)
        if not path.is_file():
            raise DiskUnusable(f"{disk} is not a file")
        with path.open("rb") as file:
            return path, file.read(size)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise DiskUnusable(f"{disk} cannot be read: "
                           f"{getattr(error, 'strerror', error)}") from error


@contextlib.contextmanager
def _named(disk: Path) -> Iterator[None]:
    try:
        yield
    except DiskUnusable as error:
        raise DiskUnusable(f"{disk} {error.message}") from None


def _unknown(disk: Path, kind: str) -> DiskUnusable:
    return DiskUnusable(f"{disk} is a {kind} image, which VirtualBox does not know",
                        advice="`qemu-img convert -O vdi OLD NEW` makes one that it does.")


def _opened(disk: Path, description: Path, number: int) -> Path:
    """What VirtualBox is to open for a disk: a VDI itself, or a description of raw content."""
    path, kind = _look_at(disk)
    if kind == "vdi":
        return path
    if kind != "raw":
        raise _unknown(disk, kind)
    try:
        _describe(description, path, path.stat().st_size, uuid.uuid5(ATTACHED_UUID, str(number)))
    except (OSError, ValueError) as error:
        raise DiskUnusable(f"{disk} cannot be used: {error}") from error
    return description


def _describe(path: Path, content: Path, size: int, own: uuid.UUID) -> None:
    path.write_text(definition.flat_disk(str(content), size, own), encoding="utf-8")


async def new_layer(manage: Manage, directory: Path, below: Sequence[Path]) -> Path:
    """Lay a layer on others, the lowest first; VirtualBox knows all of them then."""
    made = layer(directory, len(below))
    await _lay(manage, made, below)
    return made


async def _lay(manage: Manage, made: Path, below: Sequence[Path]) -> None:
    await _make_known(manage, below)
    await _asked(manage, below, "createmedium", "disk", "--filename", str(made), "--diffparent",
                 str(below[-1]), "--format", "VDI")


async def _make_known(manage: Manage, layers: Sequence[Path]) -> None:
    """Let VirtualBox open layers, the lowest first: it looks for no parent by itself."""
    for count, each in enumerate(layers):
        await _asked(manage, layers[:count], "showmediuminfo", "disk", str(each))


async def _asked(manage: Manage, layers: Sequence[Path], *words: str) -> None:
    """Ask for something that needs these layers, which VirtualBox may have forgotten."""
    for _ in range(TRIES - 1):
        try:
            await manage.run(*words)
        except HypervisorRefused as error:
            if FORGOTTEN not in str(error.context.get("text")):
                raise
        else:
            return
        await _make_known(manage, layers)
    await manage.run(*words)


def link_layers(sources: Sequence[Path], directory: Path) -> list[Path]:
    """Further names for layers, in a machine's directory: whoever has them may remove theirs."""
    made = []
    for number, source in enumerate(sources):
        target = layer(directory, number)
        link_or_copy(source, target)
        made.append(target)
    return made
