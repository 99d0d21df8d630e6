"""One suite for every driver: what some jobs want of a machine beyond the ordinary."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.conftest import lend
from vmjob.errors import NotSupported, PortTaken, UsageError, WrongState
from vmjob.guest.client import AgentClient, Stream
from vmjob.home import Home
from vmjob.machine.contract import BootParts, Driver, Foreign, Machine, MachineSpec
from vmjob.machine.fake import FakeDriver, SimulatedDriver
from vmjob.machine.qemu.driver import QemuDriver

pytestmark = pytest.mark.anyio

#: Seconds for a machine's agent to answer; TCG on a loaded computer.
BOOT = 120.0
DRIVERS: dict[str, Callable[[], Driver]] = {
    "fake": FakeDriver, "simulated": SimulatedDriver, "qemu": QemuDriver}

#: Says which port it listens at, then answers every connection with what it was sent, doubled.
SERVER = """
import socket
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
while True:
    connection, _ = server.accept()
    with connection:
        connection.sendall(connection.recv(100) * 2)
"""


@pytest.fixture(params=["fake", "simulated", pytest.param("qemu", marks=pytest.mark.vm)])
def driver(request: pytest.FixtureRequest) -> Driver:
    return DRIVERS[request.param]()


@pytest.fixture
def spec(driver: Driver, home: Home, request: pytest.FixtureRequest) -> MachineSpec:
    directory = home.machines / "m1"
    directory.mkdir()
    if driver.name != "qemu":
        return MachineSpec(id="m1", directory=directory, boot=None)
    image = request.getfixturevalue("default_image")
    lend(image, home)
    return MachineSpec(id="m1", directory=directory, boot=BootParts.of(image), memory_mb=256,
                       accelerator="tcg")


@asynccontextmanager
async def running(machine: Machine) -> AsyncIterator[AgentClient]:
    """The machine started, its agent answering."""
    client = AgentClient(await machine.start())
    try:
        await client.hello(BOOT)
        yield client
    finally:
        client.close()
        await machine.destroy()


@asynccontextmanager
async def server_in(client: AgentClient) -> AsyncIterator[int]:
    """A server in the machine; its port."""
    told = anyio.Event()
    said = b""

    async def take(stream: Stream, data: bytes) -> None:
        nonlocal said
        said += data
        if b"\n" in said:
            told.set()

    task = await client.start(["python3", "-u", "-c", SERVER])
    async with anyio.create_task_group() as group:
        group.start_soon(client.follow, task, take)
        with anyio.fail_after(BOOT):
            await told.wait()
        yield int(said)
        group.cancel_scope.cancel()


async def ask(port: int, address: str = "127.0.0.1") -> bytes:
    """What a server answers."""
    with anyio.fail_after(30):
        reader, writer = await asyncio.open_connection(address, port)
        try:
            writer.write(b"hello")
            return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()


async def test_a_forward_leads_to_a_server_in_the_machine_until_it_is_taken_back(
        driver: Driver, spec: MachineSpec) -> None:
    if driver.name == "simulated":
        pytest.skip("no program of a simulated machine listens")
    machine = await driver.create(replace(spec, network="nat"))
    async with running(machine) as client, server_in(client) as guest_port:
        port = await machine.forward(0, guest_port)
        other = await machine.forward(0, guest_port)
        assert await ask(port) == b"hellohello"
        assert await ask(other) == b"hellohello"
        await machine.unforward(port)
        await machine.unforward(port)
        with pytest.raises(ConnectionRefusedError):
            await ask(port)
        assert await ask(other) == b"hellohello"
    with pytest.raises(ConnectionRefusedError):
        await ask(other)


async def test_a_forward_is_for_this_computer_only_unless_it_is_remote(
        driver: Driver, spec: MachineSpec) -> None:
    async with running(machine := await driver.create(replace(spec, network="nat"))):
        port = await machine.forward(0, 80)
        # The same computer by another address of its: only what is bound to all of them is there.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 10)
        remote = await machine.forward(0, 80, remote=True)
        socket.create_connection(("127.0.0.2", remote), 10).close()


async def test_nothing_passes_while_the_networks_cable_is_pulled(
        driver: Driver, spec: MachineSpec) -> None:
    if driver.name == "simulated":
        pytest.skip("no program of a simulated machine listens")
    machine = await driver.create(replace(spec, network="nat"))
    async with running(machine) as client, server_in(client) as guest_port:
        port = await machine.forward(0, guest_port)
        assert await ask(port) == b"hellohello"
        await machine.set_network(False)
        async with anyio.create_task_group() as group:
            answers: list[bytes] = []

            async def ask_meanwhile() -> None:
                answers.append(await ask(port))

            group.start_soon(ask_meanwhile)
            await anyio.sleep(1)  # that nothing comes can only be waited for
            assert answers == []
            await machine.set_network(True)
        assert answers == [b"hellohello"]


async def test_traffic_is_counted_each_way(driver: Driver, spec: MachineSpec) -> None:
    if driver.name != "qemu":
        pytest.skip("nobody counts")
    machine = await driver.create(replace(spec, network="nat"))
    heard = 0

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        while data := await reader.read(65536):
            heard += len(data)
        writer.close()

    async with running(machine) as client, await asyncio.start_server(hear, "127.0.0.1") as server:
        before = machine.traffic()
        port = server.sockets[0].getsockname()[1]
        task = await client.start(["python3", "-c", ("import socket\n"
                                   f"s = socket.create_connection(('10.0.2.2', {port}))\n"
                                   "s.sendall(bytes(300000))\ns.close()")])
        with anyio.fail_after(BOOT):
            end = await client.follow(task, _unheard)
        assert (end.exit_code, heard) == (0, 300_000)
        sent, received = (now - then for now, then in zip(machine.traffic(), before, strict=True))
        assert 300_000 < sent < 400_000
        assert 1000 < received < 60_000


async def _unheard(stream: Stream, data: bytes) -> None:
    """Nobody wants it."""


async def test_a_machine_without_a_network_has_no_cable(driver: Driver,
                                                        spec: MachineSpec) -> None:
    async with running(machine := await driver.create(spec)):
        with pytest.raises(NotSupported):
            await machine.set_network(False)


async def test_a_port_that_is_taken_is_told_and_another_can_be_had(
        driver: Driver, spec: MachineSpec) -> None:
    async with running(machine := await driver.create(replace(spec, network="nat"))):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            number = taken.getsockname()[1]
            with pytest.raises(PortTaken, match=str(number)) as caught:
                await machine.forward(number, 80)
            assert caught.value.retryable
        ours = await machine.forward(0, 80)
        with pytest.raises(PortTaken):
            await machine.forward(ours, 81)
        assert await machine.forward(0, 80) != ours
        await machine.unforward(ours)
        assert await machine.forward(ours, 81) == ours


async def test_a_machine_without_a_network_has_no_forwards(driver: Driver,
                                                           spec: MachineSpec) -> None:
    machine = await driver.create(spec)
    with pytest.raises(WrongState):
        await machine.forward(0, 80)
    async with running(machine):
        with pytest.raises(NotSupported):
            await machine.forward(0, 80)


async def test_what_is_no_port_is_refused(driver: Driver, spec: MachineSpec) -> None:
    async with running(machine := await driver.create(replace(spec, network="nat"))):
        for host, guest in ((-1, 80), (65536, 80), (0, 0), (0, 65536)):
            with pytest.raises(UsageError):
                await machine.forward(host, guest)


async def test_a_screen_is_seen_on_loopback_with_a_password_of_this_process(
        driver: Driver, spec: MachineSpec) -> None:
    passwords = set()
    for number in range(2):
        again = replace(spec, directory=spec.directory / str(number), display=True)
        again.directory.mkdir()
        machine = await driver.create(again)
        with pytest.raises(WrongState):
            machine.console_address()
        async with running(machine):
            found = machine.console_address()
            assert found == machine.console_address()
            assert (found.host, len(found.password)) == ("127.0.0.1", 8)
            passwords.add(found.password)
            async with await anyio.connect_tcp(found.host, found.port) as viewer:
                assert await viewer.receive(12) == b"RFB 003.008\n"
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", found.port), 10)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((found.host, found.port), 10)
    assert len(passwords) == 2


async def test_a_picture_of_the_screen_is_a_file_of_its_own(
        driver: Driver, spec: MachineSpec, tmp_path: Path) -> None:
    machine = await driver.create(replace(spec, display=True))
    picture = tmp_path / "screen.png"
    async with running(machine):
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        await machine.screenshot(picture)
        assert picture.read_bytes().startswith(b"\x89PNG\r\n")
        await machine.suspend()
        await machine.screenshot(picture)
        assert picture.read_bytes().endswith(b"IEND\xaeB`\x82")
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == before | {picture}
        await machine.resume()


async def test_a_machine_without_a_display_shows_nothing(
        driver: Driver, spec: MachineSpec, tmp_path: Path) -> None:
    async with running(machine := await driver.create(spec)):
        with pytest.raises(NotSupported):
            machine.console_address()
        with pytest.raises(NotSupported):
            await machine.screenshot(tmp_path / "screen.png")


async def test_a_driver_that_boots_no_disks_says_so(driver: Driver, spec: MachineSpec,
                                                    tmp_path: Path) -> None:
    if driver.capabilities.foreign:
        pytest.skip("this driver boots disks")
    with pytest.raises(NotSupported):
        await driver.create(replace(spec, foreign=Foreign(tmp_path / "disk")))
    assert list(spec.directory.iterdir()) == []
