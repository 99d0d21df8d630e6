"""What passes the network of a machine on a real VirtualBox is counted, and can be limited."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import replace

import anyio
import pytest

from tests.conftest import open_descriptors
from tests.servers import ENDLESS, EXCHANGER, exchange, server_in
from tests.vm.test_virtualbox import PATIENCE
from tests.vm.test_virtualbox_saved import answering, continued
from vmjob.engine.control import Control
from vmjob.engine.session import beside
from vmjob.grid.boinc import GlobalPreferences
from vmjob.guest.client import Stream
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec
from vmjob.machine.virtualbox.driver import VirtualBoxMachine
from vmjob.wrapper.orders import Orders

pytestmark = [pytest.mark.anyio, pytest.mark.vm]


@pytest.fixture
def copied(home: Home, in_virtualbox: MachineSpec) -> MachineSpec:
    return replace(in_virtualbox, id="m1", directory=home.machines / "m1")


async def test_what_passes_is_counted_on_while_it_is_kept_and_anew_where_it_continues(
        copied: MachineSpec, home: Home) -> None:
    kept = home.root / "checkpoints"
    kept.mkdir()
    async with answering(copied) as (machine, client), server_in(client, EXCHANGER) as guest_port:
        port = await machine.forward(0, guest_port)
        await exchange(machine, port)
        taken = await machine.checkpoint(kept, "c1", lambda: None)
        await exchange(machine, port)
        assert machine.traffic()[0] > 600_000
    async with answering(continued(copied, kept, taken.state)) as (machine, client):
        assert machine.traffic()[0] < 300_000
        await exchange(machine, await machine.forward(0, guest_port))


async def test_a_machine_whose_packets_nobody_counts_can_be_stopped(copied: MachineSpec) -> None:
    """It stands, as VirtualBox waits until somebody reads."""
    before = open_descriptors()
    async with answering(copied) as (machine, client):
        traffic = machine._traffic
        assert traffic is not None
        async with server_in(client, ENDLESS) as guest_port:
            port = await machine.forward(0, guest_port)
            asyncio.get_running_loop().remove_reader(traffic._pipe._ours)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with suppress(TimeoutError):
                while await asyncio.wait_for(reader.read(65536), 2):
                    pass
            writer.close()
        with anyio.fail_after(60):
            await machine.stop()
    assert open_descriptors() <= before


#: Sends two packets of 1000 bytes to a host's UDP port in the name of VirtualBox's NAT: one as it
#: should be but for that, and one as if it were for the guest itself.
PRETENDER = """
import socket, struct, sys
GATEWAY, OWN = bytes.fromhex("525400123500"), bytes.fromhex("525400766d6a")
line = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
line.bind(([name for _, name in socket.if_nameindex() if name != "lo"][0], 0))
for target in sys.argv[1], "10.0.2.15":
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 1000, 7, 0, 64, socket.IPPROTO_UDP, 0,
                       socket.inet_aton("10.0.2.15"), socket.inet_aton(target))
    total = sum(struct.unpack("!10H", head))
    total = ~((total & 0xffff) + (total >> 16)) & 0xffff
    data = struct.pack("!HHHH", 4000, int(sys.argv[2]), 980, 0).ljust(980, b"x")
    head = head[:10] + struct.pack("!H", total) + head[12:]
    line.send(OWN + GATEWAY + b"\\x08\\x00" + head + data)
"""


async def test_a_guest_that_sends_in_anothers_name_is_charged_or_not_carried(
        copied: MachineSpec) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this computer has no address but its loopback's, which no guest reaches")
        host = probe.getsockname()[0]
    with socket.socket(type=socket.SOCK_DGRAM) as heard:
        heard.bind(("0.0.0.0", 0))
        heard.setblocking(False)
        async with answering(copied) as (machine, client):
            before = machine.traffic()
            task = await client.start(["python3", "-c", PRETENDER, host,
                                       str(heard.getsockname()[1])], user="root")
            assert (await client.follow(task, unheard)).exit_code == 0
            with anyio.fail_after(PATIENCE):
                assert len(await asyncio.get_running_loop().sock_recv(heard, 2000)) == 972
            await anyio.sleep(1)  # that nothing else comes can only be waited for
            with pytest.raises(BlockingIOError):
                heard.recv(1)
            sent, received = (now - then
                              for now, then in zip(machine.traffic(), before, strict=True))
            assert sent >= 1014
            assert received >= 2028


async def unheard(stream: Stream, data: bytes) -> None:
    """Nobody wants it."""


async def test_a_volunteers_limit_of_the_network_holds(copied: MachineSpec) -> None:
    limit, seconds = 20_000.0, 15.0
    async with answering(copied) as (machine, client), server_in(client, ENDLESS) as guest_port:
        control = Plugged(machine)
        orders = Orders(control, replace(GlobalPreferences(), max_bytes_sec_up=limit))
        reader, writer = await asyncio.open_connection("127.0.0.1",
                                                       await machine.forward(0, guest_port))
        async with beside(orders.obey()), beside(orders.limit()):
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while await reader.read(65536):
                        pass
        writer.close()
        assert control.pulled
        # Before the cable is pulled, more than is allowed has passed; the line has 0.5 MB/s.
        assert 50_000 < machine.traffic()[0] < 4 * limit * seconds


class Plugged(Control):
    """A job's control with nothing but its machine's network."""

    has_network = True

    def __init__(self, machine: VirtualBoxMachine) -> None:
        super().__init__()
        self._machine = machine
        self.pulled = 0

    async def set_network(self, available: bool) -> None:
        await self._machine.set_network(available)
        self.pulled += not available

    def traffic(self) -> tuple[int, int]:
        return self._machine.traffic()
