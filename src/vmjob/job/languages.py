"""Reads a job file of any kind: which one it is, is seen from what it holds."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vmjob.errors import InputMissing, InputUnreadable
from vmjob.job.links import resolved
from vmjob.job.markup import MAX_BYTES, Document, Element, parse, shown
from vmjob.job.reading import Finding, Level, Reading, Surroundings

__all__ = ["read_bytes", "read_file"]


def read_file(path: Path, where: Surroundings | None = None) -> Reading:
    """Read the job file at ``path``: vbox_job.xml, job.xml in both dialects, or TOML.

    In a slot it may be one of BOINC's links to it.

    ``where`` defaults to the file's own directory, without a project. What is wrong inside the file
    is a finding; `InputMissing` or `InputUnreadable` is raised where there is no file to read:
    missing, not a regular one, or not ours to read.
    """
    data = _content(resolved(path))
    return read_bytes(data, where or Surroundings(path.absolute().parent),
                      is_toml=path.suffix.lower() == ".toml")


def read_bytes(data: bytes, where: Surroundings, *, is_toml: bool = False) -> Reading:
    """As `read_file`, of what a file holds. ``is_toml``: its name says so."""
    if is_toml:
        from vmjob.job import toml

        return toml.read(data, where)
    document = parse(data)
    root = next((each for each in document.roots if each.name in {"vbox_job", "job_desc"}), None)
    if root is None:
        return _unknown(document)
    if root.name == "vbox_job":
        from vmjob.job import vbox

        return vbox.read(data, where)
    if _is_of_vmwrapper(root):
        from vmjob.job import vmwrapper

        return vmwrapper.read(data, where)
    from vmjob.job import wrapper

    return wrapper.read(data, where)


def _is_of_vmwrapper(root: Element) -> bool:
    """Whether a <job_desc> is VMwrapper.py's: it has what BOINC's generic wrapper never had."""
    return any(child.name in {"unzip_task", "VMmanage_task"}
               or (child.name == "task" and any(each.name == "virtualmachine"
                                                for each in child.children))
               for child in root.children)


def _unknown(document: Document) -> Reading:
    findings = document.findings
    if not any(each.level is Level.ERROR for each in findings):
        roots = document.roots
        begins = f"begins with <{shown(roots[0].name)}>" if roots else "has no tag"
        findings += (Finding(Level.ERROR, roots[0].line if roots else 1, "no-job",
                             f"this is no job file: it {begins}",
                             "<vbox_job>, <job_desc>, or TOML in a file NAME.toml"),)
    return Reading("", tuple(sorted(findings, key=lambda each: each.line)), None)


def _content(path: Path) -> bytes:
    try:
        # Non-blocking: opening a pipe that nobody writes to would never return.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise InputMissing(f"there is no {str(path)!r}", advice="Check the path.") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or str(error)) from None
    try:
        with open(fd, "rb") as file:  # noqa: PTH123 (a descriptor)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _unreadable(path, "it is not a regular file")
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None


def _unreadable(path: Path, why: str) -> InputUnreadable:
    return InputUnreadable(f"cannot read {str(path)!r}: {why}",
                           advice="Give a file, and the right to read it.")
