"""From a job to a job file in TOML.

A writer of our own, 100 lines: the one kept library for this has no way to keep a short list on one
line or a long text on several, and a job file is for people.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from vmjob.errors import UsageError
from vmjob.job.files import Folder, Input, Output
from vmjob.job.model import Hardware, Job, Task
from vmjob.job.reading import Surroundings
from vmjob.job.toml.keys import JOB, SIZES, Key, Kind, Table

__all__ = ["dump"]

_ESCAPES = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"',
            "\\": "\\\\"}
_BARE = re.compile(r"[A-Za-z0-9_-]+")
#: A list that is longer than this has one element on each line.
_WIDTH = 88


def dump(job: Job, where: Surroundings) -> str:
    """``job`` as TOML that `read` in the same place makes the same job of.

    Paths below ``where.directory`` become relative to it, others absolute. What has its default is
    left out. Raises `UsageError` for what TOML cannot hold: text that is not Unicode.
    """
    text = _table(JOB, job, where.directory.absolute())
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("a name in this job is not UTF-8, which a TOML file has to be") from None
    return text


def _table(table: Table, record: Any, directory: Path) -> str:
    """The keys of a record that have not their defaults, then its tables."""
    values, tables = [], []
    for key in table.keys:
        value = _content(table, key, record)
        if value is None or (value == table.default(key) and not key.required):
            continue
        if key.kind is Kind.TABLE:
            assert key.table is not None
            tables.append(f"[{key.name}]\n{_table(key.table, value, directory)}")
        elif key.kind is Kind.TABLES:
            assert key.table is not None
            tables += [f"[[{key.name}]]\n{_table(key.table, each, directory)}" for each in value]
        else:
            values.append(f"{key.name} = {_VALUE[key.kind](value, directory)}\n")
    return "\n".join([*(["".join(values)] if values or not tables else []), *tables])


def _content(table: Table, key: Key, record: Any) -> Any:
    """What is to be written for a key; None: nothing."""
    if isinstance(record, Job) and key.name in {"run", "task"}:
        short = len(record.tasks) == 1 and record.tasks[0] == Task(record.tasks[0].argv)
        if key.name == "run":
            return record.tasks[0].argv if short else None
        return None if short else record.tasks
    if isinstance(record, Hardware) and key.name.startswith("mailbox"):
        return _mailbox(key.name, record.mailbox)
    if isinstance(record, Folder) and key.name == "destination":
        return None if record.destination == record.name else record.destination
    return getattr(record, key.target)


def _mailbox(name: str, content: bytes | None) -> str | None:
    if content is None:
        return None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return base64.b64encode(content).decode() if name == "mailbox_base64" else None
    return text if name == "mailbox" else None


def _text(value: str, directory: Path | None = None) -> str:
    if "\n" not in value:
        return _on_one_line(value)
    # One or two quotes may stand before the three that end it.
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\\]", _escape, value).replace('"""', '""\\"')
    return f'"""\n{text}"""'


def _escape(match: re.Match[str]) -> str:
    return _ESCAPES.get(match[0]) or f"\\u{ord(match[0]):04x}"


def _boolean(value: bool, directory: Path) -> str:
    return "true" if value else "false"


def _number(value: float, directory: Path) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def _integer(value: int, directory: Path) -> str:
    return str(int(value))


def _size(value: int, directory: Path) -> str:
    for unit, factor in reversed(SIZES.items()):
        if value and factor > 1 and value % factor == 0 and value < 10**15:
            return f'"{value // factor} {unit}"'
    return str(value)


def _path(value: Path, directory: Path) -> str:
    return _text(_relative(value, directory))


def _relative(path: Path, directory: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)


def _named(value: dict[str, str], directory: Path) -> str:
    pairs = [f"{name if _BARE.fullmatch(name) else _on_one_line(name)} = {_text(text)}"
             for name, text in value.items()]
    return "{ " + ", ".join(pairs) + " }"


def _on_one_line(value: str) -> str:
    """A text in a table on one line, where TOML allows no others; or a key."""
    return '"' + re.sub(r'[\x00-\x1f\x7f"\\]', _escape, value) + '"'


def _list(one: Callable[[Any, Path], str]) -> Callable[[Any, Path], str]:
    def write(values: Any, directory: Path) -> str:
        written = [one(value, directory) for value in values]
        short = "[" + ", ".join(written) + "]"
        if len(short) <= _WIDTH and "\n" not in short:
            return short
        return "[\n" + "".join(f"  {each},\n" for each in written) + "]"

    return write


def _input(value: Input, directory: Path) -> str:
    source = _relative(value.source, directory)
    name = value.source.absolute().name
    if ":" in source + value.destination or value.destination.endswith("/"):
        return _pair(source, value.destination)
    return _text(source if value.destination == name else f"{source}:{value.destination}")


def _output(value: Output, directory: Path) -> str:
    target = _relative(value.destination, directory)
    if ":" in value.source or value.source.endswith("/"):
        return _pair(value.source, target)
    name = PurePosixPath(value.source).name
    short = target == name and not value.source.startswith("/")
    return _text(value.source if short else f"{value.source}:{target}")


def _pair(source: str, destination: str) -> str:
    return (f"{{ source = {_on_one_line(source)}, "
            f"destination = {_on_one_line(destination)} }}")


_VALUE: dict[Kind, Callable[[Any, Path], str]] = {
    Kind.TEXT: _text, Kind.RAW: _text, Kind.GUEST: _text, Kind.INTEGER: _integer,
    Kind.NUMBER: _number, Kind.SECONDS: _number, Kind.SIZE: _size, Kind.BOOLEAN: _boolean,
    Kind.WORDS: _list(_text), Kind.TEXTS: _list(_text), Kind.NAMED: _named, Kind.PATH: _path,
    Kind.PATHS: _list(_path), Kind.INPUTS: _list(_input), Kind.OUTPUTS: _list(_output),
}
