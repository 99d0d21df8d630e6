"""The agents that go wrong: started in place of the agent where `Faults.needs_impostor` says so.

``python -m vmjob.machine.fake.impostor FAULTS WORKDIR RUNDIR FD...`` is the real agent with
something changed, or a peer that only keeps to the protocol until it has been asked.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from vmjob.guest.agent import __main__ as agent
from vmjob.guest.agent import server, tasks, wire
from vmjob.guest.agent.channel import Channel, Closed, Interrupted
from vmjob.guest.agent.lane import sync_nonce
from vmjob.machine.fake.faults import Faults

#: Exit status of an agent that ends as `Faults.dies_after` asks.
DIED = 70


def main(faults: Faults, arguments: list[str]) -> int:
    """Be what ``faults`` says until the lanes are closed or it says to end."""
    fds = [int(text) for text in arguments[2:]]
    if faults.says is not None:
        for fd in fds:
            os.write(fd, faults.says)
        _stay()
    if faults.answers is not None or faults.endless_head:
        return _answer(fds[0], faults)
    if faults.protocol is not None:
        wire.PROTOCOL_VERSION = wire.OLDEST_PROTOCOL = faults.protocol
    if faults.dies_after is not None:
        _count_requests(faults.dies_after)
    if faults.result is not None:
        _lie(faults.result)
    if faults.endless:
        tasks.TaskTable._finish = _say_nothing  # type: ignore[method-assign]  # noqa: SLF001
    return agent.main(arguments)


def _stay() -> None:
    while True:
        time.sleep(3600)


def _answer(fd: int, faults: Faults) -> int:
    channel = Channel(fd, wire.MAX_REQUEST_PIECE, interruptible=True)
    while True:
        try:
            channel.skip_newlines()
            first = channel.line()
            if nonce := sync_nonce(first):
                channel.write(wire.SYNC_ACK + nonce + b"\n")
                continue
            fields = wire.parse_fields(channel.head())
            channel.exactly(wire.parse_length(fields, wire.MAX_REQUEST_PIECE) or 0)
            if faults.answers is not None:
                channel.write(faults.answers)
            else:
                channel.write(b"HTTP/1.1 200 OK\r\nendless: ")
                while True:
                    channel.write(b"x" * 65536)
        except (Interrupted, wire.ProtocolError):
            continue
        except Closed:
            return 0


def _count_requests(most: int) -> None:
    real = server.Agent._control  # noqa: SLF001 - the agent has no other place to go wrong at
    left = most

    def counted(self: server.Agent, request: Any) -> bytes | None:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(DIED)
        return real(self, request)

    server.Agent._control = counted  # type: ignore[method-assign]  # noqa: SLF001


def _say_nothing(self: tasks.TaskTable, task: tasks.Task) -> None:
    """A command has ended, and nobody gets to know."""


def _lie(result: Mapping[str, Any]) -> None:
    real = tasks.TaskTable._finish  # noqa: SLF001

    def finish(self: tasks.TaskTable, task: tasks.Task) -> None:
        changed, self._changed = self._changed, lambda: None
        real(self, task)
        self._changed = changed
        assert task.end is not None
        task.end.update(result)
        changed()

    tasks.TaskTable._finish = finish  # type: ignore[method-assign]  # noqa: SLF001


if __name__ == "__main__":
    sys.exit(main(Faults.decoded(sys.argv[1]), sys.argv[2:]))
