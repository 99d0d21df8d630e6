"""What vmjob puts into an app version: the wrapper, the job file, the image, what else it needs.

The wrapper finds all of it in its slot by logical names:

    vbox_job.xml, job.xml or vmjob.toml     the job
    vmjob_image/FILE                        the parts of the image, and its manifest.json
    vmjob_qemu.tar.gz                       QEMU, where the version brings it
    anything else                           as the job file calls it
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmjob.errors import InputMissing, JobFileInvalid, PackageInvalid, UsageError
from vmjob.image import manifest
from vmjob.image.store import Image
from vmjob.job.languages import read_bytes, read_file
from vmjob.job.model import Job, Network
from vmjob.job.reading import Finding, Level, Reading, Surroundings
from vmjob.project import names, signing, version
from vmjob.project.version import AppVersion, Source

__all__ = ["IMAGE_FOLDER", "PLAN_CLASS", "PLATFORM", "QEMU_BUNDLE", "Package", "check_job",
           "package"]

PLATFORM = "x86_64-pc-linux-gnu"
PLAN_CLASS = "vmjob"
IMAGE_FOLDER = "vmjob_image"
QEMU_BUNDLE = "vmjob_qemu.tar.gz"
#: The job file's logical name, by the language it is written in.
_JOB_NAMES = {"vbox_job": "vbox_job.xml", "wrapper": "job.xml", "vmwrapper": "job.xml",
              "toml": "vmjob.toml"}


@dataclass(frozen=True)
class Package:
    """A new app version, the job in it, and what is to be said about it."""

    version: AppVersion
    job: Job
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]


def package(output: Path, *, app: str, number: str, job: Path, image: Image | None,
            platform: str = PLATFORM, plan_class: str = PLAN_CLASS, wrapper: Path | None = None,
            qemu: Path | None = None, files: Mapping[str, Path] | None = None,
            copied: Collection[str] = (), inputs: Collection[str] = (), file_prefix: str = "",
            key: signing.PrivateKey | None = None) -> Package:
    """Make ``output``/APP/NUMBER/PLATFORM__PLANCLASS.

    ``number``: the version, as ``1.00``. ``files``: logical name -> file; those in ``copied`` are
    copied into each slot, where the others are links. ``inputs``: logical names that workunits
    bring, so the linter takes them as given; they and the outputs are below ``file_prefix`` of the
    slot, if there is one. Without a ``wrapper``, the main program is a script
    that starts this very Python. Raises `JobFileInvalid`, `PackageInvalid`, `InputMissing`.
    """
    files = dict(files or {})
    if unknown := set(copied) - files.keys():
        raise PackageInvalid(f"{min(unknown)!r} is to be copied, but is none of the files",
                             advice="Give it with --file LOGICAL=PATH, too.")
    if file_prefix:
        names.check_logical(file_prefix)
        inputs = [f"{file_prefix}/{each}" for each in inputs]
    reading = check_job(job, {**files, **dict.fromkeys(inputs)})
    assert reading.job is not None
    names.check_app(app)
    own = f"{app}_{number}"
    warnings: list[str] = []
    sources = [_wrapper(own, wrapper, warnings),
               Source(_JOB_NAMES[reading.language], own, f"_{_JOB_NAMES[reading.language]}", job)]
    if image is not None:
        sources += _image(image)
    elif reading.job.hardware.disk is None and reading.job.hardware.iso is None:
        warnings.append("no image is in the package and the job has no disk of its own: "
                        "volunteers' computers would have to have one")
    if qemu is not None:
        sources.append(Source(QEMU_BUNDLE, f"{own}_qemu", ".tar.gz", qemu))
    for logical, path in files.items():
        names.check_logical(logical)
        stem, dot, suffix = logical.replace("/", "_").partition(".")
        sources.append(Source(logical, f"{own}_{stem}", f"{dot}{suffix}", path,
                              copy_file=logical in copied))
    taken = [source.logical_name for source in sources]
    for each in inputs:
        if names.check_logical(each) in taken:
            raise PackageInvalid(f"{each!r} is a file of the app version and an input as well",
                                 advice="Give it once.")
    if key is None:
        warnings.append("nothing is signed: a project's clients take signed files only (--key)")
    made = version.build(output, sources, app=app, version=number, platform=platform,
                         plan_class=plan_class, key=key, file_prefix=file_prefix,
                         needs_network=reading.job.network is not Network.NONE)
    return Package(made, reading.job, reading.findings, tuple(warnings))


def _wrapper(own: str, wrapper: Path | None, warnings: list[str]) -> Source:
    if wrapper is not None:
        return Source("", f"{own}_wrapper", wrapper.suffix, wrapper, main_program=True)
    warnings.append("the main program is a script that starts the Python of this computer; it is "
                    "for the development server on this computer only (--wrapper FILE)")
    # The client's LD_LIBRARY_PATH is for apps that bring libraries, and would mislead Python. -P: a
    # job can write to its slot, and nothing of a job may ever be imported here.
    script = ("#!/bin/sh\nunset LD_LIBRARY_PATH\n"
              f'exec {shlex.quote(sys.executable)} -P -m vmjob wrapper "$@"\n')
    return Source("", f"{own}_wrapper", ".sh", content=script.encode(), main_program=True)


def _image(image: Image) -> list[Source]:
    """The parts carry the digest of the image, so all versions that use it share them."""
    digest = image.digest[:12]
    parts = [Source(f"{IMAGE_FOLDER}/{part.file}", f"{image.name}_{digest}_{part.file}",
                    path=image.directory / part.file, hashed=False, shared=True)
             for part in image.manifest.parts.values()]
    # The manifest holds the time of the build: equal parts may come with another manifest.
    path = image.directory / manifest.FILE
    mark = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    name = f"{image.name}_{mark}_{manifest.FILE}"
    return [*parts, Source(f"{IMAGE_FOLDER}/{manifest.FILE}", name, path=path, hashed=False)]


def check_job(job: Path, given: Mapping[str, Path | None]) -> Reading:
    """Read the job file as it will be read in a slot, with the files that will be there.

    ``given``: logical name -> file; None stands for one that comes with each workunit.
    """
    read_file(job)  # raises where there is no file to read
    with tempfile.TemporaryDirectory(prefix="vmjob-package-") as scratch:
        slot = Path(scratch).resolve()
        for logical, path in given.items():
            place = slot / names.check_logical(logical)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path is None:
                place.touch()
            elif not path.is_file():
                raise InputMissing(f"there is no file {str(path)!r}", advice="Check the path.")
            else:
                place.symlink_to(path.resolve())
        is_toml = job.suffix.lower() == ".toml"
        reading = read_bytes(job.read_bytes(), Surroundings(slot, project=slot), is_toml=is_toml)
        wrong = [f"{job}:{each.line}: {each.what}" for each in reading.findings
                 if each.level is Level.ERROR]
        if reading.job is not None:
            try:
                reading.job.check()
            except UsageError as error:
                wrong.append(f"{job}: {error.message}".replace(f"{slot}/", ""))
    if wrong:
        raise JobFileInvalid(wrong[0], advice="`vmjob job check` names all that is odd; --file and "
                                              "--input say which files will be there.")
    return reading
