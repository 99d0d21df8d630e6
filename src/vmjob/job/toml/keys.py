"""Every key of a job file in TOML: the one description that reader, writer, schema and page share.

A key has the name of the record's field that it sets, but for `run`, `task`, `folder`, `forward`,
which are singular because that is how they are written, and `mailbox_base64`.
"""

from __future__ import annotations

import enum
from dataclasses import MISSING, dataclass, fields
from typing import Any

from vmjob.job.files import Folder
from vmjob.job.model import (
    LEAST_MEMORY_MB,
    MOST_CPUS,
    MOST_DISK_GB,
    MOST_MEMORY_MB,
    Forward,
    Hardware,
    Job,
    Network,
    OnFlood,
    Task,
    Triggers,
)

__all__ = ["Key", "Kind", "Table", "FORWARD", "FOLDER", "HARDWARE", "JOB", "TASK", "TRIGGERS",
           "SECONDS", "SIZES"]

#: What may follow a number of seconds, and a number of bytes.
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
MOST_PORT = 65535


class Kind(enum.StrEnum):
    """What a value may be."""

    TEXT = "text"
    RAW = "any text"  # also with NUL
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    SECONDS = "seconds"  # a number, or a text as "10 min"
    SIZE = "size"  # bytes, or a text as "512 MiB"
    WORDS = "words"  # a list of texts, or one text that is split as a shell does
    TEXTS = "texts"  # a list of texts
    NAMED = "named texts"  # a table of texts
    PATH = "path"  # of the host, relative to the job file
    PATHS = "paths"
    GUEST = "path in the machine"
    INPUTS = "inputs"  # "SRC:DST" or {source, destination}
    OUTPUTS = "outputs"
    TABLE = "table"
    TABLES = "tables"


@dataclass(frozen=True)
class Key:
    """One key.

    ``what``: one line for people. ``field``: that of the record, where it has another name.
    ``least``, ``most``: bounds, allowed themselves; ``above``: one that is not. ``choices``: the
    only texts allowed. ``table``: the keys of a table, or of each of several. ``empty``: an empty
    text means something.
    """

    name: str
    kind: Kind
    what: str
    field: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    table: Table | None = None
    required: bool = False
    empty: bool = False

    @property
    def target(self) -> str:
        """The record's field."""
        return self.field or self.name


@dataclass(frozen=True)
class Table:
    """The keys of one kind of table, and the record that it becomes."""

    title: str
    record: type[Any]
    keys: tuple[Key, ...]

    def __getitem__(self, name: str) -> Key:
        return next(key for key in self.keys if key.name == name)

    def default(self, key: Key) -> Any:
        """What the field is where the key is not written; a factory's default is made."""
        for each in fields(self.record):
            if each.name == key.target:
                return (each.default if each.default_factory is MISSING
                        else each.default_factory())
        return MISSING


TASK = Table("[[task]]", Task, (
    Key("run", Kind.WORDS, "the program and its arguments; a text is split as a shell splits it, "
        "but no shell runs it", field="argv", required=True),
    Key("name", Kind.TEXT, "what messages call it; else the program's name", empty=True),
    Key("env", Kind.NAMED, "environment variables, besides the machine's own"),
    Key("cwd", Kind.TEXT, "directory in the machine; else the job's"),
    Key("user", Kind.TEXT, "user in the machine; else `job`, who has no rights"),
    Key("stdin", Kind.TEXT, "file in the machine that is its input"),
    Key("stdout", Kind.TEXT, "file in the machine that its output is appended to, instead of the "
        "job's"),
    Key("stderr", Kind.TEXT, "the same for its messages"),
    Key("weight", Kind.NUMBER, "its share of the job's fraction done", least=0),
    Key("fraction_file", Kind.TEXT, "file in which it writes its own fraction done: a number from "
        "0 to 1 on the last line"),
    Key("checkpoint_file", Kind.TEXT, "file that changes when the program could start again from "
        "there"),
    Key("time_limit", Kind.SECONDS, "run time after which it is ended, which counts as success",
        above=0),
    Key("may_fail", Kind.BOOLEAN, "the tasks after it run even when it failed"),
    Key("daemon", Kind.BOOLEAN, "it runs beside the others, from before the first to after the "
        "last"),
    Key("cpu_seconds", Kind.SECONDS, "CPU time of all its processes together", above=0),
    Key("memory_bytes", Kind.SIZE, "memory of all its processes together", least=1),
    Key("file_bytes", Kind.SIZE, "size of each file that it writes", least=0),
    Key("processes", Kind.INTEGER, "its processes at one time", least=1),
))

FOLDER = Table("[[folder]]", Folder, (
    Key("name", Kind.TEXT, "what it is called; triggers are below the one called `shared`",
        required=True),
    Key("source", Kind.PATH, "directory of the host", required=True),
    Key("destination", Kind.GUEST, "where the job finds it; else its name, in the job's directory; "
        "an empty text: the job's directory itself", empty=True),
    Key("live", Kind.BOOLEAN, "changes appear on the other side while the tasks run; else it goes "
        "in before the first task and what changed comes back after the last"),
    Key("writable", Kind.BOOLEAN, "changes come back at all"),
    Key("links", Kind.BOOLEAN, "files of BOINC's that only name another stand for that one"),
    Key("base", Kind.PATH, "where the paths in those begin; else in the folder itself"),
    Key("links_to", Kind.PATHS, "directories that those lead below only; else anywhere"),
    Key("links_not_to", Kind.PATHS, "directories among those that none leads below"),
    Key("without", Kind.TEXTS, "names at its top that are not the job's business; `*`: any "
        "characters"),
    Key("copies", Kind.PATHS, "files of the host that are put there first, unless they are there"),
    Key("texts", Kind.NAMED, "files that are written there first, with what they hold"),
    Key("max_bytes", Kind.SIZE, "of all in it", least=1),
    Key("max_files", Kind.INTEGER, "of all in it", least=1),
))

