"""What `vmjob job run` makes of a job file and its own options."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmjob.cli.jobrun import apart
from vmjob.errors import UsageError
from vmjob.job.files import Folder
from vmjob.job.model import Job, Task


def job_in(directory: Path) -> Job:
    return Job((Task(("true",)),), folders=(Folder("job", directory, "", without=("lockfile",)),))


def test_a_slot_in_the_jobs_directory_is_none_of_the_jobs_files(tmp_path: Path) -> None:
    job = apart(job_in(tmp_path), tmp_path / "slot", str(tmp_path / "events"))
    assert job.folders[0].without == ("lockfile", "slot", "events")


def test_a_slot_elsewhere_changes_nothing(tmp_path: Path) -> None:
    job = job_in(tmp_path / "a")
    assert apart(job, tmp_path / "b", str(tmp_path / "a.events")) == job
    assert apart(job, tmp_path, None) == job  # only the folder is the machine's
    assert apart(job, None, None) == job


@pytest.mark.parametrize("slot", [".", "results/slot", "link/slot"])
def test_a_slot_that_the_machine_could_write_is_refused(tmp_path: Path, slot: str) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "link").symlink_to("results")
    with pytest.raises(UsageError, match="folder 'job'"):
        apart(job_in(tmp_path), tmp_path / slot, None)
