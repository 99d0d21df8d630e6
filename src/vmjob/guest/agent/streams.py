"""A job's output as the host sees it: bytes at offsets, kept until the host has them."""

from __future__ import annotations

from .wire import STREAM_WINDOW


class Window:
    """The part of one output stream that the host has not acknowledged.

    It holds at most `STREAM_WINDOW` bytes; while it is full the job's pipe is not
    read and the job waits, so memory stays bounded and nothing is lost. Because bytes
    stay until they are acknowledged, a host that comes back (a new connection, a
    restored checkpoint) continues at its own offset.
    """

    def __init__(self) -> None:
        self.base = 0
        self.ended = False
        self._held = bytearray()

    @property
    def end(self) -> int:
        """Offset of the next byte that the job will write."""
        return self.base + len(self._held)

    @property
    def room(self) -> int:
        return STREAM_WINDOW - len(self._held)

    def append(self, data: bytes) -> None:
        self._held += data

    def acknowledge(self, offset: int) -> None:
        """The host has everything before ``offset``; an offset outside the window is ignored."""
        if self.base < offset <= self.end:
            del self._held[:offset - self.base]
            self.base = offset

    def read(self, offset: int, most: int) -> tuple[int, bytes]:
        """At most ``most`` bytes from ``offset`` or, if they are gone, from the oldest held."""
        offset = min(max(offset, self.base), self.end)
        at = offset - self.base
        return offset, bytes(self._held[at:at + most])
