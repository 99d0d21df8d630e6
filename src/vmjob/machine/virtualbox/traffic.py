"""How much passes a machine's network cable: VirtualBox writes each packet into a pipe.

By ``--nictrace``, both ways into one, the packets whole. A pipe has no name in any directory, but
one in ``/proc`` that VirtualBox opens as it would open a file.

Which way a packet went is not said, and all in it that the guest has sent is the guest's choice. So
it went to the guest only where that cannot be a lie that pays: VirtualBox's NAT carries nothing out
that is meant for the guest itself. What is neither surely from the guest nor surely to it counts
both ways.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from vmjob.machine.capture import Capture, CapturePipe
from vmjob.machine.virtualbox.definition import GUEST_ADDRESS, MAC_ADDRESS

__all__ = ["Traffic", "ways"]

#: Bytes of a packet that tell its way: an Ethernet header, then one of IPv4 without options.
HEAD = 34
ETHERNET = 14
IPV4, ARP = b"\x08\x00", b"\x08\x06"


def ways(head: bytes) -> tuple[bool, bool]:
    """Whether a packet that begins so counts as sent by the guest, and as sent to it."""
    if len(head) < ETHERNET:
        return False, False  # nobody carries it; VirtualBox itself begins with one
    if head[6:12] == MAC_ADDRESS:
        return True, False
    kind = head[12:14]
    inward = kind == ARP or (kind == IPV4 and head[30:34] == GUEST_ADDRESS)
    return not inward, True


class Traffic:
    """The pipe and what came through it. Close it."""

    def __init__(self) -> None:
        self._sent = self._received = 0
        self._pipe = CapturePipe(Capture(self._count, head=HEAD))

    @contextlib.contextmanager
    def offered(self) -> Iterator[str]:
        """Where VirtualBox is to write to, while it starts; `close` where that fails."""
        try:
            yield f"/proc/{os.getpid()}/fd/{self._pipe.theirs}"
        except BaseException:
            self.close()
            raise
        finally:
            self._pipe.given()

    def counted(self) -> tuple[int, int]:
        """Bytes that the guest has sent, and those that it was sent."""
        return self._sent, self._received

    def close(self) -> None:
        """Stop counting; a second time is fine."""
        self._pipe.close()

    def _count(self, length: int, head: bytes) -> None:
        sent, received = ways(head)
        if sent:
            self._sent += length
        if received:
            self._received += length
