"""Timing of commands."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping


def timed(command: list[str], *, until: bytes | None = None,
          env: Mapping[str, str] | None = None, statuses: tuple[int, ...] = (0,)) -> float:
    """Seconds until a command ends with one of ``statuses``, or until it has printed ``until``."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env=env)
    with process:
        assert process.stdout is not None
        if until is None:
            process.stdout.read()
            if process.wait() not in statuses:
                raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
        else:
            while until not in (line := process.stdout.readline()):
                if not line:
                    raise RuntimeError(f"{command[0]} ended without {until!r}")
        return time.perf_counter() - began


def median(measure: Callable[[], float], runs: int) -> float:
    return statistics.median(measure() for _ in range(runs))
