"""The markup of BOINC's files, as BOINC's own programs read it: bounded, lenient, never silent.

BOINC reads tags one after another, not XML documents. Files in production have several roots, empty
comments, text between tags, tags without an end, and bare ``&``; see decision 010. What is odd
becomes a finding with its line. There are no document types and no entities but the five of XML and
numbers of characters, so a file never grows by being read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NoReturn

from vmjob.job.reading import Finding, Level

__all__ = ["CONTAINERS", "MAX_BYTES", "MAX_DEPTH", "MAX_ELEMENTS", "Document", "Element", "parse",
           "shown"]

#: The largest of the field's job files has 20 KB, 49 tasks and 4 levels.
MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ELEMENTS = 20_000
#: Findings after which a file is not worth another.
MAX_FINDINGS = 200
MAX_NAME = 256

#: Elements that hold others: one that has no end keeps what follows it, where any other that has
#: none ends where the next tag begins.
CONTAINERS = frozenset({"task", "port_forward", "unzip_input", "zip_output", "unzip_task",
                        "VMmanage_task"})

_ANGLE = re.compile(r"[<>]")
_ENTITY = re.compile(r"&(?:#([0-9]{1,7})|#[xX]([0-9a-fA-F]{1,6})|([A-Za-z][A-Za-z0-9]{0,30}));")
# Atomic: comments can be told apart in one way only, or else there are 2^n.
_NEXT_TAG = re.compile(r"\s*+(?><!--.*?-->\s*+)*+<\s*+(/?)\s*+([^\s<>/]+)", re.DOTALL)
_FIVE = {"lt": "<", "gt": ">", "amp": "&", "quot": '"', "apos": "'"}
#: How far to look for the tag that tells a forgotten slash from a forgotten end.
_LOOK_AHEAD = 4096


@dataclass(frozen=True)
class Element:
    """``<name>text</name>``, or one that holds others.

    ``line`` counts from 1. ``text`` is without the blanks around it; of an element with children,
    what stands before the first. ``empty``: it was written ``<name/>``.
    """

    name: str
    line: int
    text: str = ""
    children: tuple[Element, ...] = ()
    empty: bool = False


@dataclass(frozen=True)
class Document:
    """What a file holds, in its order, and what was odd about how it is written."""

    roots: tuple[Element, ...]
    findings: tuple[Finding, ...]


def parse(data: bytes, containers: frozenset[str] = CONTAINERS) -> Document:
    """Read ``data``; never raises. ``containers``: names of elements that hold others.

    Without a finding at `Level.ERROR` the file is complete: no root lacks its end.
    """
    if len(data) > MAX_BYTES:
        return _refused(0, "too-large", f"the file has more than {MAX_BYTES} bytes")
    if b"\0" in data:
        return _refused(data.count(b"\n", 0, data.index(b"\0")) + 1, "not-text",
                        "there is a zero byte: this is not a text file")
    parser = _Parser(containers)
    try:
        parser.read(_decode(data, parser.findings))
    except _GaveUp:
        return Document((), tuple(parser.findings))
    return Document(tuple(parser.roots), tuple(parser.findings))


def _refused(line: int, code: str, what: str) -> Document:
    return Document((), (Finding(Level.ERROR, line, code, what),))


def _decode(data: bytes, findings: list[Finding]) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        findings.append(Finding(Level.WARNING, line, "not-utf8",
                                "these are not characters in UTF-8; read as ISO 8859-1",
                                "the file in UTF-8"))
        return data.decode("latin-1")


class _GaveUp(Exception):
    """The file broke a bound; the last finding says which."""


@dataclass
class _Open:
    """An element whose end has not come. ``text`` is only what comes before its first child."""

    name: str
    line: int
    text: list[str] = field(default_factory=list)
    stray: list[tuple[int, str]] = field(default_factory=list)
    children: list[Element] = field(default_factory=list)


class _Parser:
    """One pass over the text; each character is looked at a bounded number of times."""

    def __init__(self, containers: frozenset[str]) -> None:
        self.roots: list[Element] = []
        self.findings: list[Finding] = []
        self._containers = containers
        self._stack: list[_Open] = []
        self._count = 0
        self._line = 1
        self._seen = 0

    def read(self, text: str) -> None:
        self._text = text
        position = 0
        while position < len(text):
            start = text.find("<", position)
            if start != position:
                end = len(text) if start < 0 else start
                self._characters(position, self._unescape(text[position:end], position))
                position = end
            else:
                position = self._markup(start)
        while self._stack:
            self._close_unfinished(at_end=True)

    # -- pieces ------------------------------------------------------------------------------

    def _markup(self, start: int) -> int:
        """What begins with ``<`` at ``start``; returns where it ends."""
        text = self._text
        for opening, closing, what in (("<!--", "-->", "a comment"),
                                       ("<![CDATA[", "]]>", "a CDATA section"),
                                       ("<?", "?>", "a declaration")):
            if text.startswith(opening, start):
                end = text.find(closing, start + len(opening))
                if end < 0:
                    self._give_up(start, "cut-off", f"{what} has no end {closing!r}")
                if opening == "<![CDATA[":
                    self._characters(start, text[start + len(opening):end])
                return end + len(closing)
        if text.startswith("<!", start):
            self._give_up(start, "document-type",
                          "'<!' begins no comment; document types and entities are not read",
                          "the file without it")
        found = _ANGLE.search(text, start + 1)
        if found is None:
            self._give_up(start, "cut-off", f"a tag has no '>': {shown(text[start:start + 60])}",
                          "the whole file; this one was cut off")
        if found.group() == "<":
            self._find(start, "bare-angle", "a '<' that begins no tag; read as text", "&lt;")
            self._characters(start, "<")
            return start + 1
        self._tag(start, found.start(), text[start + 1:found.start()])
        return found.end()

    def _characters(self, position: int, text: str) -> None:
        if not self._stack:
            self._stray(self._at(position, text), text)
        elif self._stack[-1].children:
            if text.strip():
                self._stack[-1].stray.append((self._at(position, text), text))
        else:
            self._stack[-1].text.append(text)

    def _tag(self, start: int, end: int, inside: str) -> None:
        bare = inside.strip()
        closing = bare.startswith("/")
        empty = not closing and bare.endswith("/")
        words = bare.strip("/").split(None, 1)
        if not words:
            self._find(start, "bare-angle", f"'<{shown(inside)}>' is no tag; read as text", "&lt;")
            self._characters(start, f"<{inside}>")
            return
        name = words[0]
        if len(name) > MAX_NAME:
            self._give_up(start, "name-too-long", f"a tag's name has {len(name)} characters")
        if len(words) > 1 and words[1].strip("/ \t\r\n"):
            self._find(start, "attribute", f"<{shown(name)}> has attributes, which are not read",
                       f"<{shown(name)}>", level=Level.NOTE)
        elif inside[0].isspace() or (closing and bare[1:2].isspace()):
            self._find(start, "blank-in-tag", f"blanks before the name in <{shown(inside)}>; "
                       "BOINC's programs would not know this tag",
                       f"<{'/' * closing}{shown(name)}>")
        if closing:
            self._end(start, name)
        else:
            self._begin(start, end + 1, name, empty=empty)

    # -- the tree ----------------------------------------------------------------------------

    def _begin(self, start: int, after: int, name: str, *, empty: bool) -> None:
        # No element of these formats holds one of its own name: an end was forgotten, or its slash.
        if not empty and any(each.name == name for each in self._stack):
            while self._stack[-1].name != name:
                self._close_unfinished()
            if not self._is_beginning(name, after):
                self._find(start, "slash-missing", f"<{name}> once more; read as its end",
                           f"</{name}>")
                self._close()
                return
            self._close_unfinished()
        line = self._at(start)
        self._count += 1
        if self._count > MAX_ELEMENTS:
            self._give_up(start, "too-many", f"more than {MAX_ELEMENTS} elements")
        if empty:
            self._add(Element(name, line, empty=True))
            return
        if len(self._stack) >= MAX_DEPTH:
            self._give_up(start, "too-deep", f"elements in elements, {MAX_DEPTH} deep")
        self._stack.append(_Open(name, line))

    def _is_beginning(self, name: str, after: int) -> bool:
        """Whether a tag that repeats an open one begins another, by the tag that follows it."""
        top = self._stack[-1]
        if name not in self._containers and len(self._stack) > 1:
            return False
        if not top.children:
            return True
        following = _NEXT_TAG.match(self._text, after, after + _LOOK_AHEAD)
        if following is None:
            return False
        slash, other = following.groups()
        parent = self._stack[-2].name if len(self._stack) > 1 else ""
        return not (other == name and not slash) and not (slash and other == parent)

    def _end(self, start: int, name: str) -> None:
        if not any(each.name == name for each in self._stack):
            self._find(start, "end-without-begin", f"</{shown(name)}> ends nothing")
            return
        while self._stack[-1].name != name:
            self._close_unfinished()
        self._close()

    def _close(self) -> None:
        done = self._stack.pop()
        text = "".join(done.text)
        if done.children:
            self._stray(done.line, text)
        for line, each in done.stray:
            self._stray(line, each)
        self._add(Element(done.name, done.line, text.strip(), tuple(done.children)))

    def _close_unfinished(self, *, at_end: bool = False) -> None:
        """Close the innermost element although its end is missing."""
        open_ = self._stack[-1]
        is_root = len(self._stack) == 1
        level = Level.ERROR if is_root else Level.WARNING
        what = f"<{shown(open_.name)}> has no end"
        what += ": the file was cut off" if is_root and at_end else ""
        self._add_finding(Finding(level, open_.line, "end-missing", what,
                                  f"</{shown(open_.name)}>"))
        if is_root or open_.name in self._containers:
            self._close()
            return
        # What came after it is its parent's: siblings that an element without an end swallowed.
        self._stack.pop()
        parent = self._stack[-1]
        parent.children += [Element(open_.name, open_.line, "".join(open_.text).strip()),
                            *open_.children]
        parent.stray += open_.stray

    def _add(self, element: Element) -> None:
        (self._stack[-1].children if self._stack else self.roots).append(element)

    # -- what was odd ------------------------------------------------------------------------

    def _stray(self, line: int, text: str) -> None:
        if text := text.strip():
            self._add_finding(Finding(Level.WARNING, line, "stray-text",
                                      f"text between tags is not read: {shown(text)}"))

    def _unescape(self, text: str, position: int) -> str:
        def one(match: re.Match[str]) -> str:
            decimal, hexadecimal, name = match.groups()
            if name is not None and name in _FIVE:
                return _FIVE[name]
            number = int(decimal) if decimal else int(hexadecimal, 16) if hexadecimal else 0
            if 0 < number < 0x110000 and not 0xD800 <= number < 0xE000:
                return chr(number)
            self._find(position + match.start(), "unknown-entity",
                       f"{match.group()} is not known; kept as it is written", "&amp;")
            return match.group()

        return _ENTITY.sub(one, text) if "&" in text else text

    def _find(self, position: int, code: str, what: str, instead: str = "",
              *, level: Level = Level.WARNING) -> None:
        self._add_finding(Finding(level, self._at(position), code, what, instead))

    def _add_finding(self, finding: Finding) -> None:
        self.findings.append(finding)
        if len(self.findings) > MAX_FINDINGS:
            self.findings.append(Finding(Level.ERROR, finding.line, "too-many",
                                         "too much is odd here: this is not a job file"))
            raise _GaveUp

    def _give_up(self, position: int, code: str, what: str, instead: str = "") -> NoReturn:
        self.findings.append(Finding(Level.ERROR, self._at(position), code, what, instead))
        raise _GaveUp

    def _at(self, position: int, text: str = "") -> int:
        """The line of a position, past the blanks that ``text`` begins with."""
        position += len(text) - len(text.lstrip())
        if position < self._seen:
            self._line, self._seen = 1, 0  # only after a look at what a tag began with
        self._line += self._text.count("\n", self._seen, position)
        self._seen = position
        return self._line


def shown(text: str) -> str:
    """``text`` fit for a message: on one line, printable, not long."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= 60 else text[:57] + "..."
