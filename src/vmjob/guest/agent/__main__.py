"""Start the agent: on the lanes of a machine, or on given descriptors in a test."""

from __future__ import annotations

import gc
import os
import signal
import sys

from .data import DataServer
from .loop import READ
from .place import MACHINE, Place
from .server import Agent


def main(arguments: list[str] | None = None) -> int:
    """Serve until every lane is closed.

    Without arguments: in a machine. Else: WORKDIR RUNDIR FD... for a process on the host.
    """
    # The shell that started us in the background made them ignored, and jobs would inherit that.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    if arguments:
        place = Place(workdir=arguments[0], run=arguments[1], cgroup=None, user=None)
        fds, carrier = [int(text) for text in arguments[2:]], None
    else:
        from .ports import open_lanes

        place = MACHINE
        fds, carrier = open_lanes()
    control, output, stdin, data = fds
    server = os.fork()
    if server == 0:
        for fd in (control, output, stdin):
            os.close(fd)
        DataServer(place).serve(data)
        os._exit(0)
    os.close(data)
    agent = Agent(place)
    # What is there now stays; looking through it again and again cost 1 ms of a command's 16.
    gc.freeze()
    # One without the other is no agent; when it ends, so does the machine.
    agent.loop.watch(os.pidfd_open(server), READ, lambda events: sys.exit(3))
    if carrier is not None:
        agent.loop.watch(carrier, READ, lambda events: sys.exit(4))
    agent.serve(control, output, stdin)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
