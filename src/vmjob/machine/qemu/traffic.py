"""How much passes a machine's network cable: QEMU tells of each packet, in a pipe for each way.

By ``filter-dump``, which writes as much of each packet as it is asked for: one byte.
"""

from __future__ import annotations

from typing import Self

from vmjob.machine.capture import Capture, CapturePipe

__all__ = ["Traffic"]


class _Way:
    """One way, and what has passed."""

    def __init__(self) -> None:
        self.total = 0
        self.pipe = CapturePipe(Capture(self._count))

    def _count(self, length: int, head: bytes) -> None:
        self.total += length


class Traffic:
    """Two pipes and what came through them. Close it."""

    def __init__(self, sent: _Way, received: _Way) -> None:
        self._sent = sent
        self._received = received

    @classmethod
    def opened(cls) -> Self:
        """Pipes for a QEMU that is about to start."""
        return cls(_Way(), _Way())

    @property
    def inherited(self) -> tuple[int, int]:
        """What QEMU writes to: from the guest, to the guest."""
        return self._sent.pipe.theirs, self._received.pipe.theirs

    def given(self) -> None:
        """QEMU has its ends now."""
        self._sent.pipe.given()
        self._received.pipe.given()

    def bytes(self) -> tuple[int, int]:
        """Bytes that the guest has sent, and those that it was sent."""
        return self._sent.total, self._received.total

    def close(self) -> None:
        """Stop counting; a second time is fine."""
        self._sent.pipe.close()
        self._received.pipe.close()
