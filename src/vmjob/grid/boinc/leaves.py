"""Elements that hold only a value, ``<name>value</name>``, found without reading XML."""

from __future__ import annotations

import math
import re
from pathlib import Path

__all__ = ["Leaves"]

# A name is followed at once by what ends it, so a '<' is looked at once only: no hostile text takes
# longer than its length. The end tag is not asked for: some files lack one here and there.
_LEAF = re.compile(r"<([A-Za-z_]\w{0,63})(?=[\s/>])([^<>]{0,256})>([^<]*)", re.ASCII)
_ENTITY = re.compile(r"&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|(lt|gt|amp|quot|apos));")
_FIVE = {"lt": "<", "gt": ">", "amp": "&", "quot": '"', "apos": "'"}
# What strtol and strtod would take from the beginning, within bounds.
_WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_REAL = re.compile(r"[+-]?(?:\d{1,320}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,4})?", re.ASCII)
#: The largest number that is believed; a program's sizes and times stay far below.
MAX_REAL = 1e30
MAX_WHOLE = 1 << 62


class Leaves:
    """The values in one piece of text, by name. Of a name that comes twice, the last counts."""

    def __init__(self, text: str) -> None:
        self._found: dict[str, list[str]] = {}
        for match in _LEAF.finditer(text):
            name, inside, value = match.groups()
            # ``<name/>`` is how a flag is set.
            self._found.setdefault(name, []).append("1" if inside.endswith("/") else value.strip())

    def text(self, name: str, *, first: bool = False) -> str:
        """A text, or "". ``first``: blocks within may use the same name further down."""
        found = self._found.get(name)
        return _readable(found[0 if first else -1]) if found else ""

    def every(self, name: str) -> tuple[str, ...]:
        """All values of a name that may come more than once."""
        return tuple(_readable(each) for each in self._found.get(name, ()))

    def path(self, name: str) -> Path:
        """A path, of any bytes; ``Path()`` where there is none. Paths are not escaped."""
        found = self._found.get(name)
        return Path(found[-1]) if found and "\0" not in found[-1] else Path()

    def flag(self, name: str) -> bool:
        """``<x/>``, and ``<x>INT</x>`` with an INT that is not 0."""
        return self.whole(name) != 0

    def whole(self, name: str, default: int = 0, *, least: int = -MAX_WHOLE,
              most: int = MAX_WHOLE) -> int:
        """A whole number; ``default`` for what is none, or out of its range."""
        match = _WHOLE.match(self._found.get(name, [""])[-1])
        value = int(match[0]) if match else default
        return value if least <= value <= most else default

    def real(self, name: str, default: float = 0.0, *, least: float = 0.0,
             most: float = MAX_REAL) -> float:
        """A finite number; ``default`` for what is none, or out of its range."""
        match = _REAL.match(self._found.get(name, [""])[-1])
        value = float(match[0]) if match else default
        return value if math.isfinite(value) and least <= value <= most else default


def _readable(text: str) -> str:
    """``text`` without entities, and fit to be printed or sent."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return _ENTITY.sub(_character, text) if "&" in text else text


def _character(match: re.Match[str]) -> str:
    decimal, hexadecimal, name = match.groups()
    if name:
        return _FIVE[name]
    number = int(decimal) if decimal else int(hexadecimal, 16)
    if 0 < number < 0x110000 and not 0xD800 <= number < 0xE000:
        return chr(number)
    return str(match[0])
