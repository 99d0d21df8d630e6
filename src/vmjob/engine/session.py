"""A machine with its agent answering, from creation to its last trace."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from vmjob.engine.ownership import claim, sweep
from vmjob.errors import (
    AgentLost,
    AgentProtocol,
    AgentSilent,
    BootTimeout,
    GuestPanic,
    HostDiskFull,
    MachineDied,
    VmjobError,
)
from vmjob.guest.client import AgentClient, Hello
from vmjob.home import Home
from vmjob.machine.contract import Driver, Ended, EndReason, Machine, MachineSpec

__all__ = ["BOOT_DEADLINE", "Session", "beside", "describe", "open_session"]

#: Seconds from power-on until the agent must answer. Measured: 2 s under TCG on an idle computer;
#: a loaded single-core computer may need 60 times that.
BOOT_DEADLINE = 180.0
#: Seconds to wait for a machine's end after its lanes broke, to learn why they did.
END_PATIENCE = 10.0

#: Files of a machine's directory that `keep` copies: what a failure report needs.
REPORT = ("argv.json", "qmp.json", "console.log", "qemu.log", "owner.json")


class Session:
    """One machine that answers. Made by `open_session`, which also ends it."""

    def __init__(self, machine: Machine, client: AgentClient, hello: Hello,
                 started: float) -> None:
        self.machine = machine
        self.client = client
        self.hello = hello
        #: ``time.monotonic()`` when the machine was powered on, and when its agent answered.
        self.started = started
        self.ready = time.monotonic()
        #: Set by who runs a job whose own result was a failure: its logs are kept as well.
        self.failed = False

    @contextlib.asynccontextmanager
    async def explaining(self) -> AsyncIterator[None]:
        """Turn a broken lane into what broke it: the machine's end has the better story."""
        try:
            yield
        except (AgentLost, AgentSilent, AgentProtocol) as error:
            raise await explain(self.machine, error) from error


async def explain(machine: Machine, error: VmjobError) -> VmjobError:
    """The error that a user should see when a lane failed with ``error``."""
    patience = END_PATIENCE if isinstance(error, AgentLost) else 0.5
    with anyio.move_on_after(patience), anyio.CancelScope(shield=True):
        with anyio.move_on_after(patience):
            return end_error(await machine.ended(), machine.console())
    return error


def end_error(ended: Ended, console: str) -> VmjobError:
    """A machine's unexpected end as an error."""
    kinds: dict[EndReason, type[VmjobError]] = {
        EndReason.PANIC: GuestPanic, EndReason.RESET: AgentLost,
        EndReason.NO_SPACE: HostDiskFull}
    tail = "\n".join(console.splitlines()[-15:])
    return kinds.get(ended.reason, MachineDied)(ended.detail, reason=str(ended.reason),
                                                console=tail)


def _unheard(phase: str) -> None:
    """A phase that nobody asked for."""


@contextlib.asynccontextmanager
async def open_session(home: Home, driver: Driver, shape: MachineSpec, *,
                       on_phase: Callable[[str], None] = _unheard,
                       keep: Path | None = None) -> AsyncIterator[Session]:
    """A fresh machine of the given shape, its agent answering; gone when the block ends.

    ``shape.id`` and ``shape.directory`` are set here. With ``keep``, an error within the block
    (or `Session.failed`) leaves the machine's logs in a directory below it.
    """
    sweep(home)
    with claim(home) as (name, directory):
        spec = replace(shape, id=name, directory=directory)
        on_phase("machine")
        machine = await driver.create(spec)
        session: Session | None = None
        try:
            started = time.monotonic()
            lanes = await machine.start()
            client = AgentClient(lanes)
            try:
                on_phase("boot")
                hello = await _first_answer(machine, client)
                if spec.disk_gb > 1 and driver.capabilities.isolated:
                    await client.grow_disk()
                session = Session(machine, client, hello, started)
                yield session
            finally:
                with anyio.CancelScope(shield=True):
                    await machine.stop()
                    client.close()
            if keep is not None and session.failed:
                keep_report(directory, keep / name)
        except VmjobError as error:
            if keep is not None:
                error.context["kept"] = str(keep_report(directory, keep / name))
            raise
        finally:
            await machine.destroy()


async def _first_answer(machine: Machine, client: AgentClient) -> Hello:
    try:
        return await client.hello(BOOT_DEADLINE)
    except AgentSilent:
        raise BootTimeout(f"the machine did not come up within {BOOT_DEADLINE:g} seconds",
                          console=machine.console()[-2000:]) from None
    except (AgentLost, AgentProtocol) as error:
        raise await explain(machine, error) from error


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


def keep_report(directory: Path, target: Path) -> Path:
    """Copy a machine's logs; what is not there is left out."""
    target.mkdir(parents=True, exist_ok=True)
    for name in REPORT:
        with contextlib.suppress(OSError):
            shutil.copy(directory / name, target / name)
    return target


def describe(session: Session) -> dict[str, Any]:
    """Facts of a session for a job's record."""
    return {**session.machine.facts(), "guest_kernel": session.hello.kernel,
            "agent_protocol": session.hello.protocol}
