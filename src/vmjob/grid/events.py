"""A job's life as JSON lines, for programs that watch it: docs/reference/events.md."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from typing import Any, BinaryIO, Literal

import anyio

from vmjob.grid.terminal import Terminal

__all__ = ["Events"]

#: Bytes of lines that nobody has read: then the job's output waits, and then no more is told.
HELD, MOST_HELD = 1 << 20, 16 << 20
#: Seconds that a reader may take before we go on, or end, without it.
PATIENCE = 5.0
#: Seconds between looks at how much was read.
LOOK = 0.05


class Events:
    """Passes everything on to the terminal, and writes a line for what matters.

    Each line is one JSON object with ``seq`` (from 1, without gaps), ``time`` (seconds since 1970)
    and ``event``. Who reads them and stops does not end the job: nothing is written any more then.
    A thread writes: whoever holds a pipe and does not read must not stop us from hearing Ctrl-C.
    """

    def __init__(self, terminal: Terminal, to: BinaryIO) -> None:
        self._grid = terminal
        self._to = to
        self._seq = 0
        self._lines: deque[bytes] = deque()
        self._held = 0
        self._closed = False
        self._changed = threading.Condition()  # `transferred` comes from any thread
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def tell(self, event: str, **facts: Any) -> None:
        """Write one line."""
        with self._changed:
            if self._closed:
                return
            self._seq += 1
            line = json.dumps({"seq": self._seq, "time": round(time.time(), 3), "event": event,
                               **facts}).encode() + b"\n"
            self._held += len(line)
            if self._held > MOST_HELD:
                self._closed = True
                return
            self._lines.append(line)
            self._changed.notify()

    def close(self) -> None:
        """Nothing more will be told; what was is written, if anybody takes it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        held = -1
        while self._writer.is_alive() and self._held != held:  # as long as somebody reads
            held = self._held
            self._writer.join(PATIENCE)

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._closed:
                    self._changed.wait()
                if not self._lines:
                    break
                line = self._lines.popleft()
            try:
                self._to.write(line)
                self._to.flush()
            except OSError:
                with self._changed:
                    self._closed = True
                    self._lines.clear()
                break
            with self._changed:
                self._held -= len(line)
        with contextlib.suppress(OSError):
            self._to.close()

    async def _room(self) -> None:
        """Wait for a reader that is slow; one that takes nothing for so long is none."""
        held, left = self._held, PATIENCE
        while self._held > HELD and not self._closed:
            await anyio.sleep(LOOK)
            left = left - LOOK if self._held == held else PATIENCE
            held = self._held
            if left <= 0:
                self._closed = True

    # -- what the engine tells -----------------------------------------------------------------

    def building(self, fraction: float, text: str) -> None:
        """Progress of an image build, from any thread."""
        self._grid.building(fraction, text)

    def phase(self, name: str) -> None:
        self.tell("phase", phase=name)
        self._grid.phase(name)

    def transferred(self, what: str, count: int) -> None:
        self._grid.transferred(what, count)

    async def output(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        await self._room()
        self.tell("output", stream=stream, bytes=len(data), text=data.decode("utf-8", "replace"))
        await self._grid.output(stream, data)

    def task(self, title: str, number: int, count: int) -> None:
        self.tell("task", task=title, number=number, of=count)
        self._grid.task(title, number, count)

    def message(self, text: str) -> None:
        self.tell("message", text=text)
        self._grid.message(text)

    def fraction_done(self, fraction: float) -> None:
        self.tell("progress", fraction=round(fraction, 6))
        self._grid.fraction_done(fraction)

    def checkpoint(self, number: int, still_seconds: float, written_bytes: int) -> None:
        self.tell("checkpoint", number=number, still_seconds=round(still_seconds, 6),
                  written_bytes=written_bytes)
        self._grid.checkpoint(number, still_seconds, written_bytes)

    async def trickle(self, variety: str, text: str) -> bool:
        taken = await self._grid.trickle(variety, text)
        if taken:
            self.tell("trickle", variety=variety, text=text)
        return taken

    async def upload(self, name: str) -> None:
        self.tell("upload", name=name)
        await self._grid.upload(name)

    def operations(self, floating: float, integer: float) -> None:
        self.tell("operations", floating=floating, integer=integer)
        self._grid.operations(floating, integer)

    def address(self, what: Literal["web", "console", "port"], where: str) -> None:
        self.tell("address", what=what, where=where)
        self._grid.address(what, where)

    def warning(self, text: str) -> None:
        self.tell("warning", text=text)
        self._grid.warning(text)

    # -- what it asks --------------------------------------------------------------------------

    @property
    def has_input(self) -> bool:
        return self._grid.has_input

    async def input(self) -> bytes:
        return await self._grid.input()
