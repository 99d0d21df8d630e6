"""A job's own disk on our kernel: what is on it is a task of a job like any other.

A machine that boots such a disk by its BIOS has no agent, so nothing in it is heard or shared.
Where a job needs that, the disk is put into a machine of ours besides, and the Linux system on it
is started there; so is one that is to survive, where the driver does not keep a machine that boots
such a disk, or has to copy the disk for it. See docs/explanation/old-images.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import anyio

from vmjob.engine.session import Session
from vmjob.errors import DiskUnusable, GuestError, ImageOutdated
from vmjob.job.model import Job, Network, Task, Triggers
from vmjob.machine.contract import Attached, Capabilities
from vmjob.machine.disks import HEAD, format_of

if TYPE_CHECKING:
    from vmjob.engine.request import Request

__all__ = ["MAILBOX", "NoSystem", "find_system", "hosted", "is_copied", "needs"]

#: The guest's side is `vmjob.guest.agent.system`.
PROGRAM = ("/usr/bin/python3", "-I", "-S", "-c",
           ("import sys; sys.path.insert(0, '/usr/lib/vmjob'); "
            "from vmjob_agent.system import main; sys.exit(main(sys.argv[1:]))"))
#: Seconds for the guest to look at the disk: a moment, unless what is on it was made to last.
LOOK_DEADLINE = 120.0
#: How its program ends that does not know what it is asked.
USAGE = 2
#: Bytes of what it says about it.
SAID = 500
#: A need that no folder meets.
MAILBOX = "mailbox"


class NoSystem(Exception):
    """There is no Linux system on the disk that our kernel can start; why not."""


def needs(job: Job) -> list[str]:
    """What a job that is a whole disk asks for, and gets from an agent only."""
    return [what for what, wanted in (
        ("folders", bool(job.folders)), ("triggers", job.triggers != Triggers()),
        (MAILBOX, job.hardware.mailbox is not None)) if wanted]


def hosted(request: Request) -> Request | None:
    """The same job with its disk's system as a task; None where it is to boot by its BIOS."""
    job, hardware = request.job, request.job.hardware
    if (hardware.disk is None or hardware.iso_first
            or not request.driver.capabilities.attached
            or not (needs(job) or _kept_only_so(request, hardware.disk))):
        return None
    slot = request.survival.slot if request.survival else None
    if slot is not None and any(each.progress.number == 0 for each in slot.generations.listed()):
        return None  # it has begun by its BIOS: only a machine without an agent has no task
    task = Task((*PROGRAM, "run", *words(job)), cwd="/", user="root", name=hardware.disk.name)
    attached = Attached(hardware.disk, hardware.iso, hardware.cache_disk)
    return replace(
        request, cold=True, shape=replace(request.shape, attached=attached),
        job=replace(job, tasks=(task,), inputs=(), outputs=(),
                    hardware=replace(hardware, disk=None, iso=None, cache_disk=None)))


def _kept_only_so(request: Request, disk: Path) -> bool:
    """Whether a job that is to survive could not, or not cheaply, if it booted by its BIOS."""
    capabilities = request.driver.capabilities
    if request.survival is None or not capabilities.checkpoint:
        return False
    return request.job.hardware.cache_disk is not None or is_copied(capabilities, disk)


def is_copied(capabilities: Capabilities, disk: Path) -> bool:
    """Whether a machine that boots this disk can be kept with a copy of it only, if at all."""
    try:
        with disk.open("rb") as file:
            return format_of(file.read(HEAD)) not in capabilities.kept_foreign
    except (OSError, DiskUnusable):
        return False  # who boots it says what is wrong with it


def words(job: Job) -> list[str]:
    """What the guest has to know of the job."""
    # A path that begins at the root stays what it is.
    found = [f"{folder.name}={PurePosixPath('/job', folder.destination)}"
             + ("" if folder.writable else ":ro") for folder in job.folders]
    if job.network is not Network.NONE:
        found.append("--network")
    if job.hardware.screen:
        found.append("--display")
    return found + _besides(job.hardware.iso, job.hardware.cache_disk)


def _besides(iso: Path | None, cache_disk: Path | None) -> list[str]:
    """What a system has besides its disk. An image that was built before that refuses the words."""
    return [word for word, path in (("--iso", iso), ("--cache-disk", cache_disk))
            if path is not None]


async def find_system(session: Session) -> None:
    """Have the guest find the system on its user's disk; raises `NoSystem`."""
    said = b""
    attached = session.machine.spec.attached
    besides = _besides(attached.iso, attached.cache_disk) if attached else []

    async def take(stream: str, data: bytes) -> None:
        nonlocal said
        said = (said + data)[-SAID:]

    try:
        with anyio.fail_after(LOOK_DEADLINE * session.machine.spec.slowness):
            number = await session.client.start([*PROGRAM, "look", *besides], user="root")
            end = await session.client.follow(number, take)
        session.client.forget(number)
    except TimeoutError:
        raise NoSystem("looking at it takes too long") from None
    except GuestError as error:
        raise NoSystem(error.message) from error
    if end.exit_code != 0:
        lines = said.decode("utf-8", "replace").strip().splitlines() or ["it cannot be looked at"]
        if lines[-1].startswith("ModuleNotFoundError"):
            raise ImageOutdated("the image was built by an older vmjob, which could not start a "
                                "job's own disk")
        if end.exit_code == USAGE:
            raise ImageOutdated("the image was built by an older vmjob, which gave a job's own "
                                "disk no CD and no second disk")
        raise NoSystem("".join(c if c.isprintable() else "?" for c in lines[-1]))
