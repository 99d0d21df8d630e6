"""From a job file in TOML to a job."""

from __future__ import annotations

import base64
import binascii
import difflib
import math
import re
import tomllib
from dataclasses import replace
from typing import Any

from vmjob.job.files import FOLDER_NAME, FOLDER_NAMES
from vmjob.job.model import Job, Task
from vmjob.job.reading import Finding, Level, Reading, Surroundings
from vmjob.job.toml.keys import JOB, Key, Kind, Table
from vmjob.job.toml.lines import KeyPath, lines_of
from vmjob.job.toml.values import Desk, Unfit, check_destination, convert, printable, title

__all__ = ["MOST_BYTES", "read"]

LANGUAGE = "toml"
#: No job file of anybody is a tenth of this, or has a tenth of these dots in a line.
MOST_BYTES = 256 << 10
#: The time that `tomllib` needs for a key of n parts grows with n².
MOST_DOTS = 300


def read(data: bytes, where: Surroundings) -> Reading:
    """Read a job file; its paths are relative to ``where.directory``.

    What ``where`` says of processors and memory replaces what the file says. A key that is not
    known is an error: it may be a limit with a slip in its name.
    """
    try:
        content, lines = _parse(data)
    except _Unreadable as error:
        return Reading(LANGUAGE, (error.args[0],), None)
    desk = Desk(where.directory.absolute(), lines)
    job = _job(desk, content, where)
    if where.arguments:
        desk.say(Level.WARNING, (), "arguments-unused",
                 f"the arguments {' '.join(where.arguments)!r} reach no task of this file")
    findings = sorted(desk.findings, key=lambda finding: finding.line)
    return Reading(LANGUAGE, tuple(findings), None if desk.errors else job)


class _Unreadable(Exception):
    """The file is no TOML; holds the finding."""


def _refused(line: int, code: str, what: str, instead: str = "") -> _Unreadable:
    return _Unreadable(Finding(Level.ERROR, line, code, printable(what), instead))


