"""The description of job files as JSON Schema, for editors."""

from __future__ import annotations

from typing import Any

from vmjob.job.toml.keys import JOB, SECONDS, SIZES, Key, Kind, Table

__all__ = ["schema"]

_TEXT = {"type": "string", "pattern": r"^[^\u0000]*$"}


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a job file's content.

    A file that it refuses, `read` refuses too. The other way round there are things that it cannot
    say: whether paths are safe, texts can be split into words, destinations are distinct.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "A job file of vmjob", **_table(JOB)}


def _table(table: Table) -> dict[str, Any]:
    form: dict[str, Any] = {
        "type": "object", "additionalProperties": False,
        "properties": {key.name: {"description": key.what, **_default(table, key), **_value(key)}
                       for key in table.keys}}
    if required := [key.name for key in table.keys if key.required]:
        form["required"] = required
    if table is JOB:
        form["not"] = {"required": ["run", "task"]}
    return form


def _default(table: Table, key: Key) -> dict[str, Any]:
    value = table.default(key)
    return {"default": value} if isinstance(value, str | int | float) else {}


def _value(key: Key) -> dict[str, Any]:
    if key.table is not None:
        return _table(key.table) if key.kind is Kind.TABLE else {
            "type": "array", "items": _table(key.table)}
    return _FORMS[key.kind](key)


def _text(key: Key) -> dict[str, Any]:
    if key.choices:
        return {"enum": list(key.choices)}
    return dict(_TEXT) if key.empty else {**_TEXT, "minLength": 1}


def _integer(key: Key) -> dict[str, Any]:
    return {"type": "integer", **_bounds(key)}


def _number(key: Key) -> dict[str, Any]:
    return {"type": "number", **_bounds(key)}


def _bounds(key: Key) -> dict[str, Any]:
    bounds = {"minimum": key.least, "maximum": key.most, "exclusiveMinimum": key.above}
    return {name: bound for name, bound in bounds.items() if bound is not None}


def _measured(number: dict[str, Any], units: dict[str, int]) -> dict[str, Any]:
    pattern = rf"^\s*\d{{1,15}}(\.\d{{1,6}})?\s*({'|'.join(units)})\s*$"
    return {"anyOf": [number, {"type": "string", "pattern": pattern}]}


def _words(key: Key) -> dict[str, Any]:
    word = {"anyOf": [_TEXT, {"type": "integer"}]}
    return {"anyOf": [{**_TEXT, "minLength": 1}, {"type": "array", "minItems": 1, "items": word}]}


def _texts(key: Key) -> dict[str, Any]:
    return {"type": "array", "items": {**_TEXT, "minLength": 1}}


def _named(key: Key) -> dict[str, Any]:
    text: dict[str, Any] = {"type": "string"}
    if key.name == "env":
        return {"type": "object", "propertyNames": {"pattern": r"^[^=\u0000]+$"},
                "additionalProperties": {"anyOf": [_TEXT, {"type": "integer"}]}}
    return {"type": "object", "additionalProperties": text}


def _files(key: Key) -> dict[str, Any]:
    text = {**_TEXT, "minLength": 1}
    pair = {"type": "object", "additionalProperties": False, "required": ["source"],
            "properties": {"source": text, "destination": text}}
    return {"type": "array", "items": {"anyOf": [text, pair]}}


_FORMS = {
    Kind.TEXT: _text, Kind.PATH: _text, Kind.GUEST: _text, Kind.INTEGER: _integer,
    Kind.RAW: lambda _: {"type": "string"}, Kind.NUMBER: _number,
    Kind.BOOLEAN: lambda _: {"type": "boolean"},
    Kind.SECONDS: lambda key: _measured(_number(key), SECONDS),
    Kind.SIZE: lambda key: _measured(_integer(key), SIZES),
    Kind.WORDS: _words, Kind.TEXTS: _texts, Kind.PATHS: _texts, Kind.NAMED: _named,
    Kind.INPUTS: _files, Kind.OUTPUTS: _files,
}
