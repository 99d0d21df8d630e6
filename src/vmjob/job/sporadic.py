"""BOINC's sporadic jobs: they compute when they are told that they may."""

from __future__ import annotations

from dataclasses import replace

from vmjob.job.model import SHARED, Job

__all__ = ["sporadic"]

#: The client's word in ``shared/ca``: 0 nothing, 1 do not compute, 2 you could, 3 you do.
MAY_COMPUTE = "2\n"


def sporadic(job: Job) -> Job:
    """The job with a word in its shared folder, if it has one, that it may compute now."""
    return replace(job, folders=tuple(
        replace(each, texts={**each.texts, "ca": MAY_COMPUTE}) if each.name == SHARED else each
        for each in job.folders))
