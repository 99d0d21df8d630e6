"""What both dialects of ``job.xml`` share: that of BOINC's generic wrapper, and VMwrapper.py's."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Collection
from pathlib import Path

from vmjob.errors import BadPath
from vmjob.job import values
from vmjob.job.files import Folder
from vmjob.job.links import read_bounded
from vmjob.job.logical import resolve
from vmjob.job.markup import Document, Element, shown
from vmjob.job.model import LEAST_MEMORY_MB, Job
from vmjob.job.reading import Finding, Level, Surroundings

__all__ = ["JOB", "NOT_THE_JOBS", "add", "given_once", "is_program_of_windows", "job_folder",
           "memory", "path_in_machine", "project_of", "root_of", "shell_words", "unknown", "words"]

ROOT = "job_desc"
#: The job's directory in the machine.
JOB = "/job"

#: What a slot keeps to itself when all of it is the job's directory: the client's files, the
#: wrapper's, ours. Not `boinc_*`: that may be a program.
NOT_THE_JOBS = (
    "init_data.xml", "boinc_mmap_file", "boinc_lockfile", "boinc_setup_complete",
    "boinc_finish_called", "boinc_temporary_exit", "boinc_task_state.xml", "boinc_ufr_*",
    "boinc_ufs_*", "lockfile", "stderr.txt", "graphics_status.xml", "trickle_up.xml",
    "trickle_down_*", "wrapper_checkpoint.txt", "checkpoint.txt", "initial_file_list", "vmjob",
    "vmjob_*")

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|.*\\|.*\.(?:exe|bat|cmd|ps1)$", re.IGNORECASE | re.DOTALL)
_LETTERS = re.compile(r"[*?]")


def root_of(document: Document, findings: list[Finding]) -> Element | None:
    """The first <job_desc>; BOINC reads no further, so another one is a warning."""
    found = [root for root in document.roots if root.name == ROOT]
    if not found:
        if not any(each.level is Level.ERROR for each in findings):
            add(findings, Level.ERROR, document.roots[0].line if document.roots else 1, "no-root",
                f"there is no <{ROOT}>", f"<{ROOT}>...</{ROOT}>")
        return None
    for root in document.roots:
        if root is not found[0]:
            add(findings, Level.WARNING, root.line, "second-root",
                f"<{shown(root.name)}> besides the <{ROOT}> of line {found[0].line} is not read")
    return found[0]


def given_once(block: Element, known: Collection[str], several: Collection[str],
               findings: list[Finding]) -> dict[str, list[Element]]:
    """The elements of a block by name; of those that count once only the last."""
    given: dict[str, list[Element]] = {}
    for element in block.children:
        name = element.name
        if name not in known:
            unknown(element, known, findings)
            continue
        if name in given and name not in several:
            add(findings, Level.WARNING, element.line, "twice",
                f"<{name}> was there in line {given[name][0].line} already; this one counts")
            given[name] = []
        given.setdefault(name, []).append(element)
    return given


def unknown(element: Element, known: Collection[str], findings: list[Finding]) -> None:
    """Say that nobody knows this element, and which one may have been meant."""
    near = difflib.get_close_matches(element.name[:80], sorted(known), 1, 0.6)
    add(findings, Level.WARNING, element.line, "unknown-element",
        f"<{shown(element.name)}> is not known, so it sets nothing",
        f"<{near[0]}>" if near else "")


def words(line: str) -> list[str]:
    """A command line as BOINC's programs split it.

    ``'`` and ``"`` group only where a word begins, nothing escapes them, and their end ends the
    word: ``-x"a b"`` is two words, ``"a"b`` too. One difference: ``""`` is an empty word here,
    where BOINC's code reads past its end (parse_command_line of 7.20).
    """
    found, position = [], 0
    while position < len(line):
        letter = line[position]
        if letter.isspace():
            position += 1
        elif letter in "'\"":
            end = line.find(letter, position + 1)
            end = len(line) if end < 0 else end
            found.append(line[position + 1:end])
            position = end + 1
        else:
            end = next((at for at in range(position, len(line)) if line[at].isspace()), len(line))
            found.append(line[position:end])
            position = end
    return found


def shell_words(arguments: list[str], element: Element, findings: list[Finding]) -> None:
    """Say which arguments look as if a shell were to expand them: none does, here or there."""
    if odd := [word for word in arguments if _LETTERS.search(word)]:
        add(findings, Level.NOTE, element.line, "no-shell",
            f"{shown(' '.join(odd[:5]))}: passed as it is; no shell expands it, nor does BOINC's "
            "wrapper")


def path_in_machine(element: Element, findings: list[Finding]) -> str | None:
    """A file that a task names: in the job's directory, or absolute; None: it names none."""
    if not element.text and not element.children:
        return None
    if element.text.startswith("/") and not element.children:
        text = values.text(element, findings)
        return text if ".." not in text.split("/") else values.name(element, findings)
    return values.name(element, findings)


def is_program_of_windows(name: str, where: Surroundings) -> bool:
    """Whether a program is one of Windows: by what it holds, where it is at hand, else by name."""
    head = None
    if not name.startswith("/") and "$" not in name:
        try:
            head = read_bounded(resolve(name, where), 4)
        except BadPath:
            head = None
    if head:
        return head.startswith(b"MZ") or (_WINDOWS.match(name) is not None
                                          and not head.startswith((b"\x7fELF", b"#!")))
    return _WINDOWS.match(name) is not None


def job_folder(where: Surroundings) -> Folder:
    """The slot as the job's directory: in before the first task, changes back after the last."""
    return Folder("job", where.directory, "", live=False, links=True, without=NOT_THE_JOBS)


def memory(where: Surroundings) -> int:
    """MiB; neither dialect has an element for it."""
    if where.memory_mb is None:
        return Job.memory_mb
    return max(LEAST_MEMORY_MB, math.ceil(where.memory_mb))


def add(findings: list[Finding], level: Level, line: int, code: str, what: str,
        instead: str = "") -> None:
    """One more finding."""
    findings.append(Finding(level, line, code, what, instead))


def project_of(where: Surroundings) -> Path | None:
    """The project's directory; without a client it is `project` if that exists."""
    if where.project is not None:
        return where.project
    beside = where.directory / "project"
    return beside if os.path.isdir(beside) else None  # noqa: PTH112 (never raises)
