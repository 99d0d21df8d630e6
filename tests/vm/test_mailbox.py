"""The mailbox of a real guest: a disk, to whoever opens it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmjob.engine.mailbox import Mailbox
from vmjob.engine.session import open_session
from vmjob.errors import GuestRefused
from vmjob.guest.client import AgentClient
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec, Saved
from vmjob.machine.qemu.driver import QemuDriver

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

#: A job of vboxwrapper's: reads its note, leaves one for the host, tells that it has.
JOB = """
import fcntl, os, stat, struct, sys
with open("/dev/fd0", "r+b", buffering=0) as disk:
    assert stat.S_ISBLK(os.fstat(disk.fileno()).st_mode)
    assert struct.unpack("Q", fcntl.ioctl(disk, 0x80081272, bytes(8))) == (28672,)
    content = disk.read(28672)
    assert len(content) == 28672 and content[28670] == 1, content[28670:]
    note = content[:14335].partition(b"\\0")[0]
    disk.seek(14335)
    disk.write((b"you said " + note)[::-1].ljust(14335, b"\\0"))
    disk.seek(28670)
    disk.write(b"\\0\\1")
"""


async def run(client: AgentClient, argv: list[str], user: str | None = None) -> None:
    async def drop(stream: str, data: bytes) -> None: ...

    assert (await client.follow(await client.start(argv, user=user), drop)).exit_code == 0


async def test_a_job_answers_through_its_mailbox_also_after_a_restore(
        vm_home: Home, vm_shape: MachineSpec) -> None:
    checkpoints = vm_home.root / "checkpoints"
    checkpoints.mkdir()
    async with open_session(vm_home, QemuDriver(), vm_shape) as session:
        assert session.machine.spec.template is not None
        box = Mailbox(session.client, isolated=True)
        await box.put(b"first")
        await run(session.client, ["python3", "-c", JOB])
        assert await box.read() == b"you said first"[::-1]
        await box.put(b"second")
        # What the kernel keeps of it in memory as a cache is not all that there is.
        await session.client.settle()
        kept = await session.machine.checkpoint(checkpoints, "1", lambda: None)
    directory = vm_home.machines / "again"
    directory.mkdir()
    machine = await QemuDriver().create(replace(
        vm_shape, id="again", directory=directory, boot=None, saved=Saved(checkpoints, kept.state)))
    client = AgentClient(await machine.start())
    try:
        await client.hello(60)
        box = Mailbox(client, isolated=True)
        assert await box.read() is None
        await run(client, ["python3", "-c", JOB])
        assert await box.read() == b"you said second"[::-1]
        assert await box.read() is None
    finally:
        client.close()
        await machine.destroy()


async def test_a_machine_has_no_mailbox_before_it_got_one(vm_home: Home,
                                                          vm_shape: MachineSpec) -> None:
    async with open_session(vm_home, QemuDriver(), vm_shape) as session:
        await run(session.client, ["sh", "-c", "! test -e /dev/fd0; ! head -c 1 /dev/ram0"])
        with pytest.raises(GuestRefused):
            await Mailbox(session.client, isolated=True).read()


async def test_a_job_that_is_root_cannot_make_the_host_wait_for_its_mailbox(
        vm_home: Home, vm_shape: MachineSpec) -> None:
    async with open_session(vm_home, QemuDriver(), vm_shape) as session:
        box = Mailbox(session.client, isolated=True)
        await box.put(b"")
        await run(session.client, ["sh", "-c", "rm /dev/fd0; mkfifo /dev/fd0"], user="root")
        with pytest.raises(GuestRefused):
            await box.read()
