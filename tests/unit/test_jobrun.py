"""What `vmjob job run` makes of a job before it is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmjob.cli.carrying import How
from vmjob.cli.jobrun import apart, run
from vmjob.errors import UsageError
from vmjob.job.files import Folder
from vmjob.job.model import Job, Task


def shared(path: Path) -> Job:
    return Job((Task(("true",)),), folders=(Folder("job", path, "", without=("lock",)),))


def test_a_slot_and_events_in_a_shared_directory_are_not_shared(tmp_path: Path) -> None:
    """A guest could write there what is to be run when the job is continued."""
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("dir")
    job = apart(shared(tmp_path / "link"), tmp_path / "dir" / "slot 1", None,
                tmp_path / "dir" / "events")
    assert job.folders[0].without == ("lock", "slot 1", "events")
    elsewhere = shared(tmp_path / "dir")
    assert apart(elsewhere, tmp_path / "slot", tmp_path / "dir2") == elsewhere


@pytest.mark.parametrize("slot", ["dir", "dir/deeper/slot"])
def test_a_slot_that_cannot_be_left_out_is_refused(tmp_path: Path, slot: str) -> None:
    (tmp_path / "dir").mkdir()
    with pytest.raises(UsageError, match="inside the job's folder"):
        apart(shared(tmp_path / "dir"), tmp_path / slot)


@pytest.mark.parametrize(("options", "seconds"), [((), 30.0), (("--trickle", "5"), 5.0)])
def test_what_no_option_says_is_as_the_file_says(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...],
        seconds: float) -> None:
    (tmp_path / "job.toml").write_text('run = ["true"]\ntrickle_every = 30\n')
    carried: list[Job] = []

    async def carry(job: Job, how: How) -> int:
        carried.append(job)
        return 0

    monkeypatch.setattr("vmjob.cli.jobrun.carry", carry)
    monkeypatch.setattr("vmjob.cli.jobrun.leave", sys.exit)
    CliRunner().invoke(run, [*options, str(tmp_path / "job.toml")])
    assert [job.trickle_every for job in carried] == [seconds]
