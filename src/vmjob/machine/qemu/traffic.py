"""How much passes a machine's network cable: QEMU tells of each packet, in a pipe for each way.

Nothing in the guest is asked: it could say what it likes. QEMU's ``filter-dump`` writes the format
of packet captures (pcap): a header of 24 bytes, then for each packet one of 16, which ends with the
packet's length, and as much of the packet as was asked for. A pipe that nobody empties would stop
the machine, so it is large, and read by the event loop as soon as there is anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
from collections.abc import Callable
from typing import Self

__all__ = ["Counter", "Traffic"]

FILE_HEADER, PACKET_HEADER = 24, 16
#: ``struct pcap_sf_pkthdr`` of the computer's own byte order: seconds, microseconds, bytes that
#: follow, bytes of the packet.
_PACKET = struct.Struct("=IIII")
#: Bytes that a pipe holds, where that is allowed: 60,000 packets.
PIPE_SIZE = 1 << 20
READ = 1 << 16
#: Bytes of one packet; more is no packet.
MOST_PACKET = 1 << 20


class Counter:
    """Adds up the lengths of packets from a stream of a capture, however it is cut."""

    def __init__(self) -> None:
        self.total = 0
        self._rest = b""
        self._skip = FILE_HEADER

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raises `ValueError` for what is no capture."""
        data = self._rest + data
        at = min(self._skip, len(data))
        self._skip -= at
        while not self._skip and at + PACKET_HEADER <= len(data):
            _, _, follows, length = _PACKET.unpack_from(data, at)
            if follows > MOST_PACKET or length > MOST_PACKET:
                raise ValueError("no packet is that long")
            self.total += length
            at += PACKET_HEADER
            step = min(follows, len(data) - at)
            self._skip = follows - step
            at += step
        self._rest = data[at:]


class Traffic:
    """Two pipes and what came through them. Close it."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._theirs: list[int] = []
        self._counters = (Counter(), Counter())

    @classmethod
    def opened(cls) -> Self:
        """Pipes for a QEMU that is about to start."""
        self = cls()
        for _ in range(2):
            ours, theirs = os.pipe2(os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # it is a matter of speed only
                fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
            os.set_blocking(ours, False)
            self._ends.append(ours)
            self._theirs.append(theirs)
        return self

    @property
    def inherited(self) -> tuple[int, int]:
        """What QEMU writes to: from the guest, to the guest."""
        one, other = self._theirs
        return one, other

    def begin(self) -> None:
        """QEMU has its ends now: count."""
        self._close(self._theirs)
        loop = asyncio.get_running_loop()
        for fd, counter in zip(self._ends, self._counters, strict=True):
            loop.add_reader(fd, self._reader(fd, counter))

    def bytes(self) -> tuple[int, int]:
        """Bytes that the guest has sent, and those that it was sent."""
        return self._counters[0].total, self._counters[1].total

    def close(self) -> None:
        """Stop counting; a second time is fine."""
        for fd in self._ends:
            with contextlib.suppress(RuntimeError):  # the loop is gone, or never was
                asyncio.get_running_loop().remove_reader(fd)
        self._close(self._ends)
        self._close(self._theirs)

    def _reader(self, fd: int, counter: Counter) -> Callable[[], None]:
        def read() -> None:
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = os.read(fd, READ)
                with contextlib.suppress(ValueError):  # QEMU goes on; the count does not
                    counter.feed(data)
                if not data:
                    asyncio.get_running_loop().remove_reader(fd)

        return read

    @staticmethod
    def _close(fds: list[int]) -> None:
        while fds:
            os.close(fds.pop())
