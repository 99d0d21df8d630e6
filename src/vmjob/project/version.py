"""An app version as BOINC's ``update_versions`` takes it: a directory with ``version.xml``.

    apps/APP/VERSION/PLATFORM__PLANCLASS/
        version.xml         which file is what
        FILE, FILE.sig      each file, and its signature where one was made
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmjob.errors import HostError, InputMissing, PackageInvalid
from vmjob.job import markup
from vmjob.job.reading import Level
from vmjob.project import names, signing
from vmjob.project.tags import block, flag, tag, text_of, truth

__all__ = ["API_VERSION", "FILE", "AppVersion", "Source", "VersionFile", "build", "read"]

FILE = "version.xml"
#: Below 6.0 the client uses shared memory of System V, of which vmjob knows nothing; 7.5 is what
#: VM apps declare that are in production.
API_VERSION = "7.5.0"
LEAST_API = (6, 0)
#: Files of one version; the largest of the field has 9.
MAX_FILES = 200
#: From this size on a file is linked instead of copied unless it is executed, bytes.
LINK_FROM = 64 << 20

_API = re.compile(r"(\d{1,4})\.(\d{1,4})(\.\d{1,4})?")


@dataclass(frozen=True)
class Source:
    """A file for an app version: a ``path``, or its ``content``.

    ``stem`` and ``suffix``: parts of its physical name, between which twelve digits of its SHA-256
    stand when ``hashed`` (a physical name must never have another content). ``shared``: nobody
    writes to the file, so it may be linked.
    """

    logical_name: str
    stem: str
    suffix: str = ""
    path: Path | None = None
    content: bytes = b""
    main_program: bool = False
    copy_file: bool = False
    executable: bool = False
    hashed: bool = True
    shared: bool = False


@dataclass(frozen=True)
class VersionFile:
    """A file of an app version; ``path`` is where it is, ``signature`` '' where there is none."""

    physical_name: str
    logical_name: str
    path: Path
    main_program: bool = False
    copy_file: bool = False
    executable: bool = False
    signature: str = ""


@dataclass(frozen=True)
class AppVersion:
    """What a project offers to computers of one platform under one plan class.

    ``version_num`` is BOINC's number (1.05: 105). ``is_wrapper``: the client gives it an ordinary
    priority, nice 10, instead of SCHED_IDLE under which a virtual machine starves.
    """

    app: str
    version_num: int
    platform: str
    plan_class: str
    files: tuple[VersionFile, ...]
    api_version: str = API_VERSION
    is_wrapper: bool = False
    needs_network: bool = False
    file_prefix: str = ""
    directory: Path | None = None

    @property
    def main_program(self) -> VersionFile:
        return next(each for each in self.files if each.main_program)


def build(root: Path, sources: Sequence[Source], *, app: str, version: str, platform: str,
          plan_class: str, needs_network: bool = False, file_prefix: str = "",
          key: signing.PrivateKey | None = None) -> AppVersion:
    """Make the directory below ``root``/``app``, with signatures where there is a ``key``.

    It is made beside and renamed; one that is there is never changed, since clients keep what
    they have of a version. Raises `PackageInvalid`, `InputMissing`, `HostError`.
    """
    names.version_number(version)
    place = names.check_platform(platform)
    if names.check_plan_class(plan_class):
        place += f"__{plan_class}"
    target = root / names.check_app(app) / version / place
    if os.path.lexists(target):
        raise PackageInvalid(f"{target} is there already",
                             advice="Give the version another number: clients that have this one "
                                    "would never fetch it again.")
    beside = target.with_name(f".new-{os.getpid()}-{place}")
    try:
        beside.mkdir(parents=True)
        files = [_placed(source, beside, key) for source in sources]
        made = AppVersion(app, names.version_number(version), platform, plan_class, tuple(files),
                          is_wrapper=True, needs_network=needs_network, file_prefix=file_prefix,
                          directory=target)
        _check(made, str(target))
        (beside / FILE).write_text(text(made), encoding="utf-8")
        beside.rename(target)
    except OSError as error:
        raise HostError(f"cannot write {error.filename or target}: {error.strerror}",
                        advice="Give --output a directory with room that you may write to."
                        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return read(target)


def text(version: AppVersion) -> str:
    """``version.xml``; never with ``dont_throttle``: the volunteer's limit of CPU time holds."""
    parts = [block("file", [tag("physical_name", each.physical_name),
                            tag("logical_name", each.logical_name) if each.logical_name else "",
                            flag("main_program", each.main_program),
                            flag("copy_file", each.copy_file)], "    ")
             for each in version.files]
    parts += [flag("is_wrapper", version.is_wrapper),
              flag("needs_network", version.needs_network),
              tag("file_prefix", version.file_prefix) if version.file_prefix else "",
              tag("api_version", version.api_version)]
    return block("version", parts, "    ")


