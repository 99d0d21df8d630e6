"""Which QEMU is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmjob.errors import ProgramMissing
from vmjob.machine.qemu import programs

#: Before the unit tests' guard puts another in its place.
find = programs.find


def program(directory: Path, name: str) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A computer on which QEMU is installed."""
    for name in ("qemu-system-x86_64", "qemu-img", "setpriv"):
        program(tmp_path / "usr", name)
    monkeypatch.setenv("PATH", str(tmp_path / "usr"))
    monkeypatch.delenv(programs.VARIABLE, raising=False)
    return tmp_path / "usr"


def test_qemu_is_the_installed_one(installed: Path) -> None:
    assert find("qemu-img") == str(installed / "qemu-img")


def test_a_given_qemu_goes_before_the_installed_one(
        installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = program(tmp_path / "own" / "bin", "qemu-system-x86_64")
    monkeypatch.setenv(programs.VARIABLE, str(tmp_path / "own"))
    assert find("qemu-system-x86_64") == own
    assert find("setpriv") == str(installed / "setpriv")


def test_a_given_path_may_be_relative_and_stays_right_after_a_change_of_directory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = program(tmp_path / "own" / "bin", "qemu-img")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(programs.VARIABLE, "own")
    assert find("qemu-img") == own


@pytest.mark.usefixtures("installed")
def test_programs_of_two_qemus_are_not_mixed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "own" / "bin", "qemu-system-x86_64")
    monkeypatch.setenv(programs.VARIABLE, str(tmp_path / "own"))
    with pytest.raises(ProgramMissing, match="VMJOB_QEMU"):
        find("qemu-img")


@pytest.mark.usefixtures("installed")
def test_two_qemus_of_the_same_version_are_not_the_same(tmp_path: Path) -> None:
    """What is frozen by one is not given to the other."""
    one, other = (program(tmp_path / name, "qemu-system-x86_64") for name in ("a", "b"))
    assert programs.identity(one) != programs.identity(other)
