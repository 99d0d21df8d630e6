"""A job's ports on this computer, opened for as long as its machine's process lives."""

from __future__ import annotations

from typing import Literal

from vmjob.errors import PortTaken
from vmjob.grid.contract import Grid
from vmjob.job.model import Job, Network
from vmjob.machine.contract import Machine

__all__ = ["announce", "open_ports"]

#: What is announced -> its file, and the element in it; those of vboxwrapper.
FILES = {"web": ("vbox_webapi.xml", "webapi"),
         "console": ("vbox_remote_desktop.xml", "remote_desktop")}


def announce(what: Literal["web", "console"], port: int, job: Job, grid: Grid) -> None:
    """Tell other programs of this computer a port, in a file, if the job wants that.

    Written anew by each process that carries the job: ports change.
    """
    if job.announce is None:
        return
    name, element = FILES[what]
    beside = job.announce / f"{name}.new"
    try:
        beside.unlink(missing_ok=True)  # a link there would lead elsewhere
        with beside.open("x", encoding="ascii") as file:
            file.write(f"<{element}>\n    <host_port>{port}</host_port>\n</{element}>\n")
        beside.replace(job.announce / name)
    except OSError as error:
        grid.warning(f"cannot write {job.announce / name}: {error.strerror}")


async def open_ports(machine: Machine, job: Job, grid: Grid, *, remote: bool) -> None:
    """Open what the job asks for, and tell where it is; for other computers only with ``remote``.

    A port that somebody else has is replaced by one that is free: two jobs of one kind ask for the
    same. Raises what `Machine.forward` raises for other causes.
    """
    if job.forwards and job.network is Network.NONE:
        grid.warning("the job asks for ports but has no network; they are not opened")
        return
    for forward in job.forwards:
        anywhere = forward.remote and remote
        if forward.remote and not remote:
            grid.warning(f"port {forward.guest_port} of the job is opened for this computer only; "
                         "--allow-remote-ports opens it for others")
        try:
            port = await machine.forward(forward.host_port, forward.guest_port, remote=anywhere)
        except PortTaken:
            if not forward.host_port:
                raise
            port = await machine.forward(0, forward.guest_port, remote=anywhere)
            grid.warning(f"port {forward.host_port} of this computer is taken; the job's port "
                         f"{forward.guest_port} is at {port}")
        if forward.web:
            grid.address("web", f"http://127.0.0.1:{port}/")
            announce("web", port, job, grid)
        else:
            grid.address("port", f"127.0.0.1:{port} leads to {forward.guest_port}")
