"""Messages between a job and the host, in both directions, one line each.

A job writes lines to the FIFO ``$VMJOB_TO_HOST`` and reads lines from the file
``$VMJOB_FROM_HOST``: every language can do both.
"""

from __future__ import annotations

import os
from typing import Any

from .place import Place
from .wire import MAX_INBOX, MAX_MESSAGE, MAX_MESSAGES

#: Bytes of messages in one answer. JSON may write a byte as six, so this is less than half of what
#: `wire.MAX_RESPONSE_BODY` leaves beside output.
MOST_TOLD = 64 * 1024


class Messages:
    """What jobs said, numbered from 1; bounded, the oldest go first."""

    def __init__(self, place: Place) -> None:
        # Opened for both, so that the FIFO never has an end: jobs come and go.
        self.fd = os.open(place.to_host, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._inbox = place.from_host
        self._kept: list[tuple[int, str]] = []
        self._count = 0
        self._partial = b""

    def take(self) -> bool:
        """Read what jobs wrote; whether a whole line came."""
        try:
            self._partial += os.read(self.fd, 65536)
        except BlockingIOError:
            return False
        *lines, self._partial = self._partial.split(b"\n")
        if len(self._partial) > MAX_MESSAGE:
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            self._count += 1
            self._kept.append((self._count, line[:MAX_MESSAGE].decode("utf-8", "replace")))
        del self._kept[:-MAX_MESSAGES]
        return bool(lines)

    def after(self, number: int) -> list[tuple[int, str]]:
        """The messages with a higher number."""
        return [message for message in self._kept if message[0] > number]

    def told(self, number: int) -> dict[str, Any]:
        """The part of an answer that speaks of messages: some after ``number``, the newest's."""
        messages = []
        room = MOST_TOLD
        for message in self.after(number):
            room -= len(message[1]) * 4
            if room < 0:
                break
            messages.append(message)
        return {"messages": messages, "newest_message": self._count}

    def acknowledge(self, number: int) -> None:
        """The host has everything up to ``number``."""
        self._kept = self.after(number)

    def deliver(self, text: str) -> None:
        """A line for the jobs; raises `ValueError` when their file is full."""
        line = text.replace("\n", " ").encode() + b"\n"
        fd = os.open(self._inbox, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if len(line) > MAX_MESSAGE or os.fstat(fd).st_size + len(line) > MAX_INBOX:
                raise ValueError("too long")
            os.write(fd, line)
        finally:
            os.close(fd)
