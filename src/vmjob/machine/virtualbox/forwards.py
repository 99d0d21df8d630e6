"""Ports of this computer that lead into a machine, by VirtualBox's NAT."""

from __future__ import annotations

from vmjob.errors import MachineError, PortTaken
from vmjob.machine.ports import EVERYWHERE, LOOPBACK, check_ports, free_port, why_not
from vmjob.machine.virtualbox import definition
from vmjob.machine.virtualbox.log import port_conflicts
from vmjob.machine.virtualbox.manage import Manage
from vmjob.machine.virtualbox.process import Process

__all__ = ["Forwards"]

#: How often another free port is tried, when somebody else takes it in between.
TRIES = 5


class Forwards:
    """The ports of one process of a machine."""

    def __init__(self, manage: Manage, process: Process) -> None:
        self._manage = manage
        self._process = process
        self._open: set[int] = set()

    async def add(self, host_port: int, guest_port: int, *, remote: bool) -> int:
        """See `vmjob.machine.contract.Machine.forward`."""
        check_ports(host_port, guest_port)
        address = EVERYWHERE if remote else LOOPBACK
        for _ in range(1 if host_port else TRIES):
            port = free_port(address, host_port)
            before = self._process.log_size()
            rule = f"p{port},tcp,{address},{port},,{guest_port}"
            await self._manage.run("controlvm", definition.NAME, "natpf1", rule)
            if not port_conflicts(self._process.logged_since(before)):
                self._open.add(port)
                return port
            await self._remove(port)
        raise PortTaken(why_not(address, host_port), port=host_port)

    async def remove(self, host_port: int) -> None:
        """See `vmjob.machine.contract.Machine.unforward`."""
        if host_port in self._open:
            self._open.discard(host_port)
            await self._remove(host_port)

    async def _remove(self, port: int) -> None:
        try:
            await self._manage.run("controlvm", definition.NAME, "natpf1", "delete", f"p{port}")
        except MachineError:
            pass  # it was never there
