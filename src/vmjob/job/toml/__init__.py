"""vmjob's own job files, in TOML: read, write, describe."""

from __future__ import annotations

from vmjob.job.toml.reader import read
from vmjob.job.toml.writer import dump

__all__ = ["dump", "read"]
