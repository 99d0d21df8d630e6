"""A person at a terminal, or a script: streams through, progress on the side."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Literal, Self

import anyio
import anyio.to_thread

from vmjob.errors import InputMissing
from vmjob.grid.contract import Quiet

__all__ = ["OutputClosed", "Terminal", "open_input"]

#: Bytes read from our input at once.
READ = 64 * 1024
#: Seconds between redraws of the status line, and before it is first shown.
REDRAW = 0.25

PHASES = {"image": "checking the image", "machine": "making a machine", "boot": "booting",
          "template": "freezing a machine, once for each kind", "thaw": "starting",
          "inputs": "copying inputs", "run": "running", "outputs": "copying outputs",
          "restore": "continuing from the checkpoint", "checkpoint": "making a checkpoint",
          "suspended": "suspended", "end": "cleaning up"}


class OutputClosed(BaseException):
    """Nobody reads our output any more; as SIGPIPE, this ends the job."""


class Terminal(Quiet):
    """Passes a job's streams through and shows one status line when stderr is a terminal.

    ``stdin``: ``auto`` (our input, unless it is a terminal), ``none``, or a file's path.
    ``output``: the descriptor that the job's stdout goes to; None: its streams are heard elsewhere.
    Raises `InputMissing` for a missing file.
    """

    def __init__(self, stdin: str, *, output: int | None, quiet: bool) -> None:
        self._stdin = open_input(stdin)
        self._stdout = output
        self._quiet = quiet
        self._line = StatusLine() if not quiet and os.isatty(2) else None
        self._pieces: asyncio.Queue[bytes] | None = None
        self._running = PHASES["run"]
        self._fraction: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._line:
            self._line.close()

    # -- what the engine tells -----------------------------------------------------------------

    def phase(self, name: str) -> None:
        if self._line:
            self._line.show(PHASES.get(name, name))

    def building(self, fraction: float, text: str) -> None:
        """Progress of an image build, from any thread."""
        if self._line:
            self._line.show(f"building the image (once): {text}", fraction)
        elif not self._quiet and fraction == 0:
            print("vmjob: building the image, once; this takes about a minute",  # noqa: T201
                  file=sys.stderr, flush=True)

    def transferred(self, what: str, count: int) -> None:
        if self._line:
            self._line.show(f"copying {Path(what).name}: {count / 1e6:.0f} MB")

    def task(self, title: str, number: int, count: int) -> None:
        if count > 1:
            self._running = f"running {title} ({number} of {count})"
        if self._line:
            self._line.show(self._running, self._fraction)

    def fraction_done(self, fraction: float) -> None:
        self._fraction = fraction
        if self._line:
            self._line.show(self._running, fraction)

    def message(self, text: str) -> None:
        self._say(f"job: {text}")

    async def trickle(self, variety: str, text: str) -> bool:
        self._say(f"trickle {variety}: {text.strip()[:200]}")
        return True

    async def upload(self, name: str) -> None:
        self._say(f"ready before the end: {name}")

    def address(self, what: Literal["web", "console", "port"], where: str) -> None:
        name = {"web": "page", "console": "screen", "port": "port"}[what]
        self._say(f"{name} of the job: {where}")

    def warning(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        if self._line:
            self._line.hide()
        clean = "".join(c if c.isprintable() else "?" for c in text)
        print(f"vmjob: {clean}", file=sys.stderr, flush=True)  # noqa: T201

    async def output(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        if self._stdout is None:
            return
        fd = self._stdout if stream == "stdout" else 2
        if self._line and (os.isatty(fd)):
            self._line.hide()
        view = memoryview(data)
        while view:
            try:
                # In a thread: a pipe that nobody empties must not stop us from hearing Ctrl-C.
                wrote = await anyio.to_thread.run_sync(os.write, fd, view, abandon_on_cancel=True)
            except BrokenPipeError:
                raise OutputClosed from None
            view = view[wrote:]

    # -- what the engine asks ------------------------------------------------------------------

    @property
    def has_input(self) -> bool:  # type: ignore[override]
        return self._stdin is not None

    async def input(self) -> bytes:
        if self._stdin is None:
            return b""
        if self._pieces is None:
            self._pieces = asyncio.Queue()
            self._wanted = threading.Semaphore(0)
            # A daemon: nothing can interrupt a read from a terminal or an idle pipe.
            threading.Thread(target=self._read, args=(asyncio.get_running_loop(), self._pieces),
                             daemon=True).start()
        self._wanted.release()
        return await self._pieces.get()

    def _read(self, loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[bytes]) -> None:
        assert self._stdin is not None
        while True:
            self._wanted.acquire()
            try:
                data = os.read(self._stdin, READ)
            except OSError:
                data = b""
            try:
                loop.call_soon_threadsafe(pieces.put_nowait, data)
            except RuntimeError:
                return  # the loop has ended: nobody waits
            if not data:
                return


def open_input(given: str) -> int | None:
    """A descriptor of the input that ``--stdin`` names; None for none."""
    if given == "none":
        return None
    if given == "auto":
        try:
            kind = os.fstat(0).st_mode
        except OSError:
            return None  # closed
        # Terminals and /dev/null give nothing that a job could want.
        return None if stat.S_ISCHR(kind) else 0
    try:
        return os.open(given, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputMissing(f"cannot read {given!r}: {error.strerror}",
                           advice="Check the path given with --stdin.") from error


class StatusLine:
    """One line on stderr that is redrawn in place: what is being done, and for how long."""

    def __init__(self) -> None:
        self._text = ""
        self._fraction: float | None = None
        self._since = time.monotonic()
        self._shown = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._redraw, daemon=True).start()

    def show(self, text: str, fraction: float | None = None) -> None:
        """Say what is being done; ``fraction`` (0 to 1) draws a bar."""
        with self._lock:
            self._text, self._fraction = text, fraction

    def hide(self) -> None:
        """Clear the line, to print something else; it comes back with the next redraw."""
        with self._lock:
            self._clear()

    def close(self) -> None:
        """Clear the line for good."""
        self._closed.set()
        self.hide()

    def _clear(self) -> None:
        if self._shown:
            os.write(2, b"\r\x1b[K")
            self._shown = False

    def _redraw(self) -> None:
        while not self._closed.wait(REDRAW):
            with self._lock:
                if self._closed.is_set() or not self._text:
                    continue
                seconds = time.monotonic() - self._since
                os.write(2, f"\r\x1b[K{status_text(self._text, self._fraction, seconds)}"
                         .encode())
                self._shown = True


def status_text(text: str, fraction: float | None, seconds: float, width: int = 24) -> str:
    """The status line: ``[####----]  42 %  running (12 s)``."""
    if fraction is None:
        return f"{text} ({seconds:.0f} s)"
    full = round(width * fraction)
    bar = "#" * full + "-" * (width - full)
    return f"[{bar}] {fraction * 100:3.0f} %  {text} ({seconds:.0f} s)"
