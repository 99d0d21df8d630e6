"""What some jobs want of their machine beyond the ordinary, while they run."""

from __future__ import annotations

from pathlib import Path

from vmjob.engine.mailbox import Mailbox
from vmjob.engine.ports import announce
from vmjob.engine.session import Session
from vmjob.errors import VmjobError
from vmjob.grid.contract import Grid
from vmjob.job.model import Hardware, Job
from vmjob.machine.contract import Machine

__all__ = ["fill_mailbox", "read_mailbox", "show_screen", "take_picture",
           "tell_note"]


def show_screen(machine: Machine, job: Job, grid: Grid) -> None:
    """Tell where the machine's screen can be seen; another process of it has another password."""
    address = machine.console_address()
    grid.address("console", f"vnc://{address.host}:{address.port}, password {address.password}")
    announce("console", address.port, job, grid)


async def fill_mailbox(session: Session, hardware: Hardware, *, isolated: bool) -> None:
    """Before the first task: make the mailbox, with the host's note in it."""
    if hardware.mailbox is not None:
        await Mailbox(session.client, isolated=isolated).put(hardware.mailbox)


async def read_mailbox(session: Session, hardware: Hardware, grid: Grid, *,
                       isolated: bool) -> None:
    """After the last task: pass on what the job left there for the host."""
    if hardware.mailbox is not None:
        tell_note(await Mailbox(session.client, isolated=isolated).read(), grid)


def tell_note(note: bytes | None, grid: Grid) -> None:
    """Pass on what a mailbox holds for the host, if it holds anything."""
    if note is not None:
        grid.message(f"mailbox: {note.decode('utf-8', 'replace')}")


async def take_picture(machine: Machine, path: Path, grid: Grid) -> None:
    """Keep what is on the screen of a job that failed; if that fails too, it is no matter."""
    try:
        await machine.screenshot(path)
        grid.warning(f"a picture of the machine's screen is in {path}")
    except VmjobError as error:
        grid.warning(f"no picture of the machine's screen: {error.message}")
