"""The one record at the end of a job: what ``--json`` prints. Its fields are an interface."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from vmjob.guest.client import TaskEnd

__all__ = ["OutputFile", "Record", "describe_output"]


class OutputFile(msgspec.Struct, frozen=True):
    """One file of an output: ``path`` on this computer, ``size`` in bytes."""

    path: str
    size: int
    sha256: str


class Record(msgspec.Struct):
    """How a job ended.

    ``exit_code`` is the process exit code of ``vmjob run``: the job's own, 128+N when signal N
    ended it, or 125, 126, 127 when ``error`` says that it did not run to its end. ``phases`` are
    seconds: `vmjob.engine.life.State`, and ``total``. ``message``: what the job said of its end,
    and whether that is for the owner of the computer (``notice``).
    """

    exit_code: int = 125
    status: str = "failed"  # succeeded, failed
    error: dict[str, Any] | None = None
    tasks: list[TaskEnd] = []
    phases: dict[str, float] = {}
    machine: dict[str, Any] = {}
    image: dict[str, Any] = {}
    outputs: list[OutputFile] = []
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    discarded_bytes: int = 0
    warnings: list[str] = []
    kept: str | None = None
    message: str = ""
    notice: bool = False


def exit_code_of(end: TaskEnd) -> int:
    """A command's end as an exit code: 128+N for signal N."""
    return end.exit_code if end.exit_code is not None else 128 + (end.signal or 0)


def describe_output(path: Path) -> list[OutputFile]:
    """Each regular file at or below ``path`` with its SHA-256; links are not followed."""
    if path.is_symlink():
        return []
    if path.is_file():
        return [_describe(path)]
    found = []
    for directory, _, names in os.walk(path):
        files = (Path(directory) / name for name in sorted(names))
        found += [_describe(file) for file in files if file.is_file() and not file.is_symlink()]
    return sorted(found, key=lambda each: each.path)


def _describe(path: Path) -> OutputFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return OutputFile(str(path), path.stat().st_size, digest)
