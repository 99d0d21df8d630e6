"""A client that ends may fail to say so: then its silence does."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmjob.grid.boinc import Event, InitData, Quit, Suspend
from vmjob.grid.boinc.channels import LENGTH, Channel, Channels
from vmjob.grid.boinc.incoming import MOST_SILENT, Incoming
from vmjob.grid.boinc.watch import ClientWatch


@pytest.fixture
def heard() -> list[Event]:
    return []


@pytest.fixture
def channels() -> Channels:
    return Channels(memoryview(bytearray(LENGTH)))


@pytest.fixture
def incoming(tmp_path: Path, channels: Channels, heard: list[Event]) -> Incoming:
    return Incoming(tmp_path, InitData(), channels, ClientWatch(0), heard.append)


def silence(incoming: Incoming, looks: int) -> None:
    for _ in range(looks):
        incoming.poll()


def test_a_client_that_has_fallen_silent_wants_us_to_leave(
        incoming: Incoming, channels: Channels, heard: list[Event]) -> None:
    channels.put(Channel.HEARTBEAT, "<heartbeat/>")
    silence(incoming, MOST_SILENT)
    assert Quit() not in heard
    silence(incoming, 3 * MOST_SILENT)
    assert heard.count(Quit()) == 1


def test_a_client_that_ends_before_its_first_heartbeat_has_spoken_too(
        incoming: Incoming, channels: Channels, heard: list[Event]) -> None:
    assert channels.put(Channel.PROCESS_CONTROL_REQUEST, "<suspend/>")
    silence(incoming, MOST_SILENT + 1)
    assert heard == [Suspend(), Quit()]


def test_a_client_that_never_spoke_is_not_silent(incoming: Incoming, heard: list[Event]) -> None:
    silence(incoming, 3 * MOST_SILENT)
    assert Quit() not in heard


def test_a_client_that_speaks_now_and_then_is_not_silent(
        incoming: Incoming, channels: Channels, heard: list[Event]) -> None:
    for _ in range(5):
        channels.put(Channel.HEARTBEAT, "<heartbeat/>")
        silence(incoming, MOST_SILENT)
    assert Quit() not in heard
