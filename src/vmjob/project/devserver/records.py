"""What the development server knows: files, jobs, results, trickles, events."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmjob.project.version import AppVersion

__all__ = ["ABORTED", "COMPUTE_ERROR", "UPLOADED", "Event", "InputFile", "Job", "Offer", "Reported",
           "Result", "ServedFile", "Trickle"]

#: States of a result, as the client reports them (``lib/common_defs.h``).
DOWNLOAD_ERROR, COMPUTE_ERROR, UPLOADED, ABORTED = 1, 3, 5, 6


@dataclass(frozen=True)
class ServedFile:
    """A file that clients may download; ``path`` is where it is."""

    name: str
    path: Path
    nbytes: int
    md5: str


@dataclass(frozen=True)
class InputFile:
    """An input of a job. ``copy``: the client copies it into the slot."""

    file: ServedFile
    open_name: str
    copy: bool


@dataclass(frozen=True)
class Offer:
    """An app version with what a reply needs of it: the files, and their signatures."""

    version: AppVersion
    files: dict[str, ServedFile]
    signatures: dict[str, str]


@dataclass(frozen=True)
class Job:
    """A workunit and its only result. ``name`` is the result's; sizes are bytes.

    ``copy_outputs``: logical names of outputs that the job writes in its slot.
    """

    name: str
    workunit: str
    app: str
    inputs: tuple[InputFile, ...]
    outputs: tuple[str, ...]
    command_line: str
    disk_bound: float
    memory_bound: float
    fpops_est: float
    fpops_bound: float
    max_nbytes: int
    delay_bound: float
    copy_outputs: frozenset[str]
    plan_class: str | None

    def output_name(self, number: int) -> str:
        """The physical name of an output."""
        return f"{self.name}_{number}"


@dataclass(frozen=True)
class Reported:
    """What the client reports of a job. Times are seconds, sizes bytes; ``state`` 5 is success.

    ``stderr_out`` is what the job wrote (the last 63 KB of it), ``message`` what the client says
    about a failure.
    """

    name: str
    state: int
    exit_status: int
    cpu_time: float
    elapsed: float
    stderr_out: str
    message: str
    version_num: int
    plan_class: str
    peak_memory: float
    peak_disk: float


@dataclass(frozen=True)
class Result(Reported):
    """The same with ``outputs``: logical name -> the uploaded file; those that came whole."""

    outputs: dict[str, Path]

    @property
    def succeeded(self) -> bool:
        return self.state == UPLOADED and self.exit_status == 0


@dataclass(frozen=True)
class Trickle:
    """A message from a running job; ``time`` is the client's, seconds since 1970."""

    result: str
    time: int
    variety: str
    text: str


@dataclass(frozen=True)
class Event:
    """Something that happened, for logs and tests: ``kind`` and its facts."""

    kind: str
    facts: dict[str, Any]
    at: float = field(default_factory=time.time)
