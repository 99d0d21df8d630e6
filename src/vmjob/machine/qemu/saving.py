"""Checkpoints of a QEMU machine: taken while it runs, and opened again.

    root, base, memory, layer0...   of the image and the template: links, or copies where the
                                    checkpoint is on another file system
    base, cd                        of what the user brought instead, likewise; in place of a VDI,
                                    whose content is then in the lowest layer, an empty disk
    attached-disk...                of what the user brought besides, likewise
    NAME.pages, NAME.index          memory (see `pages`)
    NAME.devices                    the state of all devices
    NAME.disk, NAME.merged          layers of the machine's disk: one per checkpoint; several
                                    become one when there are many (see `merging`)

How the memory is written while the guest runs is in `taking`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from vmjob.errors import (
    CheckpointFailed,
    CheckpointNewer,
    CheckpointUnusable,
    HostDiskFull,
    MachineError,
    NotSupported,
)
from vmjob.host.priority import lower_disk_priority
from vmjob.machine.contract import (
    Attached,
    BootParts,
    Checkpoint,
    Foreign,
    MachineSpec,
    Saved,
)
from vmjob.machine.links import attached_in, link_attached, link_or_copy
from vmjob.machine.qemu import argv, frozen, merging
from vmjob.machine.qemu import foreign as media
from vmjob.machine.qemu.monitor import Monitor
from vmjob.machine.qemu.pages import PageTable, read_index
from vmjob.machine.qemu.stream import write
from vmjob.machine.qemu.taking import Devices, Missed, Taking

__all__ = ["Opened", "Saver", "opened"]

#: Raise this when a checkpoint cannot be read by an older vmjob.
FORMAT = 1

#: Seconds after which a thread of Python lets another one run, while a checkpoint is made.
SWITCH = 0.0005
#: Seconds for which a checkpoint waits for a merging when there are far too many layers.
MERGE_PATIENCE = 20.0
#: The template's layer of the disk, and the end of the names of merged ones.
TEMPLATE_LAYER = "layer0"
MERGED = ".merged"


class _State(msgspec.Struct):
    """`Checkpoint.state`: names in the checkpoint directory; layers lowest first.

    ``root`` is None for a machine that booted from its user's disk; ``cd`` and ``cd_first`` are of
    such a one. ``attached``: what the machine has of its user's besides, by `Attached`'s fields.
    """

    format: int
    machine_type: str
    root: str | None
    base: str
    memory: str | None
    layers: list[str]
    pages: list[str]
    index: str
    devices: str
    cd: str | None = None
    cd_first: bool = False
    #: None: nothing; so said those who knew of one disk only.
    attached: dict[str, str] | None = None

    def files(self) -> tuple[str, ...]:
        fixed = [name for name in (self.root, self.base, self.cd, self.memory) if name]
        return (*fixed, *(self.attached or {}).values(), *self.layers, *self.pages, self.index,
                self.devices)


class Saver:
    """Takes the checkpoints of one machine, one at a time."""

    def __init__(self, spec: MachineSpec, overlay: Path, disk_bytes: int) -> None:
        self._spec = spec
        self._disk_bytes = disk_bytes
        self._state: _State | None = None
        self._table: PageTable | None = None
        #: The node and file that the guest writes to; layers below it that are not in the
        #: checkpoint directory yet.
        self._active = (argv.DISK, overlay)
        self._disks = 0
        #: Whether the checkpoint under way has changed the disk: then it must not be left halfway.
        self.committed = False
        self._left: list[Path] = []
        #: A merged layer that is not there yet either: whoever tidies up does not know it.
        self._merged: Path | None = None
        #: The node that the lowest layer lies on.
        self._lowest: str | None = "base"
        #: Node of each layer by name, while QEMU knows it.
        self._nodes: dict[str, str] = {}
        if spec.saved is not None:
            self._state = _state(spec.saved)
            try:
                self._table = read_index(spec.saved.directory / self._state.index)
            except (OSError, ValueError) as error:
                raise CheckpointUnusable(f"a checkpoint cannot be read: {error}") from error
            self._nodes = {name: f"layer{n}" for n, name in enumerate(self._state.layers)}

    async def take(self, monitor: Monitor, directory: Path, name: str,
                   while_still: Callable[[], None],
                   suspended: Callable[[], bool]) -> Checkpoint:
        """See `vmjob.machine.contract.Machine.checkpoint`.

        ``suspended`` tells, at any time, whether the guest is to stand still afterwards.
        """
        self.committed = False
        try:
            if any(directory.glob(f"{name}.*")):
                raise CheckpointFailed(f"there is a checkpoint of the name {name} already")
            base = self._state
            if base is None:
                await self._let_go_of_vdi(monitor)
                base = await anyio.to_thread.run_sync(self._link_base, directory)
            # Not by the checkpoint's name: when it fails too late, its disk is in use all the same.
            self._disks += 1
            node = f"disk{self._disks}"
            disk = (node, self._spec.directory / f"{node}.qcow2")
            await self._add_disk(monitor, *disk)
            before = monitor.stood_still
            with _quick_threads():
                try:
                    taking = await self._caught_up(monitor, directory, name, base.memory, suspended)
                    try:
                        self.committed = True
                        await self._add_layer(monitor, *disk)
                        while_still()
                        table, devices, machine_type = await taking.finish()
                    finally:
                        await taking.end()
                finally:
                    if self._active != disk:
                        await _remove_disk(monitor, *disk)
            still = monitor.stood_still - before
            keep = functools.partial(self._keep, directory, name, base, table, devices,
                                     machine_type, still, taking.written_bytes)
            return await anyio.to_thread.run_sync(keep)
        except OSError as error:
            raise _failed(error) from error
        except CheckpointFailed:
            raise
        except MachineError as error:
            raise CheckpointFailed(f"no checkpoint was made: {error.message}") from error

    async def _caught_up(self, monitor: Monitor, directory: Path, name: str, memory: str | None,
                         suspended: Callable[[], bool]) -> Taking:
        """All memory but the last changes is written, and the guest stands still."""
        for live in (True, False):
            taking = Taking(monitor, directory, name, self._table,
                            directory / memory if memory else None, suspended)
            try:
                await taking.catch_up(live=live)
            except Missed:
                await taking.end()
            except BaseException:
                await taking.end()
                raise
            else:
                return taking
        raise CheckpointFailed("QEMU looked for changed memory twice while the guest stood still")

    @property
    def crowded(self) -> bool:
        """Whether there are so many layers that a checkpoint had better wait for their merging."""
        return self._state is not None and len(self._state.layers) > 2 * merging.MAX_LAYERS

    async def merge(self, monitor: Monitor, directory: Path) -> None:
        """Make fewer layers of many; the next checkpoint is then made of those.

        Cancelling it is safe. Raises `MachineError`, `OSError`.
        """
        state = self._state
        if state is None or self._left or self._merged is not None:
            return
        added = [name for name in state.layers if name != TEMPLATE_LAYER]
        first = merging.first_to_merge([(directory / name).stat().st_blocks for name in added])
        if first is None:
            return
        old = added[first:]
        rest = state.layers[:state.layers.index(old[0])]
        merged = f"{Path(old[-1]).stem}{MERGED}"
        made = self._spec.directory / f"{merged}.qcow2"
        node = f"merged-{Path(old[-1]).stem}"
        await merging.merge(monitor, [self._nodes[name] for name in old],
                            self._nodes[rest[-1]] if rest else self._lowest, self._active,
                            (node, made),
                            self._disk_bytes)
        self._merged = made
        for name in old:
            del self._nodes[name]
        self._nodes[merged] = node
        self._state = _replaced(state, layers=[*rest, merged])

    async def _add_layer(self, monitor: Monitor, node: str, path: Path) -> None:
        """Let the guest write to a new layer from now on; raises `MachineError`."""
        try:
            await monitor.execute("blockdev-snapshot", node=self._active[0], overlay=node)
        except MachineError:
            # Without an answer in time, QEMU may have done it all the same.
            disks = await monitor.execute("query-block")
            if not any(each.get("inserted", {}).get("node-name") == node for each in disks):
                raise
        self._left.append(self._active[1])
        self._nodes[self._active[1].name], self._active = self._active[0], (node, path)

    async def _add_disk(self, monitor: Monitor, node: str, path: Path) -> None:
        await anyio.to_thread.run_sync(frozen.make_disk, path, self._disk_bytes)
        for options in argv.layer(node, str(path), "qcow2", read_only=False):
            await monitor.execute("blockdev-add", **options)

    async def _let_go_of_vdi(self, monitor: Monitor) -> None:
        """Copy a VDI that the machine boots: QEMU's driver for it forbids checkpoints."""
        foreign = self._spec.foreign
        if (foreign is not None and foreign.disk is not None and foreign.cache_disk is None
                and self._lowest is not None and media.is_vdi(foreign.disk)):
            await merging.pull(monitor, self._active[0], self._lowest)
            self._lowest = None

    def _link_base(self, directory: Path) -> _State:
        """What every checkpoint of this machine needs, in its directory."""
        if self._spec.foreign:
            return self._link_foreign(self._spec.foreign, directory)
        assert self._spec.boot is not None
        link_or_copy(self._spec.boot.root, directory / "root")
        link_or_copy(self._spec.boot.scratch, directory / "base")
        attached = link_attached(self._spec.attached, directory)
        memory, layers = None, []
        if self._spec.template is not None:
            memory, layers = "memory", [TEMPLATE_LAYER]
            link_or_copy(self._spec.template / frozen.MEMORY, directory / "memory")
            link_or_copy(self._spec.template / frozen.OVERLAY, directory / TEMPLATE_LAYER)
            self._nodes[TEMPLATE_LAYER] = "layer0"
        return _State(FORMAT, "", "root", "base", memory, layers, [], "", "", attached=attached)

    def _link_foreign(self, foreign: Foreign, directory: Path) -> _State:
        if foreign.disk is None or foreign.cache_disk is not None:
            raise NotSupported("only a machine with one disk can be kept in a checkpoint")
        if self._lowest is None:
            frozen.make_disk(directory / "base", self._disk_bytes)
        else:
            link_or_copy(foreign.disk.resolve(), directory / "base")
        if foreign.iso is not None:
            link_or_copy(foreign.iso.resolve(), directory / "cd")
        return _State(FORMAT, "", None, "base", None, [], [], "", "",
                      "cd" if foreign.iso else None, foreign.iso_first)

    def _keep(self, directory: Path, name: str, base: _State, table: PageTable, devices: Devices,
              machine_type: str, still: float, written: int) -> Checkpoint:
        """Write the rest, and make the last layers of the disk part of the checkpoint."""
        lower_disk_priority()
        index, state = directory / f"{name}.index", directory / f"{name}.devices"
        try:
            table.write_index(index)
            state.write_bytes(zlib.compress(msgspec.msgpack.encode(devices), 1))
        except OSError:  # what it filled must be free for the next one
            for path in (directory / f"{name}.pages", index, state):
                path.unlink(missing_ok=True)
            raise
        layers = list(base.layers)
        if self._merged is not None:
            self._merged.rename(directory / self._merged.stem)
            self._merged = None
        for number, path in enumerate(list(self._left)):
            kept = f"{name}-{number}.disk" if number else f"{name}.disk"
            path.rename(directory / kept)
            self._left.remove(path)
            self._nodes[kept] = self._nodes.pop(path.name)
            layers.append(kept)
            base = self._state = _replaced(base, layers=list(layers))
        self._table = table
        self._state = _replaced(base, machine_type=machine_type, layers=layers, pages=table.names(),
                                index=index.name, devices=state.name)
        written += index.stat().st_size + state.stat().st_size
        return Checkpoint(self._state.files(), msgspec.to_builtins(self._state), still, written)


