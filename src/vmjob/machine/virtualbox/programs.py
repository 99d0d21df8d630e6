"""Finding VirtualBox's programs, knowing their version, and what is wrong with that version.

Places on Linux were tried; those for macOS, FreeBSD and Windows come from their packages and were
never run.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from vmjob.errors import ProgramMissing, VirtualBoxKnownBad, VirtualBoxTooOld
from vmjob.host.standstill import run_tool

__all__ = ["VARIABLE", "Flaw", "Judgement", "Programs", "Version", "concerns", "find", "flaws",
           "judge", "parse_version", "places", "usable_version", "version"]

#: A directory with VirtualBox's programs, before any other place.
VARIABLE = "VMJOB_VIRTUALBOX"
#: Seconds for VBoxManage to say its version; that starts no service.
DEADLINE = 10.0

#: Directories that VirtualBox's own packages and those of distributions install to. The programs
#: there are the real ones; those on PATH may be shell scripts that print warnings before.
DIRECTORIES = {
    "Linux": ("/usr/lib/virtualbox", "/usr/lib64/virtualbox", "/opt/VirtualBox"),
    "Darwin": ("/Applications/VirtualBox.app/Contents/MacOS",),
    "FreeBSD": ("/usr/local/lib/virtualbox",),
}

Concern = Literal["everything", "saved-state", "vdi-overlay"]


@dataclass(frozen=True)
class Programs:
    """The two programs that the driver runs, of one VirtualBox."""

    manage: str
    headless: str


@dataclass(frozen=True, order=True)
class Version:
    """``numbers``: (7, 2, 22); ``text``: all of it, as ``7.2.22_Debianr175245``.

    A saved machine is loaded safely only by the very same ``text``.
    """

    numbers: tuple[int, int, int]
    text: str

    @property
    def short(self) -> str:
        return ".".join(map(str, self.numbers))


@dataclass(frozen=True)
class Flaw:
    """What is known to be wrong with a range of versions; ``source`` says where to read it."""

    first: tuple[int, int, int]
    last: tuple[int, int, int]
    systems: tuple[str, ...]
    concerns: Concern
    reason: str
    source: str


@dataclass(frozen=True)
class Judgement:
    """Why a version is not used: ``kind`` is ``too-old`` or ``known-bad``."""

    kind: Literal["too-old", "known-bad"]
    reason: str
    source: str = ""


# -- where -----------------------------------------------------------------------------------


def places(system: str, environment: Mapping[str, str]) -> list[str]:
    """Directories to look in, the best first, without those of ``PATH``.

    ``system`` as `platform.system` has it. ``VMJOB_VIRTUALBOX``, when it is set, is the only one:
    the two programs are never of different versions.
    """
    if given := environment.get(VARIABLE):
        return [given]
    if system == "Windows":
        names = ("VBOX_MSI_INSTALL_PATH", "VBOX_INSTALL_PATH")
        found = [environment[name] for name in names if environment.get(name)]
        if programs := environment.get("ProgramFiles"):
            found.append(programs.rstrip("\\") + "\\Oracle\\VirtualBox")
        return found
    return list(DIRECTORIES.get(system, ()))


def find(environment: Mapping[str, str] | None = None) -> Programs:
    """The programs of one VirtualBox; raises `ProgramMissing`."""
    environment = os.environ if environment is None else environment
    system = platform.system()
    end = ".exe" if system == "Windows" else ""
    given = environment.get(VARIABLE)
    for place in places(system, environment):
        pair = [Path(place).absolute() / (name + end) for name in ("VBoxManage", "VBoxHeadless")]
        if all(os.access(path, os.X_OK) for path in pair):
            return Programs(*map(str, pair))
        if all(path.exists() for path in pair):
            forbidden = next(path for path in pair if not os.access(path, os.X_OK))
            raise ProgramMissing(f"this user may not run {forbidden}",
                                 advice="Add it to the group that may, and restart what started "
                                        f"vmjob: usermod -aG {_group(forbidden)} USER.")
    if given:
        raise ProgramMissing(f"{VARIABLE} is {given}; VBoxManage and VBoxHeadless are not in it",
                             advice=f"Unset {VARIABLE}, or set it to the directory of both.")
    path = environment.get("PATH")
    manage = shutil.which("VBoxManage", path=path)
    headless = shutil.which("VBoxHeadless", path=path)
    if manage and headless:
        return Programs(manage, headless)
    raise ProgramMissing("VirtualBox is not installed (there is no VBoxManage and VBoxHeadless)",
                         advice="Install VirtualBox 7.0 or newer, or use QEMU.",
                         program="VBoxManage")


def _group(path: Path) -> str:
    try:
        return path.group()
    except (KeyError, NotImplementedError):
        return "vboxusers"


# -- which -----------------------------------------------------------------------------------


def parse_version(text: str) -> Version | None:
    """What ``VBoxManage --version`` printed; None when there is no version in it.

    It is the last line of that form: wrappers print warnings before it, on stdout too.
    """
    found = None
    for line in text.splitlines():
        match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?:_?[\w.+~-]*)?r\d+", line.strip())
        if match:
            first, second, third = map(int, match.groups())
            found = Version((first, second, third), line.strip())
    return found


@functools.cache
def version(manage: str) -> Version:
    """The version of a VBoxManage; raises `ProgramMissing` when it does not say one."""
    try:
        done = run_tool([manage, "--version"], DEADLINE, text=True, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramMissing(f"{manage} does not run: {error}",
                             advice="Install VirtualBox again.") from error
    found = parse_version(done.stdout)
    if found is None:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["nothing"]
        raise ProgramMissing(f"{manage} does not say its version, but {last[0][:200]}",
                             advice="Install VirtualBox again.")
    return found


# -- whether it is any good ------------------------------------------------------------------


def judge(found: Version, system: str | None = None) -> Judgement | None:
    """Why this version is not used on ``system`` (this computer's); None: it is."""
    oldest = _oldest()
    if found.numbers < oldest:
        return Judgement("too-old", f"VirtualBox {found.short} is older than "
                                    f"{'.'.join(map(str, oldest))}")
    for flaw in flaws(found, system):
        if flaw.concerns == "everything":
            return Judgement("known-bad", f"VirtualBox {found.short}: {flaw.reason}", flaw.source)
    return None


def flaws(found: Version, system: str | None = None) -> list[Flaw]:
    """What is known to be wrong with this version, on ``system`` (this computer's)."""
    system = system or platform.system()
    return [flaw for flaw in _flaws()
            if flaw.first <= found.numbers <= flaw.last
            and (not flaw.systems or system in flaw.systems)]


def concerns(programs: Programs) -> frozenset[str]:
    """What the version of these programs is known to be bad at; raises `ProgramMissing`."""
    return frozenset(flaw.concerns for flaw in flaws(version(programs.manage)))


def usable_version(manage: str) -> Version:
    """The version, if it may be used.

    Raises `ProgramMissing`, `VirtualBoxTooOld`, `VirtualBoxKnownBad`.
    """
    found = version(manage)
    judged = judge(found)
    if judged is None:
        return found
    error = VirtualBoxTooOld if judged.kind == "too-old" else VirtualBoxKnownBad
    raise error(judged.reason, found=found.text, source=judged.source)


def _numbers(text: str) -> tuple[int, int, int]:
    first, second, third = map(int, text.split("."))
    return first, second, third


@functools.cache
def _data() -> dict[str, object]:
    return tomllib.loads(resources.files(__package__).joinpath("versions.toml")
                         .read_text(encoding="utf-8"))


def _oldest() -> tuple[int, int, int]:
    return _numbers(str(_data()["oldest"]))


@functools.cache
def _flaws() -> tuple[Flaw, ...]:
    entries = _data()["bad"]
    assert isinstance(entries, list)
    return tuple(Flaw(_numbers(each["first"]), _numbers(each["last"]),
                      tuple(each.get("systems", ())), each["concerns"], each["reason"],
                      each["source"]) for each in entries)
