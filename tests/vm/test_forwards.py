"""A real server in a real guest, reached from this computer."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from vmjob.engine.session import open_session
from vmjob.guest.client import AgentClient, Stream
from vmjob.home import Home
from vmjob.machine.contract import Machine, MachineSpec, Saved
from vmjob.machine.qemu.driver import QemuDriver

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

PATIENCE = 60.0


async def fetch(port: int, path: str) -> bytes:
    with anyio.fail_after(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
            return await reader.read()
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def served(machine: Machine, text: str) -> None:
    port = await machine.forward(0, 8000)
    answer = await fetch(port, "page")
    assert answer.startswith(b"HTTP/1.0 200 OK")
    assert answer.endswith(text.encode())


async def test_a_web_server_answers_in_a_copy_and_again_after_a_restore(
        vm_home: Home, vm_shape: MachineSpec, tmp_path: Path) -> None:
    checkpoints = tmp_path / "home" / "checkpoints"
    checkpoints.mkdir()
    async with open_session(vm_home, QemuDriver(), replace(vm_shape, network="nat")) as session:
        assert session.machine.spec.template is not None
        listening = anyio.Event()

        async def take(stream: Stream, data: bytes) -> None:
            listening.set()

        client = session.client
        # -u: it says when it listens.
        task = await client.start(
            ["sh", "-c", "echo 'a page' > page; exec python3 -u -m http.server 8000"])
        async with anyio.create_task_group() as group:
            group.start_soon(client.follow, task, take)
            with anyio.fail_after(PATIENCE):
                await listening.wait()
            await served(session.machine, "a page\n")
            kept = await session.machine.checkpoint(checkpoints, "1", lambda: None)
            await served(session.machine, "a page\n")
            group.cancel_scope.cancel()
    directory = vm_home.machines / "again"
    directory.mkdir()
    machine = await QemuDriver().create(
        replace(vm_shape, id="again", directory=directory, boot=None, network="nat",
                saved=Saved(checkpoints, kept.state)))
    client = AgentClient(await machine.start())
    try:
        await client.hello(PATIENCE)
        await client.set_clock(bytes(64))
        await served(machine, "a page\n")
    finally:
        client.close()
        await machine.destroy()
