"""On which line of a TOML file each key and each element is: `tomllib` does not say."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NoReturn

__all__ = ["KeyPath", "lines_of"]

#: Names of tables and keys, and numbers of elements, from the top.
KeyPath = tuple[str | int, ...]

_STRING = re.compile(r"""
    \"{3} (?:[^\\]|\\.)*? \"{3} (?:\"{0,2})  # the end may be after two more quotes
  | '{3} .*? '{3} (?:'{0,2})
  | \" (?:[^\"\\\n]|\\.)* \"
  | ' [^'\n]* '
""", re.DOTALL | re.VERBOSE)
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}#\n]*")


def lines_of(text: str) -> dict[KeyPath, int]:
    """Line, from 1, of everything in ``text``, which `tomllib` has found valid.

    Tables, keys and elements of arrays; a table that is only implied has the line of what implies
    it first. In a text that is not valid: what comes before the first thing not understood.
    """
    source = _Source(text)
    try:
        source.document()
    except (_NotToml, RecursionError):
        pass
    return source.found


class _NotToml(Exception):
    """Something that no valid file has."""


def _meaning(quoted: str) -> str:
    try:
        return str(tomllib.loads(f"name = {quoted}")["name"])
    except tomllib.TOMLDecodeError:
        raise _NotToml from None


@dataclass
class _Source:
    text: str
    at: int = 0
    found: dict[KeyPath, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ends = [match.start() for match in re.finditer("\n", self.text)]
        self._tables: dict[KeyPath, int] = {}  # how many [[...]] of a name there are

    def document(self) -> None:
        inside: KeyPath = ()
        while self.rest():
            if self.text[self.at] == "[":
                inside = self.header()
            else:
                self.pair(inside)

    def rest(self) -> bool:
        """Step over blanks and comments; whether anything follows."""
        self._take(_BLANK)
        return self.at < len(self.text)

    def header(self) -> KeyPath:
        start = self.at
        several = self.text.startswith("[[", start)
        self.at += 2 if several else 1
        *above, last = self.key()
        self._expect("]]" if several else "]")
        path: KeyPath = ()
        for name in above:
            path = self._newest((*path, name), start)
        path = (*path, last)
        self._note(path, start)
        if not several:
            return self._newest(path, start)
        number = self._tables.get(path, 0)
        self._tables[path] = number + 1
        self._note((*path, number), start)
        return (*path, number)

    def key(self) -> list[str]:
        names = []
        while True:
            self.rest()
            if self.text[self.at:self.at + 1] in {'"', "'"}:
                names.append(_meaning(self._take(_STRING)))
            else:
                names.append(self._take(_BARE) or self._stop())
            self.rest()
            if self.text[self.at:self.at + 1] != ".":
                return names
            self.at += 1

    def pair(self, inside: KeyPath) -> None:
        start, path = self.at, inside
        for name in self.key():
            path = (*path, name)
            self._note(path, start)
        self._expect("=")
        self.rest()
        self.value(path)

    def value(self, path: KeyPath) -> None:
        first = self.text[self.at:self.at + 1]
        if first in {'"', "'"}:
            self._take(_STRING)
        elif first == "[":
            self.several("]", path)
        elif first == "{":
            self.several("}", path)
        else:
            self._take(_SCALAR)

    def several(self, end: str, path: KeyPath) -> None:
        """The elements of an array, or the pairs of an inline table."""
        self.at += 1
        number = 0
        while self.rest() and self.text[self.at] != end:
            before = self.at
            if end == "}":
                self.pair(path)
            else:
                self._note((*path, number), self.at)
                self.value((*path, number))
                number += 1
            if self.rest() and self.text[self.at] == ",":
                self.at += 1
            if self.at == before:
                self._stop()
        self._expect(end)

    def _newest(self, path: KeyPath, start: int) -> KeyPath:
        self._note(path, start)
        if path in self._tables:
            return (*path, self._tables[path] - 1)
        return path

    def _note(self, path: KeyPath, start: int) -> None:
        self.found.setdefault(path, bisect_right(self._ends, start - 1) + 1)

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at) or self._stop()
        self.at = match.end()
        return match.group()

    def _expect(self, what: str) -> None:
        self.rest()
        if not self.text.startswith(what, self.at):
            self._stop()
        self.at += len(what)

    def _stop(self) -> NoReturn:
        raise _NotToml
