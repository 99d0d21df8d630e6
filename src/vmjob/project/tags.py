"""Writing BOINC's markup, and reading what others wrote of it."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

from vmjob.job.markup import Element

__all__ = ["block", "child", "flag", "tag", "text_of", "truth"]


def tag(name: str, value: str | float) -> str:
    """``<name>value</name>`` and a newline; numbers without an exponent, which old parsers lack."""
    if isinstance(value, float):
        value = f"{value:.6f}".rstrip("0").rstrip(".")
    return f"<{name}>{escape(str(value))}</{name}>\n"


def flag(name: str, value: bool) -> str:
    """``<name/>`` where it is set."""
    return f"<{name}/>\n" if value else ""


def block(name: str, parts: Iterable[str], indent: str = "") -> str:
    """An element that holds others, each given as its lines."""
    inside = "".join(parts)
    if indent:
        inside = "".join(f"{indent}{line}\n" for line in inside.splitlines())
    return f"<{name}>\n{inside}</{name}>\n"


def child(element: Element, name: str) -> Element | None:
    """The first child of this name."""
    return next((each for each in element.children if each.name == name), None)


def text_of(element: Element, name: str) -> str:
    """The text of the first child of this name; '' where there is none."""
    found = child(element, name)
    return found.text if found is not None else ""


def truth(element: Element, name: str) -> bool:
    """``<name/>`` and ``<name>1</name>`` are set; ``<name>0</name>`` and none are not."""
    found = child(element, name)
    return found is not None and (found.empty or found.text not in {"", "0"})