TRIGGERS = Table("[triggers]", Triggers, (
    Key("completion", Kind.TEXT, "the job is over when it appears: first line the exit code, "
        "second 1 if people are to be told, then a message"),
    Key("temporary_exit", Kind.TEXT, "the job is to be continued later: first line seconds, then "
        "as above"),
    Key("fraction_done", Kind.TEXT, "a number from 0 to 1 on the last line"),
    Key("heartbeat", Kind.TEXT, "file that must keep changing"),
    Key("heartbeat_interval", Kind.SECONDS, "at least this often, in run time", above=0),
    Key("trickles", Kind.TEXTS, "messages for the project's server"),
    Key("uploads", Kind.TEXTS, "outputs to be uploaded as soon as they are there"),
    Key("credit", Kind.TEXT, "floating-point and integer operations so far, on two lines"),
))

FORWARD = Table("[[forward]]", Forward, (
    Key("guest_port", Kind.INTEGER, "port of the machine", least=1, most=MOST_PORT, required=True),
    Key("host_port", Kind.INTEGER, "port of this computer; 0: any that is free", least=0,
        most=MOST_PORT),
    Key("remote", Kind.BOOLEAN, "other computers may use it too"),
    Key("web", Kind.BOOLEAN, "it is a page to look at"),
))

HARDWARE = Table("[hardware]", Hardware, (
    Key("disk", Kind.PATH, "the job's own disk image, booted instead of a vmjob image"),
    Key("iso", Kind.PATH, "a CD, which is booted where there is no disk"),
    Key("iso_first", Kind.BOOLEAN, "both, the CD first"),
    Key("cache_disk", Kind.PATH, "a second disk"),
    Key("mailbox", Kind.RAW, "what the first half of a 28 KiB floppy disk holds", empty=True),
    Key("mailbox_base64", Kind.TEXT, "the same, where it is not text", empty=True),
    Key("display", Kind.BOOLEAN, "a screen, to be seen over VNC"),
    Key("screenshot", Kind.PATH, "where a picture of the screen goes when the job fails"),
))

JOB = Table("", Job, (
    Key("run", Kind.WORDS, "the one command of a job without `[[task]]`; written as there"),
    Key("image", Kind.TEXT, "image that the machine boots from"),
    Key("memory_mb", Kind.INTEGER, "memory, MiB", least=LEAST_MEMORY_MB, most=MOST_MEMORY_MB),
    Key("cpus", Kind.INTEGER, "processors", least=1, most=MOST_CPUS),
    Key("disk_gb", Kind.INTEGER, "room for all that the machine writes, GiB", least=1,
        most=MOST_DISK_GB),
    Key("network", Kind.TEXT, "what the job can reach", choices=tuple(Network)),
    Key("cpu", Kind.TEXT, "processor: `host`, `baseline` or a model of QEMU's"),
    Key("time_limit", Kind.SECONDS, "from the start of the first task to the end of the last; a "
        "job that needs more has failed", above=0),
    Key("duration", Kind.SECONDS, "after this the job is ended too, but has succeeded", above=0),
    Key("duration_file", Kind.PATH, "a file that is written when the duration is over"),
    Key("checkpoint_every", Kind.SECONDS, "run time between checkpoints; 0: none but the last one",
        least=0),
    Key("announce", Kind.PATH, "directory where `vbox_webapi.xml` and "
        "`vbox_remote_desktop.xml` tell the ports of the job's page and of its screen"),
    Key("trickle_every", Kind.SECONDS, "run time between trickles that tell the run time",
        above=0),
    Key("output_limit", Kind.SIZE, "of each output", least=0),
    Key("stream_limit", Kind.SIZE, "of each of stdout and stderr", least=0),
    Key("on_flood", Kind.TEXT, "what happens to a job that writes more than that",
        choices=tuple(OnFlood)),
    Key("inputs", Kind.INPUTS, "files and directories that go in: `\"SRC\"`, `\"SRC:DST\"` or "
        "`{ source, destination }`"),
    Key("outputs", Kind.OUTPUTS, "files and directories that come out: `\"GUEST\"`, "
        "`\"GUEST:HOST\"` or `{ source, destination }`"),
    Key("packages", Kind.PATHS, "Debian packages and tar archives that are installed first"),
    Key("triggers", Kind.TABLE, "files by which the job speaks to whoever runs it", table=TRIGGERS),
    Key("hardware", Kind.TABLE, "devices that only some jobs want", table=HARDWARE),
    Key("folder", Kind.TABLES, "directories of the host that are kept in step", field="folders",
        table=FOLDER),
    Key("forward", Kind.TABLES, "TCP ports of this computer that lead to the machine",
        field="forwards", table=FORWARD),
    Key("task", Kind.TABLES, "the commands, in order", field="tasks", table=TASK),
))
