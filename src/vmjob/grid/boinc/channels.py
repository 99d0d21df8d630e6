"""The client's shared memory: eight channels of 1024 bytes, each holding one text at a time.

Byte 0 of a channel is 1 while a text waits in it; then follow the text and a zero byte. The sender
writes only when byte 0 is 0, the reader sets it to 0 when it has copied the text. There is no lock
and no order but that: whoever sends or receives on a channel must be alone on its side.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from vmjob.grid.boinc.errors import ChannelsUnusable
from vmjob.grid.boinc.initdata import InitData

__all__ = ["Channel", "Channels", "open_channels"]

FILE = "boinc_mmap_file"
#: Bytes of a channel, and of a text in it: without the flag and the zero byte at its end.
SIZE = 1024
MAX_TEXT = SIZE - 2
#: The ``shm_key`` of an app whose channels are in a file.
_IN_A_FILE = -1


class Channel(IntEnum):
    """Their order in the memory; who sends, in the comment."""

    PROCESS_CONTROL_REQUEST = 0  # client
    PROCESS_CONTROL_REPLY = 1  # app; nobody reads it
    GRAPHICS_REQUEST = 2  # client; not sent any more
    GRAPHICS_REPLY = 3  # app
    HEARTBEAT = 4  # client
    APP_STATUS = 5  # app
    TRICKLE_UP = 6  # app
    TRICKLE_DOWN = 7  # client


#: Bytes of the whole.
LENGTH = SIZE * len(Channel)


class Channels:
    """The channels in ``memory``; ``release`` is called once, by `close`."""

    def __init__(self, memory: memoryview, release: Callable[[], None] = lambda: None) -> None:
        if len(memory) < LENGTH:
            raise ChannelsUnusable(f"the shared memory has {len(memory)} bytes, not {LENGTH}")
        self._memory = memory
        self._release: Callable[[], None] | None = release

    def get(self, channel: Channel) -> str | None:
        """Take the text that waits in a channel; None when there is none.

        Bytes that are not UTF-8 are replaced.
        """
        start = channel * SIZE
        if not self._memory[start]:
            return None
        data = bytes(self._memory[start + 1:start + SIZE])
        self._memory[start] = 0
        return data.split(b"\0", 1)[0].decode("utf-8", "replace")

    def put(self, channel: Channel, text: str) -> bool:
        """Leave a text in a channel; False when the last one has not been taken.

        Raises `ValueError` for a text that does not fit (1022 bytes) or holds a zero byte: half a
        message would be read as a whole one.
        """
        data = text.encode("utf-8", "replace")
        if len(data) > MAX_TEXT or b"\0" in data:
            raise ValueError(f"a channel holds {MAX_TEXT} bytes without zeros")
        start = channel * SIZE
        if self._memory[start]:
            return False
        self._memory[start + 1:start + 2 + len(data)] = data + b"\0"
        self._memory[start] = 1
        return True

    def is_full(self, channel: Channel) -> bool:
        """Whether a text waits in a channel."""
        return self._memory[channel * SIZE] != 0

    def close(self) -> None:
        """Give the memory back; a second time is fine."""
        release, self._release = self._release, None
        if release is not None:
            self._memory.release()
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def has_client(directory: Path, init: InitData) -> bool:
    """Whether ``init`` was written by a client that waits for us, and not by hand for a test."""
    if init.client_pid > 0 or init.shm_key != _IN_A_FILE or init.comm_obj_name:
        return True
    return os.path.lexists(directory / FILE)


def open_channels(directory: Path, init: InitData) -> Channels:
    """The channels that the client made for the app in this slot; raises `ChannelsUnusable`."""
    if sys.platform == "win32":
        from vmjob.grid.boinc import windows

        return Channels(*windows.open_memory(init.comm_obj_name))
    if init.shm_key != _IN_A_FILE:
        raise ChannelsUnusable(
            f"the client uses System V shared memory (key {init.shm_key}), as it does for an app "
            "version whose <api_version> is missing or below 6; set it to 7.5.0 or more")
    from vmjob.grid.boinc import posix

    memory = posix.open_memory(directory / FILE, LENGTH)
    return Channels(memoryview(memory), memory.close)