def _parse(data: bytes) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    if len(data) > MOST_BYTES:
        raise _refused(0, "too-large", f"{len(data)} bytes are more than a job file has")
    for number, row in enumerate(data.splitlines(), 1):
        if row.count(b".") > MOST_DOTS:
            raise _refused(number, "too-large",
                           f"there are more than {MOST_DOTS} dots in this line")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")  # editors of Windows add both
        return tomllib.loads(text), lines_of(text)
    except UnicodeDecodeError as error:
        raise _refused(data.count(b"\n", 0, error.start) + 1, "encoding", "this is not UTF-8",
                 "Save the file as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        what = str(error)
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", what)
        line = int(place[1]) if place and place[1] else text.rstrip().count("\n") + 1
        raise _refused(line, "syntax", what[:place.start()] if place else what) from None
    except (ValueError, RecursionError, OverflowError) as error:
        # A number of thousands of digits, or thousands of brackets.
        raise _refused(0, "syntax", f"it cannot be read: {error}") from None


def _job(desk: Desk, content: dict[str, Any], where: Surroundings) -> Job | None:
    given = _fields(desk, JOB, content, ())
    run = given.pop("run", None)
    if run and "tasks" in given:
        desk.say(Level.ERROR, ("run",), "two-commands", "there is `run` and `[[task]]`",
                 "Make it the first [[task]].")
    elif run:
        given["tasks"] = (Task(run),)
    tasks = given.setdefault("tasks", ())
    hardware = given.get("hardware")
    boots_itself = hardware is not None and (hardware.disk or hardware.iso)
    if not tasks and not boots_itself and "run" not in content and "task" not in content:
        desk.say(Level.ERROR, (), "no-task", "there is no command to run",
                 'Write run = ["PROGRAM", "ARGUMENT"], or several [[task]].')
    elif tasks and all(task.daemon for task in tasks):
        desk.say(Level.ERROR, ("task",), "only-daemons",
                 "all tasks are daemons: there is none whose end is the job's")
    folders = {folder.name for folder in given.get("folders", ())}
    if "triggers" in content and "shared" not in folders:
        desk.say(Level.WARNING, ("triggers",), "needs-shared",
                 "triggers are files in the folder `shared`, and there is none of that name",
                 'Write a [[folder]] with name = "shared".')
    if desk.errors:
        return None
    job = Job(**given)
    if where.cpus is not None:
        job = replace(job, cpus=where.cpus)
    if where.memory_mb is not None:
        job = replace(job, memory_mb=math.ceil(where.memory_mb))
    return job


def _fields(desk: Desk, table: Table, content: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """What the keys of a table give, by field; whatever does not fit is told and left out."""
    names = {key.name for key in table.keys}
    given: dict[str, Any] = {}
    for name in content:
        if name not in names:
            _unknown(desk, table, name, path)
    for key in table.keys:
        place = (*path, key.name)
        if key.name not in content:
            if key.required:
                desk.say(Level.ERROR, path, "missing-key",
                         f"{title(path)}: there is no `{key.name}`", f"{key.name}: {key.what}.")
            continue
        try:
            given[key.target] = _value(desk, key, content[key.name], place)
        except Unfit as unfit:
            what, instead = (*unfit.args, "")[:2]
            desk.say(Level.ERROR, place, "wrong-value", f"{title(place)}: {what}", instead)
    return given


def _value(desk: Desk, key: Key, value: Any, path: KeyPath) -> Any:
    if key.kind is Kind.TABLE:
        assert key.table is not None
        if not isinstance(value, dict):
            raise Unfit("it is not a table", f"Write {key.table.title} on a line of its own.")
        return _record(desk, key.table, value, path)
    if key.kind is Kind.TABLES:
        assert key.table is not None
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise Unfit("it is not a list of tables", f"Write {key.table.title} with two brackets "
                        "for each.")
        made = [_record(desk, key.table, each, (*path, number))
                for number, each in enumerate(value)]
        return tuple(each for each in made if each is not None)
    return convert(desk, key, value, path)


def _record(desk: Desk, table: Table, content: dict[str, Any], path: KeyPath) -> Any:
    before = desk.errors
    given = _fields(desk, table, content, path)
    if "mailbox_base64" in given:
        if "mailbox" in given:
            desk.say(Level.ERROR, (*path, "mailbox_base64"), "two-mailboxes",
                     "there is `mailbox` and `mailbox_base64`", "Leave one of them out.")
        given["mailbox"] = _bytes(desk, given.pop("mailbox_base64"), (*path, "mailbox_base64"))
    elif "mailbox" in given:
        given["mailbox"] = given["mailbox"].encode()
    if table.title == "[[folder]]" and "name" in given and "destination" not in content:
        try:
            given["destination"] = check_destination(given["name"])
        except Unfit as unfit:
            desk.say(Level.ERROR, (*path, "name"), "wrong-value", f"{title(path)}: {unfit.args[0]}",
                     "Say the destination.")
    if table.title == "[[folder]]" and not FOLDER_NAME.fullmatch(given.get("name", "x")):
        desk.say(Level.ERROR, (*path, "name"), "wrong-value",
                 f"{title(path)}: {given['name']!r} is no name of a folder",
                 f"A name: {FOLDER_NAMES}.")
    if desk.errors > before:
        return None
    return table.record(**given)


def _bytes(desk: Desk, text: str, path: KeyPath) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        desk.say(Level.ERROR, path, "wrong-value", "mailbox_base64: it is not base64")
        return b""


def _unknown(desk: Desk, table: Table, name: str, path: KeyPath) -> None:
    place = (*path, name)
    near = difflib.get_close_matches(name, [key.name for key in table.keys], 1)
    if path and name in {key.name for key in JOB.keys}:
        instead = "It is a key of the job: write it above the first [section]."
    elif near:
        instead = f"Write `{near[0]}`?"
    else:
        instead = f"There are: {', '.join(key.name for key in table.keys)}."
    desk.say(Level.ERROR, place, "unknown-key", f"{title(place)}: there is no such key", instead)
