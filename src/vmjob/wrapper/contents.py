"""What the client has put into the slot, under its logical names: the job, an image, a hypervisor.

    vbox_job.xml, job.xml or vmjob.toml    the job file, the first that is there
    vmjob_image/manifest.json, ...         the image that the machine boots; else the default one
    vmjob_qemu.tar.gz                      QEMU, for computers that have none

Each may be a link file into the project's directory, where it stays: nothing is copied.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vmjob.errors import BadPath, JobFileInvalid
from vmjob.grid.boinc.initdata import InitData
from vmjob.home import Home
from vmjob.image import manifest
from vmjob.image.store import Image, ImageStore
from vmjob.job.files import Folder
from vmjob.job.languages import read_file
from vmjob.job.logical import is_there, resolve
from vmjob.job.model import Job
from vmjob.job.reading import Finding, Level, Surroundings
from vmjob.wrapper.policy import Policy

__all__ = ["JOB_FILES", "allows_emulation", "find_image", "find_qemu", "home_of", "limited",
           "missing_outputs", "read_job", "surroundings"]

JOB_FILES = ("vbox_job.xml", "job.xml", "vmjob.toml")
IMAGE = "vmjob_image"
#: Our home, in the project's directory.
HOME = "vmjob"
QEMU = "vmjob_qemu.tar.gz"
#: What is ours or the client's in a slot, and no business of the job's.
OURS = ("vmjob", "vmjob_*", "boinc_mmap_file", "boinc_lockfile",
        "boinc_setup_complete", "boinc_finish_called", "boinc_temporary_exit",
        "boinc_task_state.xml", "boinc_ufr_*", "boinc_ufs_*", "stderr.txt", "graphics_status.xml",
        "trickle_up.xml")
#: A volunteer's word on the project's website that emulation is welcome.
_EMULATION = re.compile(r"<vmjob_emulation>\s*1\s*</vmjob_emulation>|<vmjob_emulation\s*/>")
#: Link files that are looked at for outputs that are missing.
MOST_LINKS = 1000


def home_of(init: InitData | None) -> Home:
    """Where templates and proofs are kept: with the project, and gone when it is detached."""
    return Home(init.project_dir / HOME) if init is not None else Home()


def surroundings(directory: Path, init: InitData | None, arguments: tuple[str, ...],
                 cpus: int | None, memory_mb: float | None,
                 image_number: int | None) -> Surroundings:
    """What a job file's names mean in this slot."""
    project = None if init is None else _project(directory, init.project_dir)
    return Surroundings(directory, project, arguments, cpus, memory_mb, image_number)


def _project(directory: Path, told: Path) -> Path:
    """The project's directory as the slot's links have it: ../../projects/X, whatever leads there.

    Debian's client has a symbolic link in its path.
    """
    linked = Path(os.path.normpath(directory / "../../projects" / told.name))
    with contextlib.suppress(OSError):
        if linked.samefile(told):
            return linked
    return told


def read_job(where: Surroundings) -> tuple[Job, list[Finding]]:
    """The slot's job, and what was odd about its file. Raises `JobFileInvalid`."""
    for name in JOB_FILES:
        if is_there(name, where):
            break
    else:
        raise JobFileInvalid(f"there is no job file in the slot ({', '.join(JOB_FILES)})",
                             advice="Give the application version one, under such a logical name.")
    reading = read_file(where.directory / name, where)
    if reading.job is None:
        wrong = [f"{name}:{each.line}: {each.what}" for each in reading.findings
                 if each.level is Level.ERROR]
        raise JobFileInvalid("; ".join(wrong[:5]))
    found = [each for each in reading.findings if each.level is not Level.NOTE]
    return _here(reading.job, where), found


def _here(job: Job, where: Surroundings) -> Job:
    """The job with the slot's links followed: files stand where the client wants them."""
    inputs = tuple(replace(each, source=_input(each.source, where)) for each in job.inputs)
    outputs = tuple(replace(each, destination=_allowed(_file(each.destination, where), where))
                    for each in job.outputs)
    folders = tuple(_folder(each, where) for each in job.folders)
    mark = None if job.duration_file is None else _file(job.duration_file, where)
    given = job.hardware
    for path in (*(folder.source for folder in folders), given.disk, given.iso, given.cache_disk,
                 given.screenshot, *job.packages, job.announce, mark):
        if path is not None:
            _allowed(path, where)
    return replace(job, inputs=inputs, outputs=outputs, folders=folders, duration_file=mark)


