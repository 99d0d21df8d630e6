"""What reading a job file gives: the job, and everything about the file that was odd."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from vmjob.job.model import Job

__all__ = ["Finding", "Level", "Reading", "Surroundings"]


class Level(enum.StrEnum):
    """How bad a finding is."""

    ERROR = "error"  # there is no job
    WARNING = "warning"  # probably not what the author meant
    NOTE = "note"  # done in another way than elsewhere, not needed here, or good to know


@dataclass(frozen=True)
class Finding:
    """Something odd in a job file.

    ``line`` counts from 1 (0: the file as a whole). ``code`` is a stable word; ``what`` says what
    is there and how it was understood, ``instead`` what to write.
    """

    level: Level
    line: int
    code: str
    what: str
    instead: str = ""


@dataclass(frozen=True)
class Surroundings:
    """Where a job file is read: what its names and macros mean there.

    ``directory``: where the files that it names are (a slot, for BOINC). ``project``: the project's
    directory, if there is one. ``arguments``: those of the wrapper that the file does not know of.
    ``cpus``, ``memory_mb``, ``image_number``: what the wrapper's command line says instead of the
    file; None: nothing.
    """

    directory: Path
    project: Path | None = None
    arguments: tuple[str, ...] = ()
    cpus: int | None = None
    memory_mb: float | None = None
    image_number: int | None = None


@dataclass(frozen=True)
class Reading:
    """A job file, read.

    ``language``: ``vbox_job``, ``wrapper``, ``vmwrapper`` or ``toml``; '' where it is none of them.

    ``job`` is None exactly where a finding is an error.
    """

    language: str
    findings: tuple[Finding, ...]
    job: Job | None
