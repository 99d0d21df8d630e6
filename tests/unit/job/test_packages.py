"""What a job wants installed is installed first, by root, and by nothing that vmjob invented."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmjob.errors import UsageError
from vmjob.job.model import Job, Task
from vmjob.job.packages import with_packages

JOB = Job((Task(("true",)),))


def test_a_job_without_packages_stays_what_it_is() -> None:
    assert with_packages(JOB) is JOB


def test_packages_go_in_and_are_installed_before_the_first_task() -> None:
    packages = (Path("/p/a_1.deb"), Path("/p/b.tgz"), Path("/q/a_1.deb"))
    made = with_packages(Job((Task(("true",)),), packages=packages))
    assert [given.destination.rpartition("/")[2] for given in made.inputs] == [
        "000-a_1.deb", "001-b.tar.gz", "002-a_1.deb"]
    first, second = made.tasks
    assert (first.user, first.weight) == ("root", 0.0)
    assert "dpkg" in first.argv[2]
    assert "tar" in first.argv[2]
    assert second == Task(("true",))
    assert made.packages == ()
    assert with_packages(made) is made


@pytest.mark.parametrize("name", ["x.rpm", "x.zip", "x"])
def test_others_are_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        with_packages(Job((Task(("true",)),), packages=(Path(name),)))
    assert "rpm2archive" in refused.value.advice
