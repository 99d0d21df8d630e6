"""What a job's trigger files say: the formats of vboxwrapper, read as it reads them.

Each is a pure function of a file's bytes; nothing that a guest writes makes one fail.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = ["Completion", "Postponement", "parse_completion", "parse_credit", "parse_postponement"]

#: Longest trigger file that is read, bytes.
MOST_BYTES = 64 << 10
#: Longest message that is passed on, characters.
MOST_MESSAGE = 4096
#: Seconds: the longest delay that BOINC's client takes, and what it takes for any other.
MOST_DELAY = 86400.0
DEFAULT_DELAY = 300.0

INTEGER = re.compile(r"\s*([+-]?\d{1,18})")
NUMBER = re.compile(r"\s*((?:\d{1,30}\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)")


@dataclass(frozen=True)
class Completion:
    """The job is over: ``exit_code`` as the job wrote it (0 when it wrote none)."""

    exit_code: int
    notice: bool
    message: str

    @property
    def process_exit_code(self) -> int:
        """The same as a process can end with: what was not 0 is not 0."""
        if self.exit_code == 0:
            return 0
        return self.exit_code & 0xFF or 1


@dataclass(frozen=True)
class Postponement:
    """The job is to be continued after ``delay`` seconds."""

    delay: float
    notice: bool
    message: str


def parse_completion(content: bytes) -> Completion:
    """First line the exit code, second a number that is not 0 for a notice, the rest a message."""
    code, notice, message = _three(content)
    return Completion(code or 0, notice, message)


def parse_postponement(content: bytes) -> Postponement:
    """The same with seconds in the first line."""
    delay, notice, message = _three(content)
    if delay is None or not 0 <= delay <= MOST_DELAY:
        return Postponement(DEFAULT_DELAY, notice, message)
    return Postponement(float(delay), notice, message)


def parse_credit(content: bytes) -> tuple[float, float] | None:
    """Floating-point and integer operations so far, the first two lines; None when not so.

    None for what is infinite as well: no JSON holds that.
    """
    lines = content[:MOST_BYTES].decode("ascii", "replace").split("\n")
    numbers = [NUMBER.match(line) for line in lines[:2]]
    if not numbers or numbers[0] is None:
        return None
    floating = float(numbers[0][1])
    integer = float(numbers[1][1]) if len(numbers) > 1 and numbers[1] else 0.0
    return (floating, integer) if math.isfinite(floating + integer) else None


def _three(content: bytes) -> tuple[int | None, bool, str]:
    text = content[:MOST_BYTES].decode("utf-8", "replace").replace("\r\n", "\n")
    first, _, rest = text.partition("\n")
    second, _, message = rest.partition("\n")
    number, flag = INTEGER.match(first), INTEGER.match(second)
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in message.strip())
    return (int(number[1]) if number else None, bool(flag and int(flag[1])),
            clean[:MOST_MESSAGE])
