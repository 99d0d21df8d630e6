"""Looks into the programs that a job brings along, for what makes its answers differ."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vmjob.job import elf, instructions
from vmjob.job.files import Folder
from vmjob.job.links import exists, resolved
from vmjob.job.model import Job
from vmjob.job.reading import Finding, Level

__all__ = ["findings"]

#: Bounds for all files of a job together.
MOST_SECONDS = 10.0
LATE = f"it took longer than {MOST_SECONDS:g} s"
MOST_FILES = 10_000
#: Programs that are named one by one.
MOST_NAMED = 20

#: The model that has none of the instructions of AVX and after.
BASELINE = "baseline"
PAGE = "docs/explanation/processors.md"
EVERYWHERE = ("Compare its answers within one kind of computer only, by homogeneous redundancy, or "
              f"build it without them; see {PAGE}.")
HIDDEN = f"Where answers are compared, use --cpu baseline, which has none of them; see {PAGE}."


def findings(job: Job) -> tuple[Finding, ...]:
    """What is to be said of the programs for x86 among the job's inputs and folders, as far as they
    are on this computer: files of its own, not those of its image, of packages and archives.
    """
    found: list[Finding] = []
    deadline = time.monotonic() + MOST_SECONDS
    seen: set[tuple[int, int]] = set()
    more = 0
    for number, path in enumerate(_files(job)):
        if number >= MOST_FILES or time.monotonic() > deadline:
            found.append(_given_up(path, f"there are more than {MOST_FILES} files"
                                   if number >= MOST_FILES else LATE))
            break
        try:
            names = _search(path, deadline, seen)
        except elf.TooLarge:
            found.append(_not_searched(f"{str(path)!r} was", "it has more than "
                                       f"{elf.MOST_CODE >> 20} MiB of code"))
            continue
        except instructions.OutOfTime:
            found.append(_given_up(path, LATE))
            break
        if job.cpu == BASELINE:
            names = {name for name in names if not _is_hidden(name)}
        if names and len(found) < MOST_NAMED:
            found.append(_has(path, names))
        elif names:
            more += 1
    if more:
        found.append(Finding(Level.NOTE, 0, "processors-differ",
                             f"{more} more programs have such instructions"))
    return tuple(found)


def _has(path: Path, names: set[str]) -> Finding:
    hidden = all(map(_is_hidden, names))
    return Finding(Level.NOTE, 0, "processors-differ",
                   f"{str(path)!r} has {', '.join(sorted(names))}: what these give differs between "
                   f"makers of processors{'' if hidden else ', whatever --cpu says'}",
                   HIDDEN if hidden else EVERYWHERE)


def _given_up(path: Path, why: str) -> Finding:
    return _not_searched(f"from {str(path)!r} on, files were", why)


def _not_searched(what: str, why: str) -> Finding:
    return Finding(Level.NOTE, 0, "not-searched", f"{what} not searched for instructions whose "
                   f"results differ between processors: {why}")


def _is_hidden(name: str) -> bool:
    """Whether it is one of AVX or after, which a program asks for before it uses them."""
    return name.startswith("v")


def _search(path: Path, deadline: float, seen: set[tuple[int, int]]) -> set[str]:
    """The names of such instructions in a file; none where it is no program, or not to be read."""
    names: set[str] = set()
    try:
        with path.open("rb") as file:
            if not elf.is_program(file.read(elf.HEAD)):
                return names
            status = os.fstat(file.fileno())
            if (identity := (status.st_dev, status.st_ino)) in seen:
                return names
            seen.add(identity)
            for code, wide in elf.code_of(file):
                names |= instructions.search(code, wide=wide, deadline=deadline)
    except OSError:
        pass  # the readers say which inputs are not there
    return names


def _files(job: Job) -> Iterator[Path]:
    """What goes into the machine; the tasks' programs before others in their folder."""
    for given in job.inputs:
        yield from _below(given.source, None)
    programs = [task.argv[0] for task in job.tasks]
    for folder in job.folders:
        for name in programs:
            inside = PurePosixPath(name)
            if not inside.is_absolute() and ".." not in inside.parts and "\0" not in name:
                yield from _one(folder.source / inside, folder)
        for copy in folder.copies:
            yield from _one(copy, folder)
        yield from _below(folder.source, folder)


def _below(top: Path, folder: Folder | None) -> Iterator[Path]:
    if exists(top):
        yield from _one(top, folder)
        return
    if "\0" in str(top):
        return
    waiting = [str(top)]  # not `os.walk`, which calls itself as deep as the tree is
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue
        yield Path(directory)  # counts like a file: there may be many without any
        if folder is not None and directory == str(top):
            entries = [entry for entry in entries if not any(
                fnmatch.fnmatchcase(entry.name, each) for each in folder.without)]
        below = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.path)
            else:
                yield from _one(Path(entry.path), folder)
        waiting += reversed(below)


def _one(path: Path, folder: Folder | None) -> Iterator[Path]:
    if folder is not None and folder.links:
        path = resolved(path, folder.base or folder.source)
    if exists(path):  # a regular file: a pipe would not return
        yield path
