"""One value of a TOML job file: is it what its key wants, and what does it mean?"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vmjob.errors import BadPath
from vmjob.job.files import Input, Output, check_guest_path, exists
from vmjob.job.reading import Finding, Level
from vmjob.job.toml.keys import SECONDS, SIZES, Key, Kind
from vmjob.job.toml.lines import KeyPath

__all__ = ["Desk", "Unfit", "check_destination", "convert", "printable", "title"]

#: Findings after which a file is not worth another.
MAX_FINDINGS = 200
#: Words that only a shell understands.
_SHELL = {"|", "||", "&", "&&", ";", "<", "<<", ">", ">>", "2>", "2>&1"}
_MEASURE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]+)\s*")


class Unfit(Exception):
    """A value is not what its key wants; `args` are what to say, and what to write instead."""


@dataclass
class Desk:
    """Where a file is read: what was found so far, and where its names point."""

    directory: Path
    lines: dict[KeyPath, int]
    findings: list[Finding] = field(default_factory=list)
    errors: int = 0  # also those that were one too many to be told

    def say(self, level: Level, path: KeyPath, code: str, what: str, instead: str = "") -> None:
        """Add a finding about what is at ``path``, or else about what holds it."""
        self.errors += level is Level.ERROR
        if len(self.findings) >= MAX_FINDINGS:
            if self.findings[-1].code == "too-many":
                return
            self.errors += level is not Level.ERROR
            level, code, what = Level.ERROR, "too-many", "too much is odd here"
        while path and path not in self.lines:
            path = path[:-1]
        self.findings.append(Finding(level, self.lines.get(path, 0), code, printable(what),
                                     printable(instead)))


def printable(text: str) -> str:
    """``text`` on one line, whatever names the file has in it."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}"
                   for letter in text)


def convert(desk: Desk, key: Key, value: Any, path: KeyPath) -> Any:
    """The field's value; raises `Unfit`. Elements of lists are judged, and told, one by one."""
    return _CONVERT[key.kind](desk, key, value, path)


def _text(desk: Desk, key: Key, value: Any, path: KeyPath) -> str:
    text = _raw(desk, key, value, path)
    if "\0" in text:
        raise Unfit("it has a NUL character")
    if not text and not key.empty:
        raise Unfit("it is empty", "Leave the key out.")
    if key.choices:
        for choice in key.choices:
            if text == choice:
                return choice
        raise Unfit(f"it is {text!r}",
                    f"Write {' or '.join(repr(str(choice)) for choice in key.choices)}.")
    return text


def _raw(desk: Desk, key: Key, value: Any, path: KeyPath) -> str:
    if not isinstance(value, str):
        raise Unfit(f"it is {_kind(value)}, not a text", "Put it in quotes.")
    return value


def _boolean(desk: Desk, key: Key, value: Any, path: KeyPath) -> bool:
    if not isinstance(value, bool):
        raise Unfit(f"it is {_kind(value)}", "Write true or false, without quotes.")
    return value


def _integer(desk: Desk, key: Key, value: Any, path: KeyPath) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unfit(f"it is {_kind(value)}, not a whole number")
    return int(_bounded(key, value))