@dataclass(frozen=True)
class Opened:
    """A checkpoint's files as descriptors for QEMU, and the stream to load."""

    memory: int | None
    layers: tuple[int, ...]
    stream: Iterator[bytes]


@contextlib.contextmanager
def opened(saved: Saved, memory_mb: int) -> Iterator[Opened]:
    """Open a checkpoint's files for QEMU to inherit; raises `CheckpointUnusable`."""
    state = _state(saved)
    directory = saved.directory
    try:
        with contextlib.ExitStack() as stack:

            def take(name: str) -> int:
                fd = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                stack.callback(os.close, fd)
                return fd

            memory = take(state.memory) if state.memory else None
            if memory is not None and os.fstat(memory).st_size != memory_mb << 20:
                raise CheckpointUnusable("a checkpoint of a machine with another memory")
            table = read_index(directory / state.index)
            devices = msgspec.msgpack.decode(
                zlib.decompress((directory / state.devices).read_bytes()), type=Devices)
            pages = table.stored(directory)
            stack.callback(pages.close)
            yield Opened(memory, tuple(map(take, state.layers)),
                         write(devices.head, devices.section, table.blocks, pages, devices.tail))
    except (OSError, ValueError, zlib.error, msgspec.MsgspecError) as error:
        raise CheckpointUnusable(f"a checkpoint cannot be read: {error}") from error


