"""A job as lines that read like TOML: a plain value each, then a section for each record."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from vmjob.job.model import Job

__all__ = ["listing"]

#: Shown even where they are what they would be without being asked for.
ALWAYS = frozenset({"image", "memory_mb", "cpus", "network"})
#: Characters of a text after which the rest of it is only counted.
LONG = 200


def listing(job: Job) -> str:
    """What is not as it would be anyway, one field on a line; for people, not to be read back."""
    return "\n".join(_lines(job, ""))


def _lines(record: Any, path: str) -> list[str]:
    plain: list[str] = []
    sections: list[str] = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if value is None or (value == _default(field) and (path or field.name not in ALWAYS)):
            continue
        name = f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(value):
            sections += ["", f"[{name}]", *_lines(value, name)]
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for each in value:
                sections += ["", f"[[{name}]]", *_lines(each, name)]
        else:
            plain.append(f"{field.name} = {_plain(value)}")
    return plain + sections


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return f'"({len(value)} bytes)"'
    if isinstance(value, dict):
        inside = (f"{_plain(key)} = {_plain(each)}" for key, each in value.items())
        return "{ " + ", ".join(inside) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    text = str(value)
    if len(text) > LONG:
        text = f"{text[:LONG]}... ({len(text)} characters)"
    return json.dumps(text, ensure_ascii=True)
