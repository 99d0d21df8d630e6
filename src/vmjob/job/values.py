"""What the text of an element says, by the rules of BOINC's own programs.

An element that breaks them is a finding, and counts as if it were not there.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath

from vmjob.job.markup import Element, shown
from vmjob.job.reading import Finding, Level

__all__ = ["boolean", "integer", "is_placeholder", "name", "number", "text"]

# strtod and strtol with base 0, without infinities and NaN.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_INTEGER = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9]\d*)", re.ASCII)
#: ``{memory}``, ``${MEMORY}``, ``{{ memory }}``, ``%(memory)s``, ``@MEMORY@``: a template's, that
#: nobody filled in.
_PLACEHOLDER = re.compile(r"\$?\{\{?\s*\w+\s*\}?\}|%\(\w+\)[sd]|@\w+@", re.ASCII)
MAX_DIGITS = 18
MAX_NAME = 1024


def boolean(element: Element, findings: list[Finding]) -> bool:
    """``<x/>`` and ``<x>INT</x>`` with an INT that is not 0 are set; all else is a finding."""
    if element.empty:
        return True
    if element.children or (value := _integer(element.text)) is None:
        held = f"holds {shown(element.text)}" if element.text else "holds nothing"
        _find(findings, element, Level.WARNING, "not-a-flag",
              f"<{shown(element.name)}> {held}, which sets nothing",
              f"<{shown(element.name)}/>, or <{shown(element.name)}>1</{shown(element.name)}>")
        return False
    return value != 0


def number(element: Element, findings: list[Finding], *, default: float = 0.0,
           least: float = -math.inf, most: float = math.inf) -> float:
    """The number that all of the text is; an empty element is 0 with a finding.

    ``default`` is returned with an error where there is none, or one outside ``least`` to ``most``.
    """
    if _is_bare(element, findings):
        return _within(element, findings, 0.0, default, least, most)
    if not _NUMBER.fullmatch(element.text) or not math.isfinite(value := float(element.text)):
        _not_a_number(element, findings, "a number")
        return default
    return _within(element, findings, value, default, least, most)


def integer(element: Element, findings: list[Finding], *, default: int = 0,
            least: int = -(1 << 31), most: int = (1 << 31) - 1) -> int:
    """As `number`, for whole ones: decimal, ``0x`` hexadecimal, ``0`` octal, as C reads them."""
    if _is_bare(element, findings):
        return int(_within(element, findings, 0, default, least, most))
    value = _integer(element.text)
    if value is None:
        _not_a_number(element, findings, "a whole number")
        return default
    return int(_within(element, findings, value, default, least, most))


def text(element: Element, findings: list[Finding]) -> str:
    """The text; that of an element that holds others, or a template's placeholder, is an error."""
    if element.children:
        _find(findings, element, Level.ERROR, "not-a-text",
              f"<{shown(element.name)}> holds <{shown(element.children[0].name)}>, "
              "where a text is wanted")
        return ""
    if is_placeholder(element.text):
        _placeholder(element, findings)
        return ""
    return element.text


def name(element: Element, findings: list[Finding]) -> str | None:
    """A file's name, or a path below a folder; None with a finding where it cannot be one.

    An empty element names nothing. A path that leads out of the folder is an error, and so is one
    with control characters.
    """
    before = len(findings)
    value = text(element, findings)
    if len(findings) > before:
        return None
    if not value:
        _find(findings, element, Level.WARNING, "empty",
              f"<{shown(element.name)}> names no file; as if it were not there")
        return None
    reason = _bad_name(value)
    if reason:
        _find(findings, element, Level.ERROR, "bad-path",
              f"<{shown(element.name)}> {shown(value)}: {reason}",
              "a name, or a path below the folder without '..'")
        return None
    return str(PurePosixPath(value))


def is_placeholder(value: str) -> bool:
    """Whether this stands for what a program should have put in its place."""
    return _PLACEHOLDER.fullmatch(value) is not None


def _bad_name(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or re.match(r"[A-Za-z]:[\\/]", value) or value.startswith("\\"):
        return "an absolute path, where one below the folder is wanted"
    if ".." in path.parts or ".." in value.split("\\"):
        return "the path leads out of the folder"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in value):
        return "it has control characters"
    if not path.parts:
        return "this is the folder itself"
    if len(value) > MAX_NAME or any(len(part.encode()) > 255 for part in path.parts):
        return "it is too long"
    return ""


def _integer(value: str) -> int | None:
    match = _INTEGER.fullmatch(value)
    if match is None or len(value) > MAX_DIGITS:
        return None
    sign, digits = match.groups()
    base = 16 if digits[:2] in {"0x", "0X"} else 8 if digits[0] == "0" else 10
    return int(digits, base) * (-1 if sign == "-" else 1)


def _is_bare(element: Element, findings: list[Finding]) -> bool:
    """Whether there is no text at all; says so."""
    if element.text or element.children:
        return False
    _find(findings, element, Level.WARNING, "empty",
          f"<{shown(element.name)}> is empty, which means 0")
    return True


def _within(element: Element, findings: list[Finding], value: float, default: float,
            least: float, most: float) -> float:
    if least <= value <= most:
        return value
    _find(findings, element, Level.ERROR, "out-of-range",
          f"<{shown(element.name)}> {value:g} is not between {least:g} and {most:g}")
    return default


def _not_a_number(element: Element, findings: list[Finding], wanted: str) -> None:
    if is_placeholder(element.text):
        _placeholder(element, findings)
        return
    held = (f"<{shown(element.children[0].name)}>" if element.children else shown(element.text))
    _find(findings, element, Level.ERROR, "not-a-number",
          f"<{shown(element.name)}> holds {held}, which is not {wanted}", wanted)


def _placeholder(element: Element, findings: list[Finding]) -> None:
    _find(findings, element, Level.ERROR, "placeholder",
          f"<{shown(element.name)}> holds {shown(element.text)}: a template that was not filled in",
          "the value itself")


def _find(findings: list[Finding], element: Element, level: Level, code: str, what: str,
          instead: str = "") -> None:
    findings.append(Finding(level, element.line, code, what, instead))
