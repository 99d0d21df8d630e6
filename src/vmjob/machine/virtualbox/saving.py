"""Checkpoints: a snapshot of VirtualBox's, its files kept where no machine changes them.

    NAME.sav              memory and devices
    NAME.disk             what was written to the disk since the checkpoint before (a VDI)
    NAME-N.disk           more of that: of before the first, or of one that failed
    NAME-merged.disk      older layers laid together, when there are many
    root, cd              of the machine's image, the same for all
    attached-disk...      what its user brought besides, likewise

A snapshot puts a new layer on the disk, and the one below is never written again: it gets a further
name in the checkpoints' directory. VirtualBox's own way, to delete a snapshot, writes older layers
into one another while the machine runs; a power cut then costs all of them. So layers are laid
together beside, and VirtualBox is not told.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import anyio.to_thread
import msgspec

from vmjob.errors import (
    CheckpointFailed,
    CheckpointNewer,
    CheckpointUnusable,
    DiskUnusable,
    HostDiskFull,
    MachineError,
)
from vmjob.machine.contract import Checkpoint, MachineSpec, Saved
from vmjob.machine.links import link_attached, link_or_copy
from vmjob.machine.virtualbox import definition, media
from vmjob.machine.virtualbox.manage import SAVE_DEADLINE, Manage
from vmjob.machine.virtualbox.standing import Standing
from vmjob.machine.virtualbox.vdi import HEAD_SIZE, Header, lay_together, read_header

__all__ = ["MOST_LAYERS", "Saver", "State", "opened"]

#: Layers that a checkpoint may consist of before older ones are laid together.
MOST_LAYERS = 8
SAVED, DISK, CD, ROOT = ".sav", ".disk", "cd", "root"
#: Snapshots of one process; VirtualBox refuses the 251st (``SETTINGS_SNAPSHOT_DEPTH_MAX``).
MOST_SNAPSHOTS = 100
#: Bytes of layers that no checkpoint needs any more and the process keeps.
MOST_LEFT = 512 << 20
#: Version of `State`.
FORMAT = 1


class State(msgspec.Struct, frozen=True):
    """A checkpoint's files, by their names in its directory; ``layers`` from the lowest up.

    ``version`` is VirtualBox's, in full: what it saved is loaded by no other one for sure.
    ``attached``: what the machine has of its user's besides, by the fields of `Attached`.
    """

    format: int
    version: str
    saved: str
    layers: list[str]
    root: str
    cd: str
    #: None: nothing; so said those who knew of one disk only.
    attached: dict[str, str] | None = None

    def files(self) -> tuple[str, ...]:
        return (self.saved, *self.layers, self.root, self.cd, *(self.attached or {}).values())


class Saver:
    """Makes the checkpoints of one machine; ``layers`` are those of its disk, the lowest first.

    The topmost is the one that the machine writes to. Its state is written within ``hurried``.
    """

    def __init__(self, spec: MachineSpec, manage: Manage, layers: Sequence[Path], version: str,
                 hurried: Callable[[], AbstractContextManager[None]]) -> None:
        self._spec = spec
        self._manage = manage
        self._version = version
        self._hurried = hurried
        self._layers = list(layers)
        #: Names in the checkpoints' directory of what lies below the topmost, the lowest first.
        self._kept: list[str] = []
        if spec.saved is not None:
            self._kept = [str(name) for name in spec.saved.state["layers"]]
        #: How many of the layers those hold.
        self._covered = len(self._kept)
        self._snapshots = spec.directory / definition.NAME / "Snapshots"
        #: How many layers it began with: others' too, perhaps copied.
        self._first = len(self._layers)

    @property
    def worn(self) -> bool:
        """Whether this process of VirtualBox has had so many snapshots that a new one is due.

        None of them is ever deleted: what a checkpoint no longer needs (its name there is gone)
        stays until the process ends.
        """
        own = self._layers[self._first - 1:-1]
        looks = [each.stat() for each in own]
        left = sum(look.st_blocks * 512 for look in looks if look.st_nlink == 1)
        return len(own) >= MOST_SNAPSHOTS or left > MOST_LEFT

    async def take(self, directory: Path, name: str, while_still: Callable[[], None],
                   standing: Standing) -> Checkpoint:
        """See `vmjob.machine.contract.Machine.checkpoint`."""
        if not directory.is_dir() or any(directory.glob(f"{name}[.-]*")):
            raise CheckpointFailed(f"a checkpoint {name} cannot be made in {directory}")
        began = time.monotonic()
        before = set(self._snapshots.glob("*.sav"))
        try:
            try:
                with self._hurried():
                    await standing.hold()
                    while_still()
                    await self._manage.run("snapshot", definition.NAME, "take", name,
                                           deadline=SAVE_DEADLINE)
            finally:
                await standing.let_go()
        except MachineError as error:
            raise CheckpointFailed(f"VirtualBox made no snapshot: {error.message}") from error
        stood = time.monotonic() - began
        try:
            return await anyio.to_thread.run_sync(self._keep, directory, name, stood, before)
        except (OSError, DiskUnusable, MachineError) as error:
            for each in directory.glob(f"{name}[.-]*"):
                each.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise HostDiskFull(f"no room for a checkpoint: {error.strerror}") from error
            raise CheckpointFailed(f"a checkpoint could not be kept: {error}") from error

    def _keep(self, directory: Path, name: str, stood: float, before: set[Path]) -> Checkpoint:
        # From now on it writes to another, whatever becomes of this checkpoint.
        self._layers += self._new_layers()
        kept = list(self._kept)
        for number, each in enumerate(self._layers[self._covered:-1]):
            kept.append(f"{name}-{number}{DISK}" if number else name + DISK)
            link_or_copy(each, directory / kept[-1])
        # Its state, whose other name is of no use: VirtualBox is not to load it here. Those of
        # snapshots that failed belong to other layers.
        try:
            saved, = set(self._snapshots.glob("*.sav")) - before
        except ValueError:
            raise MachineError("VirtualBox kept no state of the machine, or several") from None
        saved.rename(directory / (name + SAVED))
        for each in before:
            each.unlink(missing_ok=True)
        if len(kept) > MOST_LAYERS:
            kept = _merged(directory, name, kept)
        spec = self._spec
        if spec.boot is not None:  # else it goes on from a checkpoint that has it
            link_or_copy(spec.boot.root, directory / ROOT)
        link_or_copy(spec.directory / media.BOOT_CD, directory / CD)
        attached = link_attached(spec.attached, directory)
        state = State(FORMAT, self._version, name + SAVED, kept, ROOT, CD, attached)
        self._kept, self._covered = kept, len(self._layers) - 1
        written = (directory / state.saved).stat().st_size
        return Checkpoint(state.files(), msgspec.to_builtins(state), stood, written)

    def _new_layers(self) -> list[Path]:
        """The layers that VirtualBox has made since: one, and one for each snapshot that failed."""
        known = {path.name for path in self._layers}
        lying_on = {_header(path).below: path for path in self._snapshots.glob("*.vdi")
                    if path.name not in known}
        found: list[Path] = []
        top = _header(self._layers[-1]).own
        while (above := lying_on.pop(top, None)) is not None:
            found.append(above)
            top = _header(above).own
        if not found:
            raise MachineError("VirtualBox laid no layer on the machine's disk")
        return found


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        return read_header(file.read(HEAD_SIZE))


def _merged(directory: Path, name: str, layers: Sequence[str]) -> list[str]:
    """Lay all but the newest together; the names that are left."""
    merged = f"{name}-merged{DISK}"
    try:
        lay_together([directory / each for each in layers[:-1]], directory / merged)
    except DiskUnusable as error:
        raise OSError(f"{error.message}") from error
    return [merged, layers[-1]]


def opened(saved: Saved, version: str) -> State:
    """What a checkpoint is made of, all of it there; ``version`` is VirtualBox's here.

    Raises `CheckpointUnusable`, `CheckpointNewer`.
    """
    said = saved.state.get("format")
    if isinstance(said, int) and said > FORMAT:
        raise CheckpointNewer(f"a checkpoint in {saved.directory} was made by a newer vmjob")
    try:
        state = msgspec.convert(dict(saved.state), State)
    except msgspec.ValidationError as error:
        raise CheckpointUnusable(f"a checkpoint that cannot be understood: {error}") from error
    if state.format != FORMAT or any("/" in name for name in state.files()) or not state.layers:
        raise CheckpointUnusable("a checkpoint that is not one of VirtualBox's machines")
    if state.version != version:
        raise CheckpointUnusable(f"a checkpoint of VirtualBox {state.version}; this is {version}, "
                                 "which may not load it")
    missing = [name for name in state.files() if not (saved.directory / name).is_file()]
    if missing:
        raise CheckpointUnusable(f"a checkpoint lacks {', '.join(missing)}")
    return state