def feed(sock: socket.socket, pieces: Iterator[bytes]) -> None:
    """Give QEMU a stream to its end; raises `OSError` when QEMU does not take it."""
    with sock:
        for piece in pieces:
            sock.sendall(piece)


def source(saved: Saved) -> tuple[BootParts | None, Foreign | None, Attached | None]:
    """What the machine booted from, as a checkpoint keeps it: an image, or its user's disks.

    Last: what a machine of an image has of its user's besides.
    """
    state, directory = _state(saved), saved.directory
    if state.root is None:
        cd = directory / state.cd if state.cd else None
        return None, Foreign(directory / state.base, cd, state.cd_first), None
    nowhere = Path("/")
    return (BootParts("", nowhere, nowhere, directory / state.root, directory / state.base), None,
            attached_in(directory, state.attached))


def _state(saved: Saved) -> _State:
    said = saved.state.get("format")
    if isinstance(said, int) and said > FORMAT:
        raise CheckpointNewer(f"a checkpoint in {saved.directory} was made by a newer vmjob")
    try:
        state = msgspec.convert(dict(saved.state), _State)
    except msgspec.ValidationError as error:
        raise CheckpointUnusable(f"a checkpoint that cannot be understood: {error}") from error
    if state.format != FORMAT:
        raise CheckpointUnusable("a checkpoint of another version of vmjob")
    if any("/" in name for name in state.files()):
        raise CheckpointUnusable("a checkpoint that names files elsewhere")
    return state


def _replaced(state: _State, **changes: Any) -> _State:
    return msgspec.structs.replace(state, **changes)


@contextlib.contextmanager
def _quick_threads() -> Iterator[None]:
    """Python's threads take turns more often: the guest waits for one while another reads pages.

    With the usual 5 ms it stands still twice as long (measured).
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


async def _remove_disk(monitor: Monitor, node: str, path: Path) -> None:
    """Take back a layer that was not used; one that QEMU does not let go of stays."""
    with anyio.CancelScope(shield=True), contextlib.suppress(MachineError):
        for name in (node, f"{node}-file"):
            await monitor.execute("blockdev-del", **{"node-name": name})
        path.unlink(missing_ok=True)


def _failed(error: OSError) -> MachineError | HostDiskFull:
    if error.errno == 28:
        return HostDiskFull(f"no room for a checkpoint: {error.strerror}")
    return CheckpointFailed(f"a checkpoint could not be written: {error.strerror}")
