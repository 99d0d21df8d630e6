"""What passes a machine's network cable, from what its hypervisor tells of each packet, in a pipe.

Nothing in the guest is asked: it could say what it likes. Hypervisors write the format of packet
captures (pcap): a header of 24 bytes, then for each packet one of 16, which ends with the packet's
length, and the packet, or as much of it as was asked for. Reading that takes no library: these two
numbers are all that is looked at here, and both are bounded, as a guest makes packets.

A pipe that nobody empties would stop the machine, so it is large, and read by the event loop as
soon as there is anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
from collections.abc import Callable

__all__ = ["Capture", "CapturePipe"]

FILE_HEADER, PACKET_HEADER = 24, 16
#: ``struct pcap_sf_pkthdr`` of the computer's own byte order: seconds, microseconds, bytes that
#: follow, bytes of the packet.
_PACKET = struct.Struct("=IIII")
#: Bytes that a pipe holds, where that is allowed: 60,000 headers of packets, 700 whole ones.
PIPE_SIZE = 1 << 20
READ = 1 << 16
#: Bytes of one packet; more is no packet.
MOST_PACKET = 1 << 20


class Capture:
    """Cuts a stream of a capture into packets, however it comes.

    ``packet`` is told of each: its length, and its first ``head`` bytes or as many as are there.
    """

    def __init__(self, packet: Callable[[int, bytes], None], *, head: int = 0) -> None:
        self._packet = packet
        self._head = head
        self._rest = b""
        self._skip = FILE_HEADER
        self._broken = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raises `ValueError` once there was what is no capture."""
        if self._broken:
            raise ValueError("it was no capture before")
        data = self._rest + data
        size = len(data)
        at = min(self._skip, size)
        self._skip -= at
        while not self._skip and at + PACKET_HEADER <= size:
            _, _, follows, length = _PACKET.unpack_from(data, at)
            if follows > MOST_PACKET or length > MOST_PACKET:
                self._broken, self._rest = True, b""
                raise ValueError("no packet is that long")
            begin = at + PACKET_HEADER
            known = begin + min(follows, self._head)
            if known > size:
                break
            self._packet(length, data[begin:known])
            at = min(begin + follows, size)
            self._skip = begin + follows - at
        self._rest = data[at:]


class CapturePipe:
    """A pipe that a hypervisor writes a capture into, read to the end. Close it.

    ``theirs`` is the end to write to, until `given`.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._ours, self.theirs = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # it is a matter of speed only
            fcntl.fcntl(self._ours, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        os.set_blocking(self._ours, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ours, self._read)

    def given(self) -> None:
        """The hypervisor has its end now."""
        if self.theirs >= 0:
            os.close(self.theirs)
            self.theirs = -1

    def close(self) -> None:
        """Take what has come, and read no more; a second time is fine."""
        self.given()
        if self._ours < 0:
            return
        for _ in range(PIPE_SIZE // READ + 1):  # somebody else may write for ever
            if not self._read():
                break
        if not self._loop.is_closed():
            self._loop.remove_reader(self._ours)
        os.close(self._ours)
        self._ours = -1

    def _read(self) -> bool:
        """Whether there was anything."""
        try:
            data = os.read(self._ours, READ)
        except BlockingIOError:
            return False
        if not data and not self._loop.is_closed():
            self._loop.remove_reader(self._ours)
        with contextlib.suppress(ValueError):  # the machine goes on; the count does not
            self._capture.feed(data)
        return bool(data)
