"""A machine with its agent answering, from creation to its last trace."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from vmjob.engine import freezing
from vmjob.engine.ownership import OWNER, claim, sweep
from vmjob.engine.starting import boot, explain, restore, thaw
from vmjob.engine.templates import Lease, TemplateStore
from vmjob.errors import (
    AgentLost,
    AgentProtocol,
    AgentSilent,
    GuestError,
    HostDiskFull,
    MachineError,
    VmjobError,
    WrongState,
)
from vmjob.guest.client import AgentClient, Hello
from vmjob.home import Home
from vmjob.machine.contract import TEMPLATE_DISK_GB, Driver, Machine, MachineSpec

__all__ = ["Place", "Session", "beside", "describe", "open_session"]

#: Bytes of each log that a report of a failure keeps, the last ones.
REPORTED = 4 << 20


#: Seconds after which an answer came too late for the time that was told with the question to be
#: right, and how often it is told.
CLOCK_LATE = 0.1
CLOCK_TRIES = 5

#: Gives a machine its id and its directory, and takes both back.
Place = Callable[[], AbstractContextManager[tuple[str, Path]]]


class Session:
    """One machine that answers. Made by `open_session`, which also ends it."""

    copied: tuple[Path, ...] = ()

    def __init__(self, machine: Machine, client: AgentClient, hello: Hello,
                 started: float, driver_name: str) -> None:
        self.driver_name = driver_name
        self.machine = machine
        self.client = client
        self.hello = hello
        #: ``time.monotonic()`` when the machine was powered on.
        self.started = started
        #: Set by who runs a job whose own result was a failure: its logs are kept as well.
        self.failed = False
        #: Why the machine was booted although it should have been a copy; None where it was not.
        self.cold_because: str | None = None

    async def suspend(self) -> None:
        """Stand still: no CPU is used, no deadline comes nearer."""
        self.client.stand_still()
        await self.machine.suspend()

    async def resume(self) -> None:
        """Go on, with the right time of day."""
        await self.machine.resume()
        self.client.go_on()
        for _ in range(CLOCK_TRIES):
            asked = time.monotonic()
            await self.client.set_clock()
            if time.monotonic() - asked < CLOCK_LATE:
                break

    @contextlib.asynccontextmanager
    async def explaining(self) -> AsyncIterator[None]:
        """Turn a broken lane into what broke it: the machine's end has the better story.

        Who asks something of a machine that has just ended hears that its state is wrong for it.
        """
        try:
            yield
        except (AgentLost, AgentSilent, AgentProtocol, WrongState) as error:
            raise await explain(self.machine, error) from error


def _unheard(phase: str) -> None:
    """A phase that nobody asked for."""


@contextlib.asynccontextmanager
async def open_session(home: Home, driver: Driver, shape: MachineSpec, *, cold: bool = False,
                       on_phase: Callable[[str], None] = _unheard, keep: Path | None = None,
                       place: Place | None = None) -> AsyncIterator[Session]:
    """A fresh machine of the given shape, its agent answering; gone when the block ends.

    It is a copy of a template, which is made first where there is none, unless ``cold``: then it
    boots. It boots as well when its template fails; `Session.cold_because` then says why.
    With ``shape.saved`` it continues from there instead, or fails. ``shape.id`` and
    ``shape.directory`` are set here, from ``place`` (a machine's directory in ``home`` unless
    given). With ``keep``, an error within the block (or `Session.failed`) leaves the machine's logs
    in a directory below it.
    """
    sweep(home)
    place = place or functools.partial(claim, home)
    async with contextlib.AsyncExitStack() as stack:
        session = why = None
        if not cold and shape.saved is None and _has_templates(driver, shape):
            try:
                template = await freezing.lease(home, driver, shape, on_phase)
                stack.callback(template.close)
                session = await _copy(stack, home, driver, shape, template, on_phase, keep, place)
            except (MachineError, GuestError, HostDiskFull) as error:
                why = error.message
        if session is None:
            session = await stack.enter_async_context(
                _machine(driver, shape, on_phase, keep, place))
            session.cold_because = why
        yield session


def _has_templates(driver: Driver, shape: MachineSpec) -> bool:
    able = driver.capabilities
    return able.templates and (able.growing or shape.disk_gb <= TEMPLATE_DISK_GB)


async def _copy(stack: contextlib.AsyncExitStack, home: Home, driver: Driver, shape: MachineSpec,
                template: Lease, on_phase: Callable[[str], None], keep: Path | None,
                place: Place) -> Session:
    """A copy of a template; if it fails, or the files changed meanwhile, nobody else gets it."""
    try:
        return await stack.enter_async_context(
            _machine(driver, shape, on_phase, keep, place, template))
    except (MachineError, GuestError):
        TemplateStore(home).condemn(template.template.key)
        raise


@contextlib.asynccontextmanager
async def _machine(driver: Driver, shape: MachineSpec, on_phase: Callable[[str], None],
                   keep: Path | None, place: Place,
                   lease: Lease | None = None) -> AsyncIterator[Session]:
    """A machine that boots, is a copy of a template, or continues from a checkpoint."""
    template = lease.template if lease else None
    with place() as (name, directory):
        spec = replace(shape, id=name, directory=directory,
                       template=template.directory if template else None)
        on_phase("machine")
        machine = await driver.create(spec)
        try:
            started = time.monotonic()
            on_phase("restore" if spec.saved else "thaw" if template else "boot")
            try:
                if spec.saved:
                    client, hello = await restore(machine)
                elif template:
                    client = await thaw(driver, machine, grown=spec.disk_gb > TEMPLATE_DISK_GB)
                    hello = template.manifest.hello
                else:
                    client, hello = await boot(driver, machine)
                try:
                    if lease:
                        lease.check()
                    session = Session(machine, client, hello, started, driver.name)
                    yield session
                finally:
                    try:
                        with anyio.CancelScope(shield=True):
                            await machine.stop()
                    finally:  # asyncio's own cancellation passes through the shield
                        client.close()
            finally:
                with anyio.CancelScope(shield=True):
                    await machine.stop()
            if keep is not None and session.failed:
                keep_report(machine, keep / name)
        except VmjobError as error:
            if keep is not None:
                note_report(error, machine, keep / name)
            raise
        finally:
            await machine.destroy()


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run ``work`` beside the block and end it with the block.

    Not a task group: its exceptions would come wrapped, and what breaks the helper (a lane that
    is gone) breaks the block as well, which tells it better.
    """
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, VmjobError):
            await task


def note_report(error: VmjobError, machine: Machine, target: Path) -> None:
    """`keep_report`; the error says where it is."""
    keep_report(machine, target)
    if kept := kept_report(str(target)):
        error.context["kept"] = kept


def kept_report(target: str | None) -> str | None:
    """Where a report is that was to be there; None where there was no room for any of it."""
    return target if target is not None and Path(target).is_dir() else None


def keep_report(machine: Machine, target: Path) -> None:
    """Copy the end of each of a machine's logs; what is not there, or has no room, is left out."""
    with contextlib.suppress(OSError):
        target.mkdir(parents=True, exist_ok=True)
    for name in (*machine.logs, OWNER):
        source = machine.spec.directory / name
        with contextlib.suppress(OSError), source.open("rb") as log:
            log.seek(max(0, source.stat().st_size - REPORTED))
            (target / source.name).write_bytes(log.read(REPORTED))


def describe(session: Session) -> dict[str, Any]:
    """Facts of a session for a job's record."""
    return {**session.machine.facts(), "guest_kernel": session.hello.kernel,
            "guest_processor": session.hello.processor,
            "guest_processor_flags": session.hello.processor_flags,
            "agent_protocol": session.hello.protocol}
