"""A machine and its generations: one made of a running machine, a machine continued from one."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import anyio
import anyio.to_thread

from vmjob.engine.generations import DIGITS, Draft, Generation, Generations
from vmjob.engine.ownership import held
from vmjob.engine.progress import Progress
from vmjob.errors import (
    CheckpointUnusable,
    GuestError,
    HostDiskFull,
    MachineDied,
    ProcessorChanged,
)
from vmjob.home import Home
from vmjob.host.facts import processor
from vmjob.host.priority import lower_disk_priority
from vmjob.host.unbroken import unbroken
from vmjob.machine.contract import EndReason, Machine, MachineSpec

__all__ = ["Kept", "continued", "keep", "turn"]

#: Seconds for which a checkpoint waits for another machine's.
TURN_DEADLINE = 30.0
#: Bytes that stay free on the disk whatever happens.
LEFT_FREE = 64 << 20
MIB = 1 << 20
#: A name that is given and taken back, to see whether it can be; `Generations.tidy` knows no such.
LINK_PROBE = "link.new"


class Kept(Protocol):
    """A machine that is kept: a `Session`, or one without an agent."""

    @property
    def machine(self) -> Machine: ...

    @property
    def driver_name(self) -> str: ...

    @property
    def copied(self) -> tuple[Path, ...]:
        """What its user brought that the first checkpoint copies, also where it could link it."""
        ...


S = TypeVar("S")


async def keep(generations: Generations, session: Kept, progress: Callable[[], Progress],
               settle: Callable[[], Awaitable[None]], room: int | None) -> Generation:
    """Make the newest generation of a running machine, which goes on.

    ``progress`` is called while the guest stands still; ``settle`` when it goes on again, and
    before the generation counts. ``room``: bytes that it may take (None: what there is). Raises
    `CheckpointFailed`, `HostDiskFull`; older generations stay good.
    """
    async with generations.turn:
        return await _keep(generations, session, progress, settle, room)


async def _keep(generations: Generations, session: Kept, progress: Callable[[], Progress],
                settle: Callable[[], Awaitable[None]], room: int | None) -> Generation:
    spec = session.machine.spec
    _check_room(generations, spec, room, session.copied)
    number = generations.next_number()
    noted: list[Progress] = []
    checkpoint = await session.machine.checkpoint(
        generations.directory, f"{number:0{DIGITS}}", lambda: noted.append(progress()))
    await settle()
    draft = Draft(number, time.time(), session.driver_name, _processor(spec), _shape(spec), *noted)

    def publish() -> Generation:
        lower_disk_priority()
        return generations.publish(draft, checkpoint)

    try:
        return await unbroken(anyio.to_thread.run_sync(publish))
    except OSError as error:
        raise HostDiskFull(f"a checkpoint could not be written: {error.strerror}") from error


async def continued(
        stack: contextlib.AsyncExitStack, generations: Generations, shape: MachineSpec,
        open_one: Callable[[MachineSpec], AbstractAsyncContextManager[S]],
        warn: Callable[[str], None]) -> tuple[S, Generation] | None:
    """A machine that goes on from the newest generation that is good; None when none is.

    What is wrong with others is told to ``warn``; newer ones are removed once it runs, not before.
    Raises `ProcessorChanged`, `MachineStartFailed` when no machine starts here, `MachineDied` when
    the hypervisor was killed.
    """
    candidates = generations.newest_first()
    while (generation := await anyio.to_thread.run_sync(_next, candidates, warn)) is not None:
        _check_processor(generation, shape)
        saved = replace(shape, **generation.shape, saved=generations.saved(generation))
        try:
            session = await stack.enter_async_context(open_one(saved))
        except (CheckpointUnusable, MachineDied, GuestError) as error:
            if error.context.get("reason") == EndReason.KILLED:
                raise  # that was not the checkpoint's fault
            # It may have been this computer's fault all the same, so nothing is removed yet.
            warn(f"checkpoint {generation.number} is given up: {error.message}")
        else:
            await anyio.to_thread.run_sync(generations.go_back, generation.number)
            return session, generation
    return None


@contextlib.asynccontextmanager
async def turn(home: Home) -> AsyncIterator[None]:
    """One checkpoint at a time: two would share the disk, and both take twice as long.

    Whoever waited for too long goes ahead: it is manners, and the other may be stopped for good.
    """
    async with held(home.locks / "checkpoint", TURN_DEADLINE):
        yield


def _next(candidates: Iterator[Generation | CheckpointUnusable],
          warn: Callable[[str], None]) -> Generation | None:
    for each in candidates:
        if isinstance(each, Generation):
            return each
        warn(each.message)
    return None


def _check_room(generations: Generations, spec: MachineSpec, room: int | None,
                copied: tuple[Path, ...] = ()) -> None:
    """Refuse to begin what would fill the disk, or break the limit of who owns it."""
    directory: Path = generations.directory
    most = spec.memory_mb * MIB + _copied(generations, spec, copied)
    if shutil.disk_usage(directory).free < most + LEFT_FREE:
        raise HostDiskFull(f"there is no room for another checkpoint in {directory}")
    if room is not None and most > room:
        raise HostDiskFull("another checkpoint might take more than the disk space that is left to "
                           f"the job ({max(0, room) // MIB} MiB)")


def _copied(generations: Generations, spec: MachineSpec, copied: tuple[Path, ...]) -> int:
    """Bytes of what the first checkpoint has copied: image, template, what its user brought.

    None where the files can be linked, but for those that are ``copied`` in any case. What an
    attempt that failed has copied is not copied again.
    """
    if spec.saved is not None or generations.listed():
        return 0
    image = [spec.boot.root, spec.boot.scratch] if spec.boot else []
    template = [path for path in spec.template.iterdir() if path.is_file()] if spec.template else []
    # The files of either lie in one directory and are of one owner: one tells of all.
    sizes = [path.stat().st_size for files in (image, template)
             if files and not _linkable(files[0], generations.directory) for path in files]
    brought = list(spec.attached.parts().values()) if spec.attached else []
    if spec.foreign is not None:
        brought += [path for path in (spec.foreign.disk, spec.foreign.iso) if path is not None]
    sizes += [_size(path) for path in brought
              if path in copied or not _linkable(path, generations.directory)]
    return max(0, sum(sizes) - generations.disk_bytes())


def _size(path: Path) -> int:
    """Bytes of what a user brought; 0 where it is gone, which whoever copies it tells."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _linkable(path: Path, directory: Path) -> bool:
    """Whether a file can have another name there: the kernel has more rules than one about it."""
    probe = directory / LINK_PROBE
    try:
        probe.hardlink_to(path)
    except OSError:
        return False
    probe.unlink()
    return True


def _check_processor(generation: Generation, shape: MachineSpec) -> None:
    """Refuse to continue a guest that was told of a processor which is not here."""
    accelerator = str(generation.shape.get("accelerator"))
    if accelerator != shape.accelerator:
        raise ProcessorChanged(f"checkpoint {generation.number} was made with {accelerator}, which "
                               f"is not what would be used here ({shape.accelerator})")
    if generation.processor != _processor(shape):
        raise ProcessorChanged(f"checkpoint {generation.number} was made on another processor; the "
                               "guest may be using what this one does not have")


def _shape(spec: MachineSpec) -> dict[str, object]:
    """What a machine must be made with to continue from another's checkpoint."""
    return {"memory_mb": spec.memory_mb, "cpus": spec.cpus, "disk_gb": spec.disk_gb,
            "network": spec.network, "accelerator": spec.accelerator, "cpu_model": spec.cpu_model,
            "display": spec.display}


def _processor(spec: MachineSpec) -> str:
    """What a machine's guest sees of this computer's processor; '' where it is emulated."""
    return processor() if spec.runs_natively else ""