def read(directory: Path) -> AppVersion:
    """An app version from its directory, by the rules of ``update_versions``.

    Files that version.xml does not name belong to it, too; an only file is the main program. It may
    be one for VirtualBox: what clients do with its names is then what its makers want.
    Raises `PackageInvalid`.
    """
    directory = directory.absolute()
    platform, _, plan_class = directory.name.partition("__")
    app, version = directory.parent.parent.name, directory.parent.name
    found = _regular_files(directory)
    given = _described(directory, FILE in found)
    described = {text_of(each, "physical_name"): each
                 for each in (given.children if given else ()) if each.name == "file"}
    if missing := described.keys() - found.keys():
        raise PackageInvalid(f"{directory}: {min(missing)[:80]!r} of {FILE} is not there")
    physical = [name for name in found if name != FILE and not name.endswith(".sig")]
    files = [_file(name, found[name], described.get(name), found.get(f"{name}.sig"),
                   only=len(physical) == 1)
             for name in [*described, *(each for each in physical if each not in described)]]
    made = AppVersion(
        names.check_app(app), names.version_number(version), names.check_platform(platform),
        names.check_plan_class(plan_class, ours=False), tuple(files),
        (text_of(given, "api_version") if given else "") or API_VERSION,
        is_wrapper=given is not None and truth(given, "is_wrapper"),
        needs_network=given is not None and truth(given, "needs_network"),
        file_prefix=text_of(given, "file_prefix") if given else "", directory=directory)
    _check(made, str(directory))
    return made


# -- inside ------------------------------------------------------------------------------------


def _placed(source: Source, directory: Path, key: signing.PrivateKey | None) -> VersionFile:
    stem = f"{source.stem}_{_sha256(source)[:12]}" if source.hashed else source.stem
    physical = names.check_physical(f"{stem}{source.suffix}")
    target = directory / physical
    if target.exists():
        raise PackageInvalid(f"two files would be called {physical!r}",
                             advice="Give each file once.")
    executable = source.executable or source.main_program
    if source.path is None:
        target.write_bytes(source.content)
    else:
        # What is executed is always copied: a link has the mode of the file that it is one of.
        _copy(source.path, target, linked=not executable and (
            source.shared or source.path.stat().st_size >= LINK_FROM))
    if target.stat().st_nlink == 1:
        target.chmod(0o755 if executable else 0o644)
    signature = ""
    if key is not None:
        signature = key.sign(signing.md5_of(target))
        target.with_name(f"{physical}.sig").write_text(signature, encoding="ascii")
    if source.logical_name:
        names.check_logical(source.logical_name)
    return VersionFile(physical, source.logical_name, target, source.main_program,
                       source.copy_file, executable, signature)


def _sha256(source: Source) -> str:
    if source.path is None:
        return hashlib.sha256(source.content).hexdigest()
    try:
        with source.path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputMissing(f"{str(source.path)!r} is not a file", advice="Check the path.")
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputMissing(f"cannot read {str(source.path)!r}: {error.strerror}",
                           advice="Check the path.") from None


def _copy(source: Path, target: Path, *, linked: bool) -> None:
    """A file under one more name, or a copy of it."""
    source = source.resolve()
    if linked:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copyfile(source, target)


def _regular_files(directory: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    try:
        for entry in sorted(os.scandir(directory), key=lambda each: each.name):
            if entry.name.startswith("."):  # update_versions does not see them either
                continue
            if not entry.is_file(follow_symlinks=False):
                raise PackageInvalid(f"{entry.path} is not a regular file")
            found[entry.name] = Path(entry.path)
            if len(found) > 2 * MAX_FILES + 1:
                raise PackageInvalid(f"{directory} has more than {MAX_FILES} files")
    except OSError as error:
        raise PackageInvalid(f"cannot read {directory}: {error.strerror}",
                             advice="Give a directory APP/VERSION/PLATFORM__PLANCLASS.") from None
    return found


def _described(directory: Path, there: bool) -> markup.Element | None:
    if not there:
        return None
    path = directory / FILE
    with path.open("rb") as file:
        document = markup.parse(file.read(markup.MAX_BYTES + 1), frozenset({"file"}))
    for each in document.findings:
        if each.level is Level.ERROR:
            raise PackageInvalid(f"{path}:{each.line}: {each.what}")
    roots = [each for each in document.roots if each.name == "version"]
    if len(roots) != 1:
        raise PackageInvalid(f"{path} is not one <version>")
    return roots[0]


def _file(name: str, path: Path, described: markup.Element | None, signature: Path | None, *,
          only: bool) -> VersionFile:
    names.check_physical(name, ours=False)
    logical = text_of(described, "logical_name") if described else ""
    if logical:
        names.check_logical(logical)
    main = only or (described is not None and truth(described, "main_program"))
    return VersionFile(name, logical, path, main,
                       described is not None and truth(described, "copy_file"),
                       main or bool(path.stat().st_mode & stat.S_IXUSR),
                       signing.read_signature(signature) if signature else "")


def _check(version: AppVersion, where: str) -> None:
    if len(version.files) > MAX_FILES:
        raise PackageInvalid(f"{where}: more than {MAX_FILES} files")
    mains = [each.physical_name for each in version.files if each.main_program]
    if len(mains) != 1:
        raise PackageInvalid(f"{where}: there must be one main program, not {len(mains)}")
    if version.file_prefix:
        names.check_logical(version.file_prefix)
    match = _API.fullmatch(version.api_version)
    if match is None or (int(match[1]), int(match[2])) < LEAST_API:
        raise PackageInvalid(f"{where}: api_version {version.api_version[:20]!r} is below 6.0; "
                             "the client would not talk to the app",
                             advice=f"Write <api_version>{API_VERSION}</api_version>.")
    logical = [each.logical_name for each in version.files if each.logical_name]
    for each in logical:
        if logical.count(each) > 1:
            raise PackageInvalid(f"{where}: two files are called {each!r}")
