"""From a machine that was created to one whose agent answers."""

from __future__ import annotations

import os

import anyio

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
from vmjob.guest.client import AgentClient, Hello, Identity
from vmjob.machine.contract import Driver, Ended, EndReason, Machine

__all__ = ["BOOT_DEADLINE", "boot", "explain", "restore", "thaw"]

#: Seconds from power-on until the agent must answer. Measured: 2 s under TCG on an idle computer;
#: a loaded single-core computer may need 60 times that.
BOOT_DEADLINE = 180.0
#: Seconds from the start of a copy until its agent must answer. Measured: 0.1 s under TCG.
THAW_DEADLINE = 30.0
#: Seconds from a checkpoint's start until the agent must answer: the job may be using all of the
#: processor and memory that the machine has.
RESTORE_DEADLINE = 120.0
#: Seconds to wait for a machine's end after its lanes broke, to learn why they did.
END_PATIENCE = 10.0
GIB = 1 << 30


async def boot(driver: Driver, machine: Machine) -> tuple[AgentClient, Hello]:
    """Start a machine from its image; the caller closes the client.

    Raises `BootTimeout` and whatever else can end a machine.
    """
    client = AgentClient(await machine.start(), slowness=machine.spec.slowness)
    try:
        hello = await _answer(machine, client)
        await client.introduce(_identity(driver, machine))
        if machine.spec.disk_gb > 1 and driver.capabilities.isolated:
            await client.grow_disk(machine.spec.disk_gb * GIB)
    except BaseException:
        client.close()
        raise
    return client, hello


async def thaw(driver: Driver, machine: Machine, *, grown: bool) -> AgentClient:
    """Start a machine that is a copy of a frozen one; the caller closes the client.

    ``grown``: its disk is larger than the template's. Nothing was ever cut off on its lanes, so
    they need no resynchronisation.
    """
    client = AgentClient(await machine.start(), clean=True, slowness=machine.spec.slowness)
    try:
        try:
            await client.introduce(_identity(driver, machine), THAW_DEADLINE)
        except (AgentLost, AgentProtocol) as error:
            raise await explain(machine, error) from error
        if grown:
            await client.grow_disk(machine.spec.disk_gb * GIB)
    except BaseException:
        client.close()
        raise
    return client


async def restore(machine: Machine) -> tuple[AgentClient, Hello]:
    """Continue a machine from its checkpoint; the caller closes the client.

    Raises `CheckpointUnusable` and whatever else can end a machine.
    """
    client = AgentClient(await machine.start(), slowness=machine.spec.slowness)
    try:
        try:
            hello = await client.hello(RESTORE_DEADLINE)
            await client.set_clock(os.urandom(64))
        except (AgentLost, AgentProtocol) as error:
            raise await explain(machine, error) from error
    except BaseException:
        client.close()
        raise
    return client, hello


def _identity(driver: Driver, machine: Machine) -> Identity:
    spec = machine.spec
    return Identity.fresh(f"vmjob-{spec.id}", network=(
        spec.network != "none" and driver.capabilities.own_addresses))


async def _answer(machine: Machine, client: AgentClient) -> Hello:
    try:
        return await client.hello(BOOT_DEADLINE)
    except AgentSilent:
        seconds = BOOT_DEADLINE * machine.spec.slowness
        raise BootTimeout(f"the machine did not come up within {seconds:g} seconds",
                          console=machine.console()[-2000:]) from None
    except (AgentLost, AgentProtocol) as error:
        raise await explain(machine, error) from error


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
