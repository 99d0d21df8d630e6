"""A job's life as JSON lines, for programs that watch it: docs/reference/events.md."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, BinaryIO, Literal

from vmjob.grid.terminal import Terminal

__all__ = ["Events"]


class Events:
    """Passes everything on to the terminal, and writes a line for what matters.

    Each line is one JSON object with ``seq`` (from 1, without gaps), ``time`` (seconds since 1970)
    and ``event``. Who reads them and stops does not end the job: nothing is written any more then.
    """

    def __init__(self, terminal: Terminal, to: BinaryIO) -> None:
        self._grid = terminal
        self._to: BinaryIO | None = to
        self._seq = 0
        self._lock = threading.Lock()  # `transferred` comes from any thread

    def tell(self, event: str, **facts: Any) -> None:
        """Write one line."""
        with self._lock:
            self._seq += 1
            line = json.dumps({"seq": self._seq, "time": round(time.time(), 3), "event": event,
                               **facts})
            if self._to is None:
                return
            try:
                self._to.write(line.encode() + b"\n")
                self._to.flush()
            except OSError:
                self._to = None

    def close(self) -> None:
        """Nothing more will be told."""
        with self._lock:
            if self._to is not None:
                self._to.close()
            self._to = None

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

    def upload(self, name: str) -> None:
        self.tell("upload", name=name)
        self._grid.upload(name)

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
