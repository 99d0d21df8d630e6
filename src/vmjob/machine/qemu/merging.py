"""Several layers of a disk become one, while the guest writes to the one above them.

Each checkpoint adds a layer, and every read goes through them from the top. QEMU copies what they
hold into a new layer beside them (``block-stream``), which then takes their place. The old ones are
not changed: earlier checkpoints need them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import anyio
import anyio.to_thread

from vmjob.errors import MachineError
from vmjob.machine.qemu import argv, frozen
from vmjob.machine.qemu.monitor import Monitor

__all__ = ["MAX_LAYERS", "first_to_merge", "merge", "pull"]

#: Layers that checkpoints add before some are merged.
MAX_LAYERS = 8
#: A layer is merged with those above it when it is at most so many times as large as they are
#: together: what is copied is then always a good part of what was written since.
WORTH = 2
#: Seconds for merging; then it is tried again after the next checkpoint.
DEADLINE = 600.0
#: Seconds between looks at QEMU's progress.
PERIOD = 0.05
#: What QEMU may copy in a second, bytes: the guest needs the disk as well. A whole disk is copied
#: once, and what is empty of it counts.
SPEED, SPEED_OF_ALL = 50 << 20, 500 << 20


def first_to_merge(sizes: list[int]) -> int | None:
    """The lowest layer (of those that checkpoints added, lowest first) to be merged with all above.

    None when there are few.
    """
    if len(sizes) <= MAX_LAYERS:
        return None
    first, above = len(sizes) - 1, sizes[-1]
    while first > 0 and (len(sizes) - first < MAX_LAYERS // 2 or sizes[first - 1] <= WORTH * above):
        first -= 1
        above += sizes[first]
    return first


async def merge(monitor: Monitor, layers: list[str], below: str | None, above: tuple[str, Path],
                merged: tuple[str, Path], size: int) -> None:
    """Make ``merged`` (its node, its file) of the nodes ``layers``, lowest first.

    ``below`` is the node that the lowest lies on, if any; ``above`` is the one on the highest, with
    its file; ``size`` of the disk in bytes. All but ``merged`` and those two are then gone from
    QEMU. When it fails, or is cancelled, everything is as it was. Raises `MachineError`, `OSError`.
    """
    node, path = merged
    await anyio.to_thread.run_sync(frozen.make_disk, path, size)
    nodes = argv.layer(node, str(path), "qcow2", read_only=False, backing=layers[-1])
    placed = False
    try:
        for options in nodes:
            await monitor.execute("blockdev-add", **options)
        await _stream(monitor, node, SPEED, below)
        # Read-only from now on: what a checkpoint needs is never written again.
        for which, where, backing in ((node, path, below), (above[0], above[1], node)):
            _, wanted = argv.layer(which, str(where), "qcow2", read_only=which == node,
                                   backing=backing)
            await monitor.execute("blockdev-reopen", options=[wanted])
        placed = True
    finally:
        if not placed:
            with anyio.CancelScope(shield=True):
                await _stop(monitor, node)
                await _forget(monitor, node)
                path.unlink(missing_ok=True)
    for each in reversed(layers):
        await _forget(monitor, each)


async def pull(monitor: Monitor, node: str, below: str) -> None:
    """Copy what a layer lies on into it, while the guest writes there; it then lies on nothing.

    When it fails, or is cancelled, another one begins where this one ended. Raises `MachineError`.
    """
    over = False
    try:
        await _stream(monitor, node, SPEED_OF_ALL)
        over = True
    finally:
        if not over:
            with anyio.CancelScope(shield=True):
                await _stop(monitor, node)
    await monitor.execute("blockdev-del", **{"node-name": below})  # else it forbids checkpoints
    await _forget(monitor, below)


async def _stream(monitor: Monitor, node: str, speed: int, base: str | None = None) -> None:
    """Copy what lies below a node into it, down to ``base``; raises `MachineError`."""
    more = {} if base is None else {"base-node": base}
    # A job that is dismissed by itself takes its error along.
    await monitor.execute("block-stream", **{"job-id": node, "device": node, "speed": speed,
                                             "auto-dismiss": False, **more})
    await _finished(monitor, node)


async def _finished(monitor: Monitor, job: str) -> None:
    """Wait for a job of QEMU's; raises `MachineError`."""
    with anyio.move_on_after(DEADLINE):
        while True:
            jobs = await monitor.execute("query-jobs")
            mine = [each for each in jobs if each.get("id") == job]
            if not mine:
                return
            if mine[0].get("status") == "concluded":
                await monitor.execute("job-dismiss", id=job)
                if error := mine[0].get("error"):
                    raise MachineError(f"QEMU could not copy layers of a disk: {error}")
                return
            await anyio.sleep(PERIOD)
    raise MachineError("QEMU did not copy layers of a disk in time")


async def _stop(monitor: Monitor, job: str) -> None:
    with contextlib.suppress(MachineError):
        await monitor.execute("job-cancel", id=job)
    with contextlib.suppress(MachineError):
        await _finished(monitor, job)


async def _forget(monitor: Monitor, node: str) -> None:
    for name in (node, f"{node}-file"):
        with contextlib.suppress(MachineError):
            await monitor.execute("blockdev-del", **{"node-name": name})
