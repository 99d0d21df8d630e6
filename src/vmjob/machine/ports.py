"""TCP ports of this computer that are to lead into a machine."""

from __future__ import annotations

import socket

from vmjob.errors import PortTaken, UsageError

__all__ = ["EVERYWHERE", "LOOPBACK", "check_ports", "free_port", "why_not"]

LOOPBACK = "127.0.0.1"
#: All addresses of this computer, IPv4 only as the hypervisors' own networks.
EVERYWHERE = ""


def check_ports(host_port: int, guest_port: int) -> None:
    """Raise `UsageError` for numbers that are no TCP ports."""
    if not 0 <= host_port <= 65535 or not 1 <= guest_port <= 65535:
        raise UsageError(f"{host_port}:{guest_port} are not two TCP ports")


def why_not(address: str, port: int) -> str:
    """Why a port cannot be had, which no hypervisor says: the kernel is asked again."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except PermissionError:
            return f"this user may not open port {port} of this computer"
        except OSError:
            pass
    return f"port {port} of this computer is in use"


def free_port(address: str, port: int) -> int:
    """A port that can be had now, ``port`` or for 0 any; raises `PortTaken`."""
    with socket.socket() as probe:
        # As a server does: not a port that somebody listens at, but one that was left just now.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise PortTaken(why_not(address, port), port=port) from error
        return int(probe.getsockname()[1])