def _number(desk: Desk, key: Key, value: Any, path: KeyPath) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfit(f"it is {_kind(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Unfit("it is not a finite number")
    return float(_bounded(key, number))


def _seconds(desk: Desk, key: Key, value: Any, path: KeyPath) -> float:
    if isinstance(value, str):
        return float(_bounded(key, _measure(value, SECONDS)))
    return _number(desk, key, value, path)


def _size(desk: Desk, key: Key, value: Any, path: KeyPath) -> int:
    if isinstance(value, str):
        return int(_bounded(key, int(_measure(value, SIZES))))
    return _integer(desk, key, value, path)


def _measure(text: str, units: dict[str, int]) -> float:
    match = _MEASURE.fullmatch(text)
    if not match or match[2] not in units:
        example = f"{next(iter(units))!r}, {list(units)[1]!r}"
        raise Unfit(f"{text[:40]!r} is not a number and one of {', '.join(units)}",
                    f"Write a number, or one with a unit ({example} ...) in quotes.")
    number = float(match[1]) if "." in match[1] else int(match[1])
    return number * units[match[2]]


def _bounded(key: Key, number: float) -> float:
    if key.above is not None and number <= key.above:
        raise Unfit(f"{number:g} is not more than {key.above:g}")
    if ((key.least is not None and number < key.least)
            or (key.most is not None and number > key.most)):
        least, most = (f"{bound:g}" if bound is not None else "" for bound in (key.least, key.most))
        raise Unfit(f"{number:g} is not between {least} and {most}" if most
                    else f"{number:g} is less than {least}")
    return number


def _texts(desk: Desk, key: Key, value: Any, path: KeyPath) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Unfit(f"it is {_kind(value)}, not a list", "Put it in [ ].")
    return tuple(_each(desk, key, value, path, _text))


def _paths(desk: Desk, key: Key, value: Any, path: KeyPath) -> tuple[Path, ...]:
    if not isinstance(value, list):
        raise Unfit(f"it is {_kind(value)}, not a list", "Put it in [ ].")
    return tuple(_each(desk, key, value, path, _path))


def _words(desk: Desk, key: Key, value: Any, path: KeyPath) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise Unfit(f"it cannot be split into words: {str(error).lower()}") from None
        _without_shell(desk, words, path)
        value = words
    if not isinstance(value, list):
        raise Unfit(f"it is {_kind(value)}", 'Write ["PROGRAM", "ARGUMENT"] or a text.')
    words = [str(word) if type(word) is int else word for word in value]
    if not words or not words[0]:
        raise Unfit("there is no program in it")
    return tuple(_each(desk, Key("", Kind.TEXT, "", empty=True), words, path, _text))


def _without_shell(desk: Desk, words: list[str], path: KeyPath) -> None:
    if odd := sorted(_SHELL & set(words)):
        desk.say(Level.WARNING, path, "no-shell",
                 f"{', '.join(odd)}: an argument like any other, since no shell runs this",
                 'Write run = ["sh", "-c", "..."] if a shell is meant.')


def _named(desk: Desk, key: Key, value: Any, path: KeyPath) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Unfit(f"it is {_kind(value)}", 'Write { NAME = "text" }.')
    if key.name == "env":
        for name in value:
            if not name or "=" in name or "\0" in name:
                raise Unfit(f"{name!r} cannot name an environment variable")
        value = {name: str(text) if type(text) is int else text for name, text in value.items()}
    each = Key("", Kind.TEXT, "", empty=True)
    take = _text if key.name == "env" else _raw
    return {name: text for name, given in value.items()
            for text in _told(desk, each, given, (*path, name), take)}


def _path(desk: Desk, key: Key, value: Any, path: KeyPath) -> Path:
    return desk.directory / _text(desk, key, value, path)


def _guest(desk: Desk, key: Key, value: Any, path: KeyPath) -> str:
    text = _text(desk, key, value, path)
    return check_destination(text) if text else text


def check_destination(text: str) -> str:
    """A path of the machine; raises `Unfit`."""
    try:
        return check_guest_path(text)
    except BadPath as error:
        raise Unfit(error.message) from None


def _inputs(desk: Desk, key: Key, value: Any, path: KeyPath) -> tuple[Input, ...]:
    if not isinstance(value, list):
        raise Unfit(f"it is {_kind(value)}, not a list", "Put it in [ ].")
    return tuple(_each(desk, key, value, path, _input))


def _input(desk: Desk, key: Key, value: Any, path: KeyPath) -> Input:
    if isinstance(value, dict):
        text, destination = _pair(desk, key, value, path)
    else:
        text, colon, destination = _text(desk, key, value, path).rpartition(":")
        text, destination = (text, destination) if colon else (destination, "")
    source = desk.directory / text
    if not text or destination.endswith("/"):
        destination += source.name
    if not exists(source):
        desk.say(Level.WARNING, path, "input-missing", f"there is no {str(source)!r} so far")
    return Input(source, check_destination(destination or source.name))


def _outputs(desk: Desk, key: Key, value: Any, path: KeyPath) -> tuple[Output, ...]:
    if not isinstance(value, list):
        raise Unfit(f"it is {_kind(value)}, not a list", "Put it in [ ].")
    found = tuple(_each(desk, key, value, path, _output))
    taken: set[Path] = set()
    for number, output in enumerate(found):
        if output.destination in taken:
            desk.say(Level.ERROR, (*path, number), "two-outputs",
                     f"two outputs would go to {str(output.destination)!r}", 'Write "GUEST:HOST".')
        taken.add(output.destination)
    return found


def _output(desk: Desk, key: Key, value: Any, path: KeyPath) -> Output:
    if isinstance(value, dict):
        source, target = _pair(desk, key, value, path)
    else:
        source, _, target = _text(desk, key, value, path).partition(":")
        source = source.rstrip("/") or source
    check_destination(source)
    name = PurePosixPath(source).name
    if not target and source.startswith("/"):
        raise Unfit(f"it does not say where {source!r} goes on this computer",
                    f'Write "{source}:{name}".')
    if target.endswith("/"):
        target += name
    return Output(source, desk.directory / (target or name))


def _pair(desk: Desk, key: Key, value: dict[str, Any], path: KeyPath) -> tuple[str, str]:
    for name in value:
        if name not in {"source", "destination"}:
            raise Unfit(f"it has no key {name!r}", "Write { source = ..., destination = ... }.")
    if "source" not in value:
        raise Unfit("it has no source", "Write { source = ..., destination = ... }.")
    each = Key("", Kind.TEXT, "")
    source = _text(desk, each, value["source"], path)
    return source, _text(desk, each, value["destination"], path) if "destination" in value else ""


def _each(desk: Desk, key: Key, values: list[Any], path: KeyPath,
          take: Callable[[Desk, Key, Any, KeyPath], Any]) -> list[Any]:
    """Those values that fit; the others are told, each with its line."""
    return [one for number, value in enumerate(values)
            for one in _told(desk, key, value, (*path, number), take)]


def _told(desk: Desk, key: Key, value: Any, path: KeyPath,
          take: Callable[[Desk, Key, Any, KeyPath], Any]) -> list[Any]:
    """The value, if it fits; else nothing, and a finding."""
    try:
        return [take(desk, key, value, path)]
    except Unfit as unfit:
        what, instead = (*unfit.args, "")[:2]
        desk.say(Level.ERROR, path, "wrong-value", f"{title(path)}: {what}", instead)
        return []


def title(path: KeyPath) -> str:
    """A place in the file as people write it: ``task[1].env.HOME``; elements count from 1."""
    text = ""
    for part in path:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text",
             list: "a list", dict: "a table"}
    return kinds.get(type(value), "a date or time")


_CONVERT: dict[Kind, Callable[[Desk, Key, Any, KeyPath], Any]] = {
    Kind.TEXT: _text, Kind.RAW: _raw, Kind.INTEGER: _integer, Kind.NUMBER: _number,
    Kind.BOOLEAN: _boolean, Kind.SECONDS: _seconds, Kind.SIZE: _size, Kind.WORDS: _words,
    Kind.TEXTS: _texts, Kind.NAMED: _named, Kind.PATH: _path, Kind.PATHS: _paths,
    Kind.GUEST: _guest, Kind.INPUTS: _inputs, Kind.OUTPUTS: _outputs,
}
