"""The host's end of a machine's lanes: a thread that carries them over its serial line."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from vmjob.guest.agent.trunk import (
    EXCHANGE_MARK,
    EXCHANGE_SIZE,
    Broken,
    Exchange,
    Trunk,
)

__all__ = ["Carrier", "make_exchange"]


def make_exchange(path: Path) -> None:
    """Make the disk that long pieces go over; thin, of fixed size."""
    with path.open("xb") as file:
        file.write(EXCHANGE_MARK)
        file.truncate(EXCHANGE_SIZE)


class Carrier:
    """Carries ``lanes`` over ``line`` until `close`, or until the machine's end; owns all of them.

    ``exchange`` is the file made by `make_exchange`. A thread, because a disk has no other kind of
    wait; it wakes up only when there is something to carry.
    """

    def __init__(self, line: socket.socket, exchange: Path,
                 lanes: Sequence[socket.socket]) -> None:
        self._line = line
        self._lanes = list(lanes)
        self._exchange = os.open(exchange, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._stop, self._told = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="vmjob-lanes", daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        trunk = Trunk(self._line.fileno(), Exchange(self._exchange, host=True),
                      [lane.fileno() for lane in self._lanes], host=True)
        try:
            trunk.serve(self._stop)
        except (Broken, OSError):
            pass  # the guest is gone, or not to be trusted: its lanes end
        finally:
            # Not closed: their numbers stay ours until `close`.
            for each in (self._line, *self._lanes):
                try:
                    each.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def close(self) -> None:
        """End, and close everything. Idempotent."""
        if self._told < 0:
            return
        os.close(self._told)
        self._told = -1
        self._thread.join()
        for each in (self._line, *self._lanes):
            each.close()
        os.close(self._stop)
        os.close(self._exchange)
