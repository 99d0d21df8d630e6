"""The names that a BOINC project gives to things, and which of them work everywhere.

A real project takes more than this; but a name becomes a path, a URL, a line of XML and a field in
a database, on three operating systems, so what could mean something in one of them is refused.
"""

from __future__ import annotations

import re

from vmjob.errors import UsageError

__all__ = ["check_app", "check_logical", "check_physical", "check_plan_class", "check_platform",
           "check_result", "version_number"]

#: The client keeps file names in 256 bytes; a physical name must leave room for a URL around it.
MAX_FILE_NAME = 160
#: Levels of directories in a logical name: real apps have one (``shared/boinc_app``).
MAX_PARTS = 4

_APP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PLATFORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*(_[A-Za-z0-9-]+)*")
_PLAN_CLASS = re.compile(r"[A-Za-z0-9]+(_[A-Za-z0-9]+)*")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,4})\.([0-9]{2})")
_FILE = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")


def _refuse(what: str, name: str, why: str) -> UsageError:
    return UsageError(f"{what} {name[:80]!r} cannot be used: {why}",
                      advice="Choose another one; docs/reference/project.md says what is possible.")


def check_app(name: str) -> str:
    """An app's short name: letters, digits, ``_ . -``, at most 64."""
    if not _APP.fullmatch(name):
        raise _refuse("the app's name", name, "it is not 1 to 64 letters, digits, '_', '.' or '-'")
    return name


def check_platform(name: str) -> str:
    """A platform, as ``x86_64-pc-linux-gnu``; two ``_`` in a row would end it in a path."""
    if not _PLATFORM.fullmatch(name) or len(name) > 64:
        raise _refuse("the platform", name, "it is not like x86_64-pc-linux-gnu")
    return name


def check_plan_class(name: str, *, ours: bool = True) -> str:
    """A plan class, or '' for none. ``ours``: it is for vmjob's jobs.

    ``vbox`` in it would tell the client that this is VirtualBox: it would take the workunit's
    ``rsc_memory_bound`` for the memory in use instead of measuring it, and read the job's stderr
    for VirtualBox's errors; ``docker`` is treated likewise by clients from 8.0 on.
    """
    if not name:
        return name
    if not _PLAN_CLASS.fullmatch(name) or len(name) > 32:
        raise _refuse("the plan class", name, "it is not 1 to 32 letters, digits and single '_'")
    for word in ("vbox", "docker"):
        if ours and word in name.lower():
            raise _refuse("the plan class", name,
                          f"a client that sees {word!r} in it treats the job as one of that kind")
    return name


def version_number(version: str) -> int:
    """``MAJOR.MINOR`` with two digits after the dot as BOINC's number: 1.05 is 105.

    BOINC's tools would read 1.5 as 105, and nobody who writes it means that.
    """
    match = _VERSION.fullmatch(version)
    if match is None:
        raise _refuse("the version", version, "it is not like 1.00, with two digits after the dot")
    return int(match[1]) * 100 + int(match[2])


def check_physical(name: str, *, ours: bool = True) -> str:
    """A physical name: unique in the project for ever, the file's name on server and client.

    ``ours``: it is a file of vmjob's.
    """
    if not _FILE.fullmatch(name) or len(name) > MAX_FILE_NAME:
        raise _refuse("the physical name", name,
                      f"it is not 1 to {MAX_FILE_NAME} letters, digits, '_', '.', '+' or '-'")
    if name.endswith(".sig") or name == "version.xml":
        raise _refuse("the physical name", name, "BOINC's tools take such a file for their own")
    if ours and "vboxwrapper" in name:
        raise _refuse("the physical name", name, "a client that sees it takes the job for "
                      "VirtualBox's, and does not measure its memory")
    return name


def check_logical(name: str) -> str:
    """A logical name: what the job calls the file, a path in the slot without ``..``."""
    parts = name.split("/")
    if (len(parts) > MAX_PARTS or len(name) > MAX_FILE_NAME
            or not all(_FILE.fullmatch(part) for part in parts)):
        raise _refuse("the logical name", name, "it is not a path in the slot of letters, digits, "
                      "'_', '.', '+' and '-'")
    return name


def check_result(name: str) -> str:
    """A result's or workunit's name."""
    if not _FILE.fullmatch(name) or len(name) > MAX_FILE_NAME:
        raise _refuse("the result's name", name, "it is not letters, digits, '_', '.', '-'")
    return name
