"""How much of a job is done, by the words of its tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["overall", "parse_fraction", "parse_number"]

#: What a program may write: plain or with an exponent, no sign, no words like nan.
NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)


def parse_fraction(content: bytes) -> float | None:
    """The number on the last line that is not empty, within 0 and 1; None where there is none."""
    lines = content.decode("ascii", "replace").split("\n")
    for line in reversed(lines):
        if line.strip():
            number = parse_number(line)
            return None if number is None else min(1.0, number)
    return None


def parse_number(text: str) -> float | None:
    """A number that is the whole text, but for space around it; ``inf`` where it is too large."""
    number = NUMBER.fullmatch(text.strip())
    return float(number[0]) if number else None


def overall(weights: Sequence[float], ended: int, fraction: float) -> float:
    """The job's fraction when so many tasks have ended and the next is at ``fraction``.

    Tasks that weigh nothing do not count; if that are all, they count alike.
    """
    shares = [max(0.0, weight) for weight in weights]
    if not sum(shares):
        shares = [1.0] * len(shares)
    now = shares[ended] * min(1.0, max(0.0, fraction)) if ended < len(shares) else 0.0
    return min(1.0, (sum(shares[:ended]) + now) / sum(shares))
