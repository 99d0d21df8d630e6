"""Ports of this computer that lead to a guest, by QEMU's user-mode network.

QEMU has no QMP command for them; the monitor for people has, and answers in words. It says nothing
when it has opened a port.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from vmjob.errors import MachineError, PortTaken
from vmjob.machine.ports import EVERYWHERE, LOOPBACK, check_ports, why_not
from vmjob.machine.qemu.argv import NETWORK
from vmjob.machine.qemu.monitor import Monitor

__all__ = ["Forwards", "new_port", "rule"]

_OPEN = re.compile(r"TCP\[HOST_FORWARD\] +\d+ +(\S+) +(\d+) +\S+ +(\d+)")


def rule(address: str, host_port: int, guest_port: int | None = None) -> str:
    """QEMU's word for a forward; without the guest's port, for taking it back."""
    ours = f"tcp:{address}:{host_port}"
    return ours if guest_port is None else f"{ours}-:{guest_port}"


def new_port(text: str, address: str, guest_port: int, known: Collection[int]) -> int | None:
    """The port of a forward that is not ``known`` yet, from QEMU's ``info usernet``."""
    for bound, port, guest in _OPEN.findall(text):
        found = (EVERYWHERE if bound == "*" else bound, int(guest))
        if found == (address, guest_port) and int(port) not in known:
            return int(port)
    return None


class Forwards:
    """The forwards of one QEMU process."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        #: Port -> the address that it is bound to.
        self._open: dict[int, str] = {}

    async def add(self, host_port: int, guest_port: int, *, remote: bool) -> int:
        """See `vmjob.machine.contract.Machine.forward`."""
        check_ports(host_port, guest_port)
        address = EVERYWHERE if remote else LOOPBACK
        said = await self._ask(f"hostfwd_add {NETWORK} {rule(address, host_port, guest_port)}")
        if said:
            raise PortTaken(why_not(address, host_port), port=host_port)
        port = host_port or await self._find(address, guest_port)
        self._open[port] = address
        return port

    async def remove(self, host_port: int) -> None:
        """See `vmjob.machine.contract.Machine.unforward`."""
        address = self._open.pop(host_port, None)
        if address is not None:
            await self._ask(f"hostfwd_remove {NETWORK} {rule(address, host_port)}")

    async def _find(self, address: str, guest_port: int) -> int:
        """The port that the kernel chose for what was asked last."""
        port = new_port(await self._ask("info usernet"), address, guest_port, self._open)
        if port is None:
            raise MachineError("QEMU does not say which port it opened")
        return port

    async def _ask(self, line: str) -> str:
        answer = await self._monitor.execute("human-monitor-command", **{"command-line": line})
        return str(answer).strip()
