"""Carrying one job for a command of the shell: signals, slots, the record at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import click

from vmjob.cli.main import print_json, report
from vmjob.cli.signals import Signals, farewell
from vmjob.errors import HostDiskFull, InputMissing, SlotUnusable, UsageError, VmjobError
from vmjob.job.model import Job
from vmjob.machine.contract import Priority

if TYPE_CHECKING:
    from vmjob.engine.control import Control
    from vmjob.engine.record import Record
    from vmjob.engine.slot import Slot
    from vmjob.grid.events import Events
    from vmjob.grid.terminal import Terminal
    from vmjob.home import Home

    _Grid = Terminal | Events

__all__ = ["How", "carry", "leave"]

MIB = 1 << 20
#: The job's input, in its slot.
STDIN = "stdin"


@dataclass(frozen=True)
class How:
    """How a job is to be carried: the options that do not belong to the job itself."""

    accel: str
    cpu: str
    cold: bool
    stdin: str
    slot: Path | None
    every: float | None
    slot_limit: int | None
    stop_deadline: float
    priority: Priority
    keep: bool
    as_json: bool
    quiet: bool
    #: Where the events of the job's life go: a file, - for stdout, None for nowhere.
    events: str | None = None
    #: Make the job's machine ready to start, and nothing else.
    prepare_only: bool = False
    #: Let other computers reach the ports that the job opens for them.
    remote_ports: bool = False
    hypervisor: str = "auto"


def leave(code: int) -> NoReturn:
    """End the process with an exit code, whatever its threads do."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # Not sys.exit: a thread that waits for a terminal nobody types on would keep us here.
    os._exit(code)


async def carry(job: Job | None, how: How) -> int:
    """Carry a job (None: that of the slot) to its end; its exit code.

    SIGINT and SIGTERM end it, and its machine, at once; with a slot, SIGTERM first asks for a last
    checkpoint. SIGTSTP suspends the machine with us, SIGCONT resumes both.
    """
    from vmjob.engine.control import Control
    from vmjob.engine.record import Record
    from vmjob.grid.terminal import OutputClosed
    from vmjob.home import Home

    control = Control()
    signals = Signals(control, how.slot, how.stop_deadline)
    events: Events | None = None
    try:
        with contextlib.ExitStack() as stack:
            slot = None
            if how.slot is not None:
                slot, job, how, ended = _take_slot(stack, job, how)
                if ended is not None:
                    _show(ended, how.as_json)
                    return ended.exit_code
            assert job is not None
            grid, events = _grid(stack, job, how)
            record = await _carry(Home(), job, how, slot, control, grid)
    except asyncio.CancelledError:
        if events is not None:
            events.close()
        if how.slot is not None and not how.quiet:
            click.echo(farewell(how.slot), err=True)
        return 128 + (signals.caught[0] if signals.caught else signal.SIGINT)
    except OutputClosed:
        return 128 + signal.SIGPIPE
    except VmjobError as error:
        record = Record(exit_code=error.exit_code, error=error.as_dict())
    if events is not None:
        events.tell("finished", record=_plain(record))
        events.close()
    _show(record, how.as_json)
    return record.exit_code


async def _carry(home: Home, job: Job, how: How, slot: Slot | None, control: Control,
                 grid: _Grid) -> Record:
    from vmjob.engine.clock import Pace
    from vmjob.engine.request import Request, Survival
    from vmjob.engine.run import prepare, run_job
    from vmjob.shape import doubt, machine_shape

    grid.phase("image")
    made = await machine_shape(
        home, job.image, how.accel, hypervisor=how.hypervisor, memory_mb=job.memory_mb,
        cpus=job.cpus, disk_gb=job.disk_gb, network=job.network, cpu=how.cpu,
        progress=grid.building)
    survival = None
    if slot is not None:
        survival = Survival(slot, Pace(how.every), how.slot_limit and how.slot_limit * MIB)
    image = made.image
    facts = {"name": image.name, "digest": image.manifest.parts["root"].sha256,
             "kernel": image.manifest.kernel_version}
    shape = replace(made.spec, priority=how.priority, display=job.hardware.screen)
    request = Request(job, made.driver, shape, facts,
                      {"accelerator_why": made.why},
                      hashes=how.as_json, cold=how.cold, survival=survival, control=control,
                      keep=Path("vmjob-failed").absolute() if how.keep else None,
                      remote_ports=how.remote_ports)
    if how.prepare_only:
        return await prepare(home, request)
    record = await run_job(home, request, grid)
    doubt(home, shape, record.error)
    return record


def _grid(stack: contextlib.ExitStack, job: Job, how: How) -> tuple[_Grid, Events | None]:
    """Whom the engine tells: the terminal, and whoever wants the events."""
    from vmjob.grid.terminal import Terminal

    output = None if how.events == "-" else 2 if how.as_json else 1
    terminal = stack.enter_context(Terminal(how.stdin, output=output, quiet=how.quiet))
    if how.events is None:
        return terminal, None
    from vmjob.grid.events import Events

    events = Events(terminal, open_events(how.events))
    events.tell("started", tasks=[task.title for task in job.tasks], image=job.image)
    return events, events


def open_events(path: str) -> BinaryIO:
    """Where events are written: appended to a file, or stdout for ``-``."""
    if path == "-":
        return os.fdopen(os.dup(1), "wb")
    try:
        return Path(path).open("ab")
    except OSError as error:
        raise UsageError(f"cannot write {path!r}: {error.strerror}") from error


def _take_slot(stack: contextlib.ExitStack, job: Job | None,
               how: How) -> tuple[Slot, Job, How, Record | None]:
    """Own the slot: begin a job in it, or find the one to continue and what it was asked for."""
    from vmjob.engine.slot import Asked, Slot
    from vmjob.job.files import is_directory

    assert how.slot is not None
    if job is None and not is_directory(how.slot):
        raise SlotUnusable(f"there is no slot {how.slot}")
    slot = stack.enter_context(Slot.claim(how.slot.absolute()))
    if job is not None:
        job.check()
        if not slot.has_job:
            _keep_input(how.stdin, slot.root / STDIN)
        # Not stdout: whoever continues it wants to see the job's own there, or not.
        events = None if how.events in (None, "-") else str(Path(how.events).absolute())
        slot.begin(Asked(job, how.accel, how.cpu, how.every, events, how.remote_ports,
                         how.hypervisor))
    asked = slot.asked()
    stdin = slot.root / STDIN
    how = replace(how, accel=asked.accel, cpu=asked.cpu, every=asked.checkpoint_every,
                  events=how.events or asked.events, remote_ports=asked.remote_ports,
                  hypervisor=asked.hypervisor, stdin=str(stdin) if stdin.exists() else "none")
    return slot, asked.job, how, slot.result()


def _keep_input(given: str, target: Path) -> None:
    """Copy all of a job's input into its slot: it must be there when the job is continued."""
    from vmjob.grid.terminal import open_input

    fd = open_input(given)
    if fd is None:
        return
    try:
        with os.fdopen(fd, "rb", closefd=fd != 0) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError as error:
        kind = HostDiskFull if error.errno == 28 else InputMissing
        raise kind(f"cannot keep the job's input in its slot: {error.strerror}") from error


def _plain(record: Record) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain


def _show(record: Record, as_json: bool) -> None:
    if as_json:
        print_json(_plain(record))
    elif record.error is not None:
        report(record.error)
    elif record.message:
        click.echo(f"vmjob: the job says: {record.message}", err=True)
    elif record.kept:
        click.echo(f"vmjob: the machine's logs are in {record.kept}", err=True)
