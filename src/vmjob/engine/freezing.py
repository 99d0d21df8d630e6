"""Making a template: boot a machine, warm it up, put it to sleep, freeze it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from vmjob.engine.ownership import claim
from vmjob.engine.starting import boot
from vmjob.engine.templates import Lease, TemplateStore, key_of, room_for
from vmjob.errors import HostDiskFull, TemplateUnusable
from vmjob.guest.client import SHORT_COMMAND, AgentClient, Identity
from vmjob.home import Home, locked
from vmjob.machine.contract import TEMPLATE_DISK_GB, Driver, MachineSpec

__all__ = ["lease"]

#: What is run before a machine is frozen: its files are then in the memory of every copy.
WARMING = (("true",), ("true",), ("sh", "-c", "true"), ("python3", "-c", "pass"))
#: Seconds for which the machine is left alone before it is frozen: the kernel has work that it puts
#: off (writing back, RCU), which else every copy would do.
QUIET = 0.5


async def lease(home: Home, driver: Driver, shape: MachineSpec,
                on_phase: Callable[[str], None]) -> Lease:
    """The template for machines of this shape; made first when there is none, or a damaged one.

    When several processes ask at once, one makes it and the others wait. Raises `HostDiskFull`,
    `TemplateUnusable` or what booting a machine raises.
    """
    store = TemplateStore(home)
    key, identity = key_of(driver, shape)
    found = await anyio.to_thread.run_sync(_usable, store, key)
    if found is not None:
        return found
    on_phase("template")
    lock = home.locks / f"template-{key}"
    # In a thread, as others may hold it long; abandoned when the caller is cancelled.
    holder = locked(lock, wait=True, what="the template")
    await anyio.to_thread.run_sync(holder.__enter__, abandon_on_cancel=True)
    try:
        found = await anyio.to_thread.run_sync(_usable, store, key)
        if found is None:
            await _make(home, driver, shape, identity)
            found = await anyio.to_thread.run_sync(store.lease, key)
    finally:
        holder.__exit__(None, None, None)
    if found is None:
        raise TemplateUnusable("a template was removed as soon as it was made")
    return found


def _usable(store: TemplateStore, key: str) -> Lease | None:
    store.sweep()
    try:
        return store.lease(key)
    except TemplateUnusable:
        store.condemn(key)
        return None


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
                await _warm(client, directory)
                await client.sleep()
                await anyio.sleep(QUIET)
                files = await machine.freeze()
            finally:
                client.close()
            try:
                await anyio.to_thread.run_sync(
                    TemplateStore(home).publish, directory, files, identity, hello,
                    time.monotonic() - began)
            except OSError as error:
                raise HostDiskFull(f"cannot keep a template: {error.strerror}") from error
        finally:
            await machine.destroy()


async def _warm(client: AgentClient, directory: Path) -> None:
    """Do everything once that jobs will do."""
    async def drop(stream: str, data: bytes) -> None: ...

    await client.settle()
    for argv in WARMING:
        task = await client.start(list(argv), wait=SHORT_COMMAND)
        await client.follow(task, drop)
        client.forget(task)
    source = directory / "warm"
    source.write_bytes(b"warm")
    await client.put(source, "warm")
    await client.get("warm", directory / "back", limit=100)
    await client.delete("warm")
    await client.introduce(Identity.fresh("template", network=False))