def _input(path: Path, where: Surroundings) -> Path:
    found = _allowed(_file(path, where), where)
    if _real(found) == _real(where.directory):
        raise JobFileInvalid(
            "the slot itself is no input: it holds the client's files, and the account's key",
            advice="Name the files, or share the slot as a folder.")
    if where.project is not None and _real(found) == _real(where.project):
        raise JobFileInvalid("the project's directory itself is no input: machines are in it",
                             advice="Name the files, or share the directory as a folder.")
    return found


def _allowed(path: Path, where: Surroundings) -> Path:
    """What is the slot's or the project's, wherever its name and links really lead.

    All else is the volunteer's, or other jobs' (with the keys of their accounts). Raises
    `JobFileInvalid`.
    """
    real, slot = _real(path), _real(where.directory)
    projects = slot.parent.parent / "projects"
    if where.project is not None:
        project = _real(where.project)
    elif real != projects and real.is_relative_to(projects):
        project = projects / real.relative_to(projects).parts[0]
    else:
        project = slot
    if real.is_relative_to(slot) or (real.is_relative_to(project)
                                     and not real.is_relative_to(project / HOME)):
        return path
    raise JobFileInvalid(f"{str(path)!r} is neither in the slot nor in its project",
                         advice="A job of BOINC's has its own files, and those of its project.")


def _real(path: Path) -> Path:
    """Not `Path.resolve`, which raises for links in a circle."""
    return Path(os.path.realpath(path))


def _file(path: Path, where: Surroundings) -> Path:
    if not path.is_relative_to(where.directory):
        return path
    return _linked(str(path.relative_to(where.directory)), where)


def _linked(name: str, where: Surroundings) -> Path:
    try:
        return resolve(name, where)
    except BadPath as error:
        raise JobFileInvalid(error.message, advice=error.advice) from None


def _folder(folder: Folder, where: Surroundings) -> Folder:
    """A folder of the slot: its links are relative to the slot, and the client's files not its."""
    if folder.source == where.project:  # our own home is in there, and as large as a machine
        return replace(folder, without=(*folder.without, HOME))
    if not folder.source.is_relative_to(where.directory):
        return folder
    if folder.source == where.directory:
        folder = replace(folder, without=tuple(dict.fromkeys((*folder.without, *OURS))))
    slot = _real(where.directory)
    project = slot.parent.parent / "projects" if where.project is None else _real(where.project)
    return replace(folder, links=True, base=where.directory, links_to=(slot, project),
                   links_not_to=(slot / HOME, project / HOME))


def limited(job: Job, policy: Policy, init: InitData | None, *, cpus: int | None) -> Job:
    """The job as it may run here; raises `PolicyForbids`.

    ``cpus``: what the command line says. Else the client knows how many it has set aside.
    """
    policy.check(job)
    given = cpus or (max(1, round(init.ncpus)) if init is not None else job.cpus)
    if policy.cpus is not None:
        given = min(given, policy.cpus)
    return replace(job, cpus=min(given, os.cpu_count() or 1))


def allows_emulation(init: InitData | None) -> bool:
    """Whether the volunteer has said so in the project's preferences."""
    return init is not None and _EMULATION.search(init.project_preferences) is not None


def find_image(home: Home, where: Surroundings) -> Image | None:
    """The image that came with the application; None where there is none."""
    described = f"{IMAGE}/{manifest.FILE}"
    if not is_there(described, where):
        return None

    def find(name: str) -> Path:
        return _linked(f"{IMAGE}/{name}", where)

    return ImageStore(home).adopt(find(manifest.FILE), find)


def find_qemu(where: Surroundings) -> Path | None:
    """The archive of a QEMU that came with the application; None where there is none."""
    return _linked(QEMU, where) if is_there(QEMU, where) else None


def missing_outputs(where: Surroundings) -> Iterator[str]:
    """Logical names that lead to a file of the project which is not there.

    At the end of a job these are outputs that the client will miss, if it wants them at all.
    """
    for number, path in enumerate(sorted(where.directory.iterdir())):
        if number >= MOST_LINKS:
            return
        # Not the client's own: who opens and closes the lock file gives the slot away.
        if not path.name.startswith("boinc_") and path.is_file() and not path.is_symlink():
            # What looks like a link may be an output: it says nothing of files that are not ours.
            with contextlib.suppress(BadPath, OSError):
                target = resolve(path.name, where)
                if target != path and not target.exists():
                    yield path.name
