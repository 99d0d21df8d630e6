"""Packages that one job wants installed: gone with its machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vmjob.errors import UsageError
from vmjob.job.files import Input
from vmjob.job.model import Job, Task

__all__ = ["with_packages"]

#: Where they are put in the machine, and removed from once installed.
PLACE = "/var/tmp/vmjob-packages"  # noqa: S108 - in the machine, before anything of the job runs
#: dpkg takes all at once: they may depend on each other. What it says is of no interest.
INSTALL_DEB = "dpkg --install -- {place}/*.deb"
INSTALL_TAR = 'for archive in {place}/*.tar*; do tar -xf "$archive" -C /; done'
REMOVE = "rm -r {place}"
ARCHIVES = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz")


def with_packages(job: Job) -> Job:
    """The same job with a first task, as root, that installs its packages.

    Debian packages with dpkg, which runs their scripts: what they depend on must be in the image or
    given as well. Tar archives are unpacked at ``/``. Raises `UsageError` for others.
    """
    if not job.packages:
        return job
    steps = ["set -e"]
    if any(path.name.endswith(".deb") for path in job.packages):
        steps.append(INSTALL_DEB.format(place=PLACE))
    if any(_is_archive(path) for path in job.packages):
        steps.append(INSTALL_TAR.format(place=PLACE))
    steps.append(REMOVE.format(place=PLACE))
    inputs = tuple(Input(path, f"{PLACE}/{number:03}-{_name(path)}")
                   for number, path in enumerate(job.packages))
    task = Task(("/bin/sh", "-c", "\n".join(steps)), user="root", name="install packages",
                stdout="/dev/null", weight=0.0, env={"DEBIAN_FRONTEND": "noninteractive"})
    return replace(job, packages=(), inputs=inputs + job.inputs, tasks=(task, *job.tasks))


def _name(path: Path) -> str:
    if path.name.endswith(".deb"):
        return path.name
    if path.name.endswith(".tgz"):
        return path.name.removesuffix(".tgz") + ".tar.gz"
    if _is_archive(path):
        return path.name
    raise UsageError(f"cannot install {str(path)!r}: it is neither a Debian package nor a tar "
                     "archive", advice="An RPM package can be converted: rpm2archive NAME.rpm "
                     "makes a tar archive of it.")


def _is_archive(path: Path) -> bool:
    return path.name.endswith(ARCHIVES)
