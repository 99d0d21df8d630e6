"""What QEMU is told of forwards, and what it says of them."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from vmjob.machine.ports import why_not
from vmjob.machine.qemu.forwards import new_port, rule

SAID = """Hub -1 (net0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[ESTABLISHED]   14       127.0.0.1 40343       10.0.2.15    80     0     0
  TCP[HOST_FORWARD]  11               * 32949       10.0.2.15  8080     0     0
  TCP[HOST_FORWARD]   3       127.0.0.1 40343       10.0.2.15    80     0     0
  TCP[HOST_FORWARD]   5       127.0.0.1 40344       10.0.2.15    80     0     0
"""


def test_a_forward_is_bound_to_the_address_it_names() -> None:
    assert rule("127.0.0.1", 0, 80) == "tcp:127.0.0.1:0-:80"
    assert rule("", 8080, 80) == "tcp::8080-:80"
    assert rule("127.0.0.1", 8080) == "tcp:127.0.0.1:8080"


def test_a_new_port_is_found_among_connections_and_older_ones() -> None:
    assert new_port(SAID, "", 8080, ()) == 32949
    assert new_port(SAID, "127.0.0.1", 8080, ()) is None
    assert new_port(SAID, "127.0.0.1", 80, ()) == 40343
    assert new_port(SAID, "127.0.0.1", 80, {40343}) == 40344


def test_why_a_port_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in why_not("127.0.0.1", taken.getsockname()[1])

    class Refusing(socket.socket):
        def bind(self, address: object) -> None:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket, "socket", Refusing)
    assert "this user may not" in why_not("127.0.0.1", 80)
