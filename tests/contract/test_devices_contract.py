"""One suite for every driver: what some jobs want of a machine beyond the ordinary."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.conftest import awake, lend
from tests.servers import EXCHANGER, exchange, server_in
from vmjob.errors import NotSupported, PortTaken, UsageError, WrongState
from vmjob.guest.client import AgentClient, Stream
from vmjob.home import Home
from vmjob.machine.contract import (
    Attached,
    BootParts,
    Driver,
    Foreign,
    Machine,
    MachineSpec,
    Saved,
)
from vmjob.machine.fake import FakeDriver, SimulatedDriver
from vmjob.machine.qemu.driver import QemuDriver
from vmjob.machine.virtualbox.driver import VirtualBoxDriver

pytestmark = pytest.mark.anyio

#: Seconds for a machine's agent to answer; TCG on a loaded computer.
BOOT = 120.0
DRIVERS: dict[str, Callable[[], Driver]] = {
    "fake": FakeDriver, "simulated": SimulatedDriver, "qemu": QemuDriver,
    "virtualbox": VirtualBoxDriver}


@pytest.fixture(params=["fake", "simulated", pytest.param("qemu", marks=pytest.mark.vm),
                        pytest.param("virtualbox", marks=pytest.mark.vm)])
def driver(request: pytest.FixtureRequest) -> Driver:
    if request.param == "virtualbox":
        request.getfixturevalue("virtualbox")
    return DRIVERS[request.param]()


@pytest.fixture
def spec(driver: Driver, home: Home, request: pytest.FixtureRequest) -> MachineSpec:
    directory = home.machines / "m1"
    directory.mkdir()
    if driver.name not in ("qemu", "virtualbox"):
        return MachineSpec(id="m1", directory=directory, boot=None)
    image = request.getfixturevalue("default_image")
    lend(image, home)
    if driver.name == "virtualbox":
        return replace(request.getfixturevalue("in_virtualbox"), id="m1", directory=directory)
    return MachineSpec(id="m1", directory=directory, boot=BootParts.of(image), memory_mb=256,
                       accelerator="tcg")


@asynccontextmanager
async def running(machine: Machine) -> AsyncIterator[AgentClient]:
    """The machine started, its agent answering."""
    client = AgentClient(await machine.start(), slowness=machine.spec.slowness)
    try:
        await awake(machine, client, BOOT)
        yield client
    finally:
        client.close()
        await machine.destroy()


def bare(spec: MachineSpec) -> MachineSpec:
    """The same without a network and a display."""
    return replace(spec, template=None, network="none", display=False)


@asynccontextmanager
async def begun(machine: Machine) -> AsyncIterator[None]:
    """The machine started; nobody waits for its agent."""
    try:
        for lane in (await machine.start()).values():
            lane.close()
        yield
    finally:
        await machine.destroy()


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
    if driver.name in ("fake", "simulated"):
        pytest.skip("nobody counts")
    machine = await driver.create(replace(spec, network="nat"))
    assert machine.traffic() == (0, 0)
    async with running(machine) as client:
        async with server_in(client, EXCHANGER) as guest_port:
            port = await machine.forward(0, guest_port)
            await exchange(machine, port)
            await machine.suspend()
            await machine.resume()
            await machine.set_network(False)
            await machine.set_network(True)
            await exchange(machine, port)
        sent, received = machine.traffic()
        await machine.stop()
        after = machine.traffic()
        assert after[0] >= sent > 600_000
        assert after[1] >= received > 100_000


async def test_a_machine_without_a_network_has_no_cable(driver: Driver,
                                                        spec: MachineSpec) -> None:
    async with begun(machine := await driver.create(bare(spec))):
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
        try:
            assert await machine.forward(ours, 81) == ours
        except PortTaken:  # by another process, between the two; hardly twice
            ours = await machine.forward(0, 80)
            await machine.unforward(ours)
            assert await machine.forward(ours, 81) == ours


async def test_a_machine_without_a_network_has_no_forwards(driver: Driver,
                                                           spec: MachineSpec) -> None:
    machine = await driver.create(bare(spec))
    with pytest.raises(WrongState):
        await machine.forward(0, 80)
    async with begun(machine):
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
    async with begun(machine := await driver.create(bare(spec))):
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


async def test_a_driver_that_has_no_disks_besides_says_so(driver: Driver, spec: MachineSpec,
                                                          tmp_path: Path) -> None:
    if driver.capabilities.attached:
        pytest.skip("this driver has disks besides")
    with pytest.raises(NotSupported):
        await driver.create(replace(spec, attached=Attached(tmp_path / "disk")))
    assert list(spec.directory.iterdir()) == []


#: What the guest sees of its user's disks.
LOOK = """
import sys
sys.path.insert(0, "/usr/lib/vmjob")
from vmjob_agent import system
for part in ("disk", "iso", "cache_disk"):
    path, kind = system._find(part)
    if kind == "vdi":
        path = system._opened(part) if "map" in sys.argv else "/dev/dm-0"
    with open(path, "rb") as disk:
        print(part, kind, disk.read(4).decode())
"""


async def test_what_its_user_brings_is_there_besides_also_after_a_checkpoint(
        driver: Driver, spec: MachineSpec, home: Home, tmp_path: Path) -> None:
    if not driver.capabilities.attached:
        pytest.skip("this driver has no disks besides")
    for name in ("disk", "iso", "cache"):
        (tmp_path / name).write_bytes(name.encode().ljust(1 << 20, b"\n"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vdi", tmp_path / "cache",
                    tmp_path / "cache.vdi"], check=True)
    attached = Attached(tmp_path / "disk", tmp_path / "iso", tmp_path / "cache.vdi")
    before = {path: path.read_bytes() for path in attached.parts().values()}
    seen = b"disk raw disk\niso raw iso\n\ncache_disk vdi cach\n"
    kept = home.root / "kept"
    kept.mkdir()
    machine = await driver.create(replace(bare(spec), attached=attached))
    async with running(machine) as client:
        assert await looked(client, "map") == seen
        checkpoint = await machine.checkpoint(kept, "1", lambda: None)
    for path, content in before.items():
        assert path.read_bytes() == content
        path.unlink()
    again = replace(bare(spec), directory=home.machines / "m2", boot=None,
                    saved=Saved(kept, checkpoint.state))
    again.directory.mkdir()
    async with running(await driver.create(again)) as client:
        assert await looked(client) == seen


async def looked(client: AgentClient, *words: str) -> bytes:
    said = b""

    async def take(stream: Stream, data: bytes) -> None:
        nonlocal said
        said += data

    task = await client.start(["python3", "-c", LOOK, *words], user="root")
    with anyio.fail_after(BOOT):
        await client.follow(task, take)
    return said
