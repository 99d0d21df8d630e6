"""Which VirtualBox is run, and which is not."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from vmjob.errors import ProgramMissing, VirtualBoxKnownBad, VirtualBoxTooOld
from vmjob.machine.virtualbox import programs
from vmjob.machine.virtualbox.programs import Version, judge, parse_version, places

#: Before the unit tests' guard puts another in its place.
find = programs.find

WARNING = """WARNING: The character device /dev/vboxdrv does not exist.
         Please install the virtualbox-dkms package and the appropriate
         headers, most likely linux-headers-amd64.

         You will not be able to start VMs until this problem is fixed.
"""


def version(text: str) -> Version:
    found = parse_version(text)
    assert found
    return found


def install(directory: Path, *names: str, says: str = "7.2.22r175245") -> str:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names or ("VBoxManage", "VBoxHeadless"):
        (directory / name).write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
        (directory / name).chmod(0o755)
    return str(directory)


@pytest.mark.parametrize(("text", "numbers", "shown"), [
    ("7.2.22_Debianr175245\n", (7, 2, 22), "7.2.22_Debianr175245"),
    ("7.0.14r161095", (7, 0, 14), "7.0.14r161095"),
    ("7.0.14_SUSEr161095", (7, 0, 14), "7.0.14_SUSEr161095"),
    ("6.1.50_Ubuntur161033\r\n", (6, 1, 50), "6.1.50_Ubuntur161033"),
    ("7.1.0_BETA1r163242", (7, 1, 0), "7.1.0_BETA1r163242"),
    (WARNING + "7.2.22_Debianr175245\n", (7, 2, 22), "7.2.22_Debianr175245"),
])
def test_a_version_is_found_whatever_stands_before_it(text, numbers, shown):
    assert parse_version(text) == Version(numbers, shown)


@pytest.mark.parametrize("text", ["", WARNING, "Oracle VirtualBox 7.2", "7.2.22", "7.2r1",
                                  "99999999.1.1r1", "error: VBoxManage 7.2.22r175245 failed"])
def test_what_is_no_version_is_none(text):
    assert parse_version(text) is None


def test_a_given_directory_is_the_only_one(tmp_path):
    own = install(tmp_path / "own")
    assert find({programs.VARIABLE: own, "PATH": "/nowhere"}).manage == f"{own}/VBoxManage"
    install(tmp_path / "path")
    with pytest.raises(ProgramMissing, match="not in it"):
        find({programs.VARIABLE: str(tmp_path), "PATH": str(tmp_path / "path")})


def test_the_real_programs_go_before_the_scripts_on_the_path(tmp_path, monkeypatch):
    real, scripts = install(tmp_path / "real"), install(tmp_path / "bin")
    monkeypatch.setitem(programs.DIRECTORIES, platform.system(), (str(tmp_path / "none"), real))
    assert find({"PATH": scripts}).headless == f"{real}/VBoxHeadless"


def test_both_programs_are_of_one_virtualbox(tmp_path, monkeypatch):
    half, whole = install(tmp_path / "half", "VBoxManage"), install(tmp_path / "whole")
    monkeypatch.setitem(programs.DIRECTORIES, platform.system(), (half, whole))
    assert find({"PATH": half}) == programs.Programs(f"{whole}/VBoxManage", f"{whole}/VBoxHeadless")


def test_a_virtualbox_that_this_user_may_not_run_is_told_with_its_group(tmp_path, monkeypatch):
    monkeypatch.setitem(programs.DIRECTORIES, platform.system(), (install(tmp_path / "vb"),))
    (tmp_path / "vb" / "VBoxHeadless").chmod(0o640)
    with pytest.raises(ProgramMissing, match=r"may not run .*VBoxHeadless") as caught:
        find({"PATH": "/nowhere"})
    assert "usermod -aG" in caught.value.advice


def test_without_virtualbox_that_is_said(monkeypatch):
    monkeypatch.setitem(programs.DIRECTORIES, platform.system(), ())
    with pytest.raises(ProgramMissing, match="not installed"):
        find({"PATH": "/nowhere"})


def test_windows_says_where_it_is_installed():
    assert places("Windows", {"VBOX_MSI_INSTALL_PATH": "D:\\VBox\\",
                              "ProgramFiles": "C:\\Program Files"}) == [
        "D:\\VBox\\", "C:\\Program Files\\Oracle\\VirtualBox"]


def test_a_program_that_says_no_version_is_not_used(tmp_path):
    directory = install(tmp_path, says="Segmentation fault")
    with pytest.raises(ProgramMissing, match="Segmentation fault"):
        programs.version(f"{directory}/VBoxManage")


@pytest.mark.parametrize(("text", "kind"), [
    ("6.1.50r1", "too-old"), ("4.3.0r1", "too-old"), ("7.0.0r1", None), ("7.2.22r1", None),
    ("7.2.10r1", "known-bad"), ("7.1.12r1", None), ("8.0.0r1", None)])
def test_what_is_too_old_or_harmful_is_not_used(text, kind):
    judged = judge(version(text), "Linux")
    assert (judged.kind if judged else None) == kind


def test_a_fault_of_one_system_does_not_count_on_another():
    assert judge(version("7.2.10r1"), "Windows") is None


@pytest.mark.parametrize(("text", "concerns"), [
    ("7.1.12r1", {"saved-state", "vdi-overlay"}), ("7.2.16r1", {"vdi-overlay"}),
    ("7.2.18r1", set()), ("7.2.22r1", set())])
def test_what_a_version_is_bad_at_is_known(text, concerns):
    assert {flaw.concerns for flaw in programs.flaws(version(text), "Linux")} == concerns


def test_each_flaw_has_a_reason_and_a_source():
    for flaw in programs._flaws():
        assert flaw.first <= flaw.last
        assert flaw.reason
        assert flaw.source.startswith("https://")
        assert flaw.concerns in ("everything", "saved-state", "vdi-overlay")


def test_an_unusable_version_is_an_error_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    old = install(tmp_path / "old", says="6.1.50r161033")
    with pytest.raises(VirtualBoxTooOld, match=r"6\.1\.50 is older than 7\.0\.0"):
        programs.usable_version(f"{old}/VBoxManage")
    bad = install(tmp_path / "bad", says="7.2.10r1")
    with pytest.raises(VirtualBoxKnownBad, match="freeze"):
        programs.usable_version(f"{bad}/VBoxManage")
    good = install(tmp_path / "good")
    assert programs.usable_version(f"{good}/VBoxManage").short == "7.2.22"
