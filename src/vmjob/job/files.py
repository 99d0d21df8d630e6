"""The files of a job: what goes in, what comes out, what is kept in step."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vmjob.errors import BadPath, InputMissing, InputUnreadable

__all__ = ["INIT_DATA", "Folder", "Input", "Output", "check_guest_path", "check_input",
           "exists", "is_directory", "parse_input", "parse_output"]

#: The file of BOINC's that holds the account's secrets, wherever it lies.
INIT_DATA = "init_data.xml"
#: What a folder that is kept in step may hold unless its job says otherwise: more than any job of
#: the field has there, little enough that a guest can neither fill a disk nor keep a host busy.
FOLDER_BYTES = 8 << 30
FOLDER_FILES = 10_000


@dataclass(frozen=True)
class Input:
    """A file or directory of the host that the job finds at ``destination``.

    ``destination`` is relative to the job's directory, or absolute in the machine.
    """

    source: Path
    destination: str


@dataclass(frozen=True)
class Output:
    """A file or directory that the job makes (``source``), and where it goes on the host."""

    source: str
    destination: Path


#: Names of folders: files and directories of the slot and of the machine are called after them.
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FOLDER_NAMES = ("it has letters, digits, `.`, `_` and `-`, 64 at most, and begins with a letter or "
                "digit")


@dataclass(frozen=True)
class Folder:
    """A directory of the host that the job finds at ``destination``.

    ``name``: what the formats call it (``shared``, ``project``, ``scratch``; ``job`` for the one
    that the tasks run in). ``destination`` as in `Input`; '' is the job's directory itself.
    ``live``: changes on either side appear on the other while the tasks run; else what is there
    goes in before the first task, and what changed comes back after the last. ``writable``: changes
    come back at all.

    ``links``: files of BOINC's that only name another (``<soft_link>``) stand for that one; paths
    in them start at ``base``, the folder itself by default. They lead below ``links_to`` only,
    and not below ``links_not_to``; without the first anywhere: who starts a job vouches for it.
    ``without``: names at its top that are not the job's business; a ``*`` stands for any
    characters. ``copies``: files of the host that are put there first, under their names, unless
    they are there; ``texts``: files that are written there first, with what they hold.
    ``max_bytes`` and ``max_files`` of all in it.
    """

    name: str
    source: Path
    destination: str
    live: bool = True
    writable: bool = True
    links: bool = False
    base: Path | None = None
    links_to: tuple[Path, ...] = ()
    links_not_to: tuple[Path, ...] = ()
    without: tuple[str, ...] = ()
    copies: tuple[Path, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    max_bytes: int = FOLDER_BYTES
    max_files: int = FOLDER_FILES


def check_input(given: Input) -> None:
    """Raise `InputMissing` or `InputUnreadable` where an input cannot be copied."""
    check_guest_path(given.destination)
    try:
        with given.source.open("rb") if given.source.is_file() else _Nothing():
            found = given.source.exists()
    except PermissionError as error:
        raise InputUnreadable(f"cannot read {str(given.source)!r}: {error.strerror}") from None
    except OSError as error:
        raise InputMissing(f"cannot use {str(given.source)!r}: {error.strerror}") from None
    if not found:
        raise InputMissing(f"there is no {str(given.source)!r}")


def exists(path: Path) -> bool:
    """Whether there is what a user has named; what cannot be asked for is not there.

    `Path.exists` raises for a name that is too long, or in a directory that is not ours to read.
    """
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_directory(path: Path) -> bool:
    """The same for a directory."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


def check_guest_path(path: str) -> str:
    """A path of the machine that a user may name: no ``..``, no control characters."""
    if not path or path == "/" or "\0" in path or ".." in PurePosixPath(path).parts:
        raise BadPath(f"{path!r} is not a path inside the machine that can be used here")
    if any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise BadPath(f"{path!r} has control characters")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise BadPath(f"{path!a} is not UTF-8") from None
    return path


def parse_input(text: str) -> Input:
    """``SRC[:DST]``; DST defaults to the last part of SRC, in the job's directory."""
    source, colon, destination = text.rpartition(":")
    if not colon or exists(Path(text)):
        source, destination = text, ""
    path = Path(source)
    name = destination or Path(path.absolute()).name
    if destination.endswith("/"):
        name = destination + Path(path.absolute()).name
    return Input(path, check_guest_path(name))


def parse_output(text: str) -> Output:
    """``GUEST[:HOST]``; HOST defaults to the last part of GUEST, in the current directory."""
    source, _, destination = text.partition(":")
    check_guest_path(source)
    if not destination and source.startswith("/"):
        raise BadPath(f"where on this computer should {source!r} go?",
                      advice=f"Say it: --out {source}:NAME")
    name = PurePosixPath(source).name
    target = Path(destination or name)
    if destination.endswith("/"):
        target = Path(destination) / name
    return Output(source.rstrip("/"), target.absolute())
