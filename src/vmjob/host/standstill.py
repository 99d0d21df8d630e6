"""Being stopped, as by Ctrl-Z, without a deadline that expires meanwhile.

The clock of an event loop is set back by the time for which the process was stopped, and what waits
in threads counts short pieces: one of them is all that can be lost, by whatever stops us.
"""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["happens", "run_tool", "stop_us"]

#: Seconds of one piece of a wait.
PIECE = 1.0


class _Clock:
    """A clock of an event loop that has stood still for a while."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self.stood = 0.0

    def __call__(self) -> float:
        return self._time() - self.stood


def stop_us(loop: asyncio.AbstractEventLoop) -> None:
    """Stop this process until somebody continues it; no time passes for the loop meanwhile."""
    clock = loop.time
    if not isinstance(clock, _Clock):
        clock = _Clock(clock)
        loop.time = clock  # type: ignore[method-assign]
    before = clock()
    # To this thread: then it has stopped when the call returns, whatever other threads there are.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    clock.stood += clock() - before


def happens(event: threading.Event, seconds: float) -> bool:
    """Wait for an event; false when it does not happen in so many seconds."""
    return any(event.wait(min(PIECE, seconds)) for _ in range(math.ceil(seconds / PIECE)))


def run_tool(command: Sequence[str], deadline: float, **options: Any,
             ) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` with all output captured; raises `subprocess.TimeoutExpired`."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, **options) as process:
        try:
            for _ in range(math.ceil(deadline / PIECE)):
                try:
                    out, err = process.communicate(timeout=min(PIECE, deadline))
                except subprocess.TimeoutExpired:
                    continue
                return subprocess.CompletedProcess(command, process.returncode, out, err)
        except BaseException:
            process.kill()
            raise
        process.kill()
        out, err = process.communicate()
        raise subprocess.TimeoutExpired(command, deadline, out, err)
