"""Making a template: boot a machine, warm it up, put it to sleep, freeze it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from vmjob.engine.ownership import claim, held
from vmjob.engine.starting import boot
from vmjob.engine.templates import Lease, TemplateStore, cap, key_of, room_for
from vmjob.errors import (
    AgentProtocol,
    AgentSilent,
    ClockWrong,
    HostDiskFull,
    MachineError,
    TemplateUnusable,
)
from vmjob.guest.client import SHORT_COMMAND, AgentClient, Identity
from vmjob.home import Home
from vmjob.host.unbroken import unbroken
from vmjob.machine.contract import TEMPLATE_DISK_GB, Driver, MachineSpec

__all__ = ["lease"]

#: Seconds for all that a machine does before it is frozen: 2 under emulation, when nobody else
#: computes.
WARM_DEADLINE = 300.0
#: What is run before a machine is frozen: its files are then in the memory of every copy.
WARMING = (("true",), ("true",), ("sh", "-c", "true"), ("python3", "-c", "pass"))
#: Seconds for which the machine is left alone before it is frozen: the kernel has work that it puts
#: off (writing back, RCU), which else every copy would do.
QUIET = 0.5
#: By how much a machine's clock may seem faster or slower than this computer's.
CLOCK_SLACK = 0.05
#: How often a machine is made whose clock is wrong, or which its hypervisor fails to freeze:
#: without a template the job's machine would have to boot, too.
ATTEMPTS = 3


async def lease(home: Home, driver: Driver, shape: MachineSpec,
                on_phase: Callable[[str], None]) -> Lease:
    """The template for machines of this shape; made first when there is none, or a damaged one.

    When several processes ask at once, one makes it and the others wait. Raises `HostDiskFull`,
    `TemplateUnusable`, `ClockWrong` or what booting a machine raises.
    """
    store = TemplateStore(home)
    key, identity = key_of(driver, shape)
    cap()  # a wrong one is told before the work, not after it
    found = await _in_thread(_usable, store, key)
    if found is not None:
        return found
    on_phase("template")
    async with held(home.locks / f"template-{key}"):
        found = await _in_thread(_usable, store, key)
        if found is None:
            await _make_right(home, driver, shape, identity)
            found = await _in_thread(_usable, store, key)
    if found is None:
        raise TemplateUnusable("a template was removed as soon as it was made")
    return found


async def _in_thread(work: Callable[..., Lease | None], *args: object) -> Lease | None:
    """Run ``work`` in a thread to its end, even when cancelled: what it leased is given back."""
    running = asyncio.ensure_future(anyio.to_thread.run_sync(lambda: work(*args)))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await _ended(running)
            if (lost := running.result()) is not None:
                lost.close()
        raise


async def _ended(running: asyncio.Future[Any]) -> None:
    """Wait for a thread's end, however often the waiting is cancelled."""
    while not running.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([running])


def _usable(store: TemplateStore, key: str) -> Lease | None:
    store.sweep()
    try:
        return store.lease(key)
    except TemplateUnusable:
        store.condemn(key)
        return None


async def _make_right(home: Home, driver: Driver, shape: MachineSpec,
                      identity: dict[str, Any]) -> None:
    """Make a template whose clock is right: all copies will have it."""
    for _ in range(ATTEMPTS - 1):
        try:
            await _make(home, driver, shape, identity)
        except (ClockWrong, TemplateUnusable):
            continue
        return
    await _make(home, driver, shape, identity)


async def _make(home: Home, driver: Driver, shape: MachineSpec,
                identity: dict[str, Any]) -> None:
    if not room_for(home, shape):
        raise HostDiskFull(f"there is no room for a template in {home.templates}")
    began = time.monotonic()
    with claim(home) as (name, directory):
        spec = replace(shape, id=name, directory=directory, template=None, freezable=True,
                       disk_gb=min(shape.disk_gb, TEMPLATE_DISK_GB))
        machine = await driver.create(spec)
        try:
            client, hello = await boot(driver, machine)
            try:
                try:
                    with anyio.fail_after(WARM_DEADLINE * spec.slowness):
                        await _warm(client, directory)
                        await client.sleep()
                except TimeoutError:
                    raise AgentSilent("the machine does not end its first small commands") from None
                await anyio.sleep(QUIET)
                try:
                    files = await machine.freeze()
                except MachineError as error:
                    raise TemplateUnusable(f"a machine could not be frozen: {error.message}",
                                           **error.context) from error
            finally:
                client.close()
            try:
                # To its end, even when cancelled: the directory is removed after this.
                await unbroken(anyio.to_thread.run_sync(
                    TemplateStore(home).publish, directory, files, identity, hello,
                    time.monotonic() - began))
            except OSError as error:
                raise HostDiskFull(f"cannot keep a template: {error.strerror}") from error
        finally:
            await machine.destroy()


async def _clock(client: AgentClient) -> tuple[float, float, float]:
    """The machine's time of day, and this computer's clock before and after it was asked."""
    before = time.monotonic()
    said = (await client.ping()).get("time")
    if not isinstance(said, float):
        raise AgentProtocol("an agent that does not know the time")
    return before, said, time.monotonic()


def _check_clock(first: tuple[float, float, float], second: tuple[float, float, float]) -> None:
    """Raise `ClockWrong` for a machine whose clock is not as fast as this computer's.

    A kernel measures its processor's clock when it boots; on a computer that is busy then, it may
    be wrong by any factor.
    """
    least, most = second[0] - first[2], second[2] - first[0]
    went = second[1] - first[1]
    if not least * (1 - CLOCK_SLACK) <= went <= most * (1 + CLOCK_SLACK):
        raise ClockWrong(f"the machine's clock went {went:.2f} s in {most:.2f} s, because this "
                         "computer was busy while it booted")


async def _warm(client: AgentClient, directory: Path) -> None:
    """Do everything once that jobs will do."""
    async def drop(stream: str, data: bytes) -> None: ...

    began = await _clock(client)
    await client.settle()
    for argv in WARMING:
        task = await client.start(list(argv), wait=SHORT_COMMAND)
        await client.follow(task, drop)
        client.forget(task)
    source = directory / "warm"
    try:
        source.write_bytes(b"warm")
    except OSError as error:
        raise HostDiskFull(f"cannot make a template: {error.strerror}") from error
    await client.put(source, "warm")
    await client.get("warm", directory / "back", limit=100)
    await client.delete("warm")
    _check_clock(began, await _clock(client))
    await client.introduce(Identity.fresh("template", network=False))
