"""Which way a packet went is judged by what the guest cannot gain from."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import open_descriptors
from vmjob.errors import MachineStartFailed
from vmjob.machine.capture import FILE_HEADER
from vmjob.machine.virtualbox.definition import GUEST_ADDRESS, MAC_ADDRESS
from vmjob.machine.virtualbox.traffic import HEAD, Traffic, ways

#: VirtualBox's NAT.
GATEWAY = bytes.fromhex("525400123500")
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
SENT, RECEIVED, BOTH, NEITHER = (True, False), (False, True), (True, True), (False, False)


def packet(source: bytes, target: bytes, kind: int = IPV4, address: str = "10.0.2.15") -> bytes:
    header = target + source + kind.to_bytes(2)
    return (header + bytes(16) + IPv4Address(address).packed).ljust(60, b"\0")


@pytest.mark.parametrize(("way", "head"), [
    (SENT, packet(MAC_ADDRESS, GATEWAY, address="192.0.2.1")),
    (SENT, packet(MAC_ADDRESS, b"\xff" * 6, ARP)),
    (SENT, packet(MAC_ADDRESS, GATEWAY, IPV6)),
    (RECEIVED, packet(GATEWAY, MAC_ADDRESS)),
    (RECEIVED, packet(GATEWAY, MAC_ADDRESS, ARP)),
    (NEITHER, bytes(4)),  # VirtualBox's own first one
])
def test_a_packet_counts_the_way_it_went(way: tuple[bool, bool], head: bytes) -> None:
    assert ways(head[:HEAD]) == way


@pytest.mark.parametrize("head", [
    packet(GATEWAY, MAC_ADDRESS, address="192.0.2.1"),
    packet(bytes(6), GATEWAY, address="10.0.2.3"),
    packet(GATEWAY, MAC_ADDRESS, IPV6),
    packet(GATEWAY, MAC_ADDRESS)[:20],
])
def test_a_guest_that_pretends_to_be_the_network_counts_both_ways(head: bytes) -> None:
    assert ways(head[:HEAD]) == BOTH


@given(st.binary(min_size=14, max_size=HEAD))
def test_what_may_leave_this_computer_always_counts_as_sent(head: bytes) -> None:
    sent, received = ways(head)
    assert sent or received
    if head[12:14] == b"\x08\x00" and head[30:34] != GUEST_ADDRESS:
        assert sent


@pytest.mark.anyio
async def test_both_ways_come_through_one_pipe() -> None:
    traffic = Traffic()
    told = bytes(FILE_HEADER) + struct.pack("=IIII", 0, 0, 4, 60) + bytes(4)
    for head, length in ((packet(MAC_ADDRESS, GATEWAY), 1000), (packet(GATEWAY, MAC_ADDRESS), 70),
                         (packet(GATEWAY, GATEWAY, IPV6), 5)):
        told += struct.pack("=IIII", 0, 0, len(head), length) + head
    with traffic.offered() as path:
        Path(path).write_bytes(told)
    traffic.close()
    traffic.close()
    assert traffic.counted() == (1005, 75)


@pytest.mark.anyio
async def test_nothing_is_left_where_virtualbox_does_not_start() -> None:
    before = open_descriptors()
    traffic = Traffic()
    with pytest.raises(MachineStartFailed), traffic.offered():
        raise MachineStartFailed("it does not start")
    assert open_descriptors() <= before
    assert traffic.counted() == (0, 0)
