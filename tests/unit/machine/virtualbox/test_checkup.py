"""The doctor says what keeps VirtualBox from running machines, and what to do."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

import pytest

from tests.unit.machine.virtualbox.test_programs import install
from vmjob.diagnosis import diagnose
from vmjob.errors import ProgramMissing
from vmjob.host.checkup import Finding
from vmjob.machine.virtualbox import checkup, programs
from vmjob.machine.virtualbox.checkup import Facts, findings, look
from vmjob.machine.virtualbox.programs import Version

#: Before the unit tests' guard puts another in its place.
find = programs.find

GOOD = Facts("Linux", where="/usr/lib/virtualbox", version=Version((7, 2, 22), "7.2.22r1"),
             device=True, privileged=True, module="7.2.22 r175245 (0x00340001)", hardware="AMD-V")


def told(**changes: object) -> Finding:
    return findings(dataclasses.replace(GOOD, **changes))[-1]


def version(text: str) -> Version:
    return Version(tuple(map(int, text.split("."))), text + "r1")


def test_a_computer_that_has_all_is_told_so():
    assert [(each.state, each.found) for each in findings(GOOD)] == [
        ("ok", "7.2.22r1 in /usr/lib/virtualbox"),
        ("ok", "can start: kernel module 7.2.22, AMD-V")]


@pytest.mark.parametrize(("changes", "found", "advice"), [
    ({"module": None}, "vboxdrv is not loaded", "modprobe vboxdrv"),
    ({"device": False}, "there is no /dev/vboxdrv", "modprobe vboxdrv"),
    ({"module": "7.0.14 r161095"}, "module is of 7.0.14, VirtualBox of 7.2.22", "again"),
    ({"privileged": False}, "does not get the rights", "NoNewPrivileges"),
    ({"temporary": False}, "/tmp cannot be written", "PrivateTmp"),
    ({"hardware": ""}, "neither VT-x nor AMD-V", "BIOS"),
    ({"kvm_machines": 2}, "KVM uses AMD-V", "End the machines"),
    ({"kvm_takes_all": True, "version": version("7.2.6"), "module": "7.2.6"},
     "KVM keeps AMD-V", "enable_virt_at_load=0"),
])
def test_the_first_thing_that_stops_a_machine_is_told_with_what_to_do(changes, found, advice):
    said = told(**changes)
    assert said.state == "note"
    assert found in said.found
    assert advice in said.advice


def test_a_newer_virtualbox_shares_with_kvm():
    assert told(kvm_takes_all=True).state == "ok"


def test_an_unknown_version_of_the_module_is_no_mismatch():
    assert told(module="").state == "ok"


@pytest.mark.parametrize(("number", "words"), [
    ("6.1.50", "older than 7.0.0"), ("7.2.10", "freeze this computer")])
def test_a_version_that_is_not_used_is_told_with_its_reason(number, words):
    (finding,) = findings(dataclasses.replace(GOOD, version=version(number)))
    assert finding.state == "note"
    assert "is not used" in finding.found
    assert words in finding.found
    assert finding.advice


def test_what_a_version_is_bad_at_is_told():
    notes = [each for each in findings(dataclasses.replace(
        GOOD, version=version("7.1.12"), module="7.1.12")) if each.state == "note"]
    assert {note.found.split(":")[0] for note in notes} == {"saved-state", "vdi-overlay"}
    assert all("https://" in note.found and note.advice for note in notes)


def test_a_computer_without_virtualbox_is_fine():
    (finding,) = findings(Facts("Linux", "VirtualBox is not installed", "Install it."))
    assert (finding.state, finding.found) == ("note", "VirtualBox is not installed")


def test_of_other_systems_only_the_version_is_known():
    assert len(findings(Facts("Windows", where="C:\\", version=version("7.2.22")))) == 1


# -- looking -----------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another computer's /, with a VirtualBox in it."""
    monkeypatch.setattr(programs, "find", find)
    monkeypatch.setenv(programs.VARIABLE, install(tmp_path / "vb"))
    monkeypatch.setattr(platform, "release", lambda: "6.12.3-amd64")
    files = {"proc/cpuinfo": "processor : 0\nflags\t\t: fpu vme svm\n\n", "dev/vboxdrv": "",
             "sys/module/vboxdrv/version": "7.2.22 r175245 (0x00340001)\n",
             "sys/module/kvm_amd/refcnt": "1\n", "sys/module/kvm/parameters/enable_virt_at_load":
             "Y\n", "proc/self/status": "Name:\tx\nNoNewPrivs:\t0\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_facts_are_those_of_the_computer(root):
    facts = look(root)
    assert facts.module == "7.2.22 r175245 (0x00340001)"
    assert (facts.hardware, facts.kvm_machines, facts.kvm_takes_all) == ("AMD-V", 1, True)
    assert facts.device
    assert facts.version == programs.parse_version("7.2.22r175245")


def test_kvm_leaves_the_hardware_to_others_when_it_is_told_to(root, monkeypatch):
    (root / "sys/module/kvm/parameters/enable_virt_at_load").write_text("N\n")
    assert not look(root).kvm_takes_all
    (root / "sys/module/kvm/parameters/enable_virt_at_load").write_text("Y\n")
    monkeypatch.setattr(platform, "release", lambda: "6.1.0-30-amd64")
    assert not look(root).kvm_takes_all


def test_an_empty_computer_has_none_of_it(root, tmp_path):
    facts = look(tmp_path / "nothing")
    assert (facts.module, facts.device, facts.hardware, facts.kvm_machines) == (None, False, "", 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a program away")
def test_a_user_needs_a_program_with_roots_rights_and_leave_to_use_them(root, monkeypatch):
    headless = root / "vb" / "VBoxHeadless"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not look(root).privileged
    headless.chmod(0o4755)
    assert look(root).privileged
    (root / "proc/self/status").write_text("NoNewPrivs:\t1\n")
    assert not look(root).privileged


def test_no_virtualbox_is_a_fact_too(root, monkeypatch):
    def missing() -> None:
        raise ProgramMissing("VirtualBox is not installed", advice="Install it.")

    monkeypatch.setattr(programs, "find", missing)
    assert look(root).problem == "VirtualBox is not installed"


def test_the_doctor_speaks_of_virtualbox_and_never_as_of_a_problem(root, home, monkeypatch):
    monkeypatch.setattr(checkup, "look", lambda: dataclasses.replace(GOOD, module=None))
    monkeypatch.setattr("vmjob.diagnosis._qemu", lambda: Finding("QEMU", "ok", ""))
    monkeypatch.setattr("vmjob.diagnosis._program", lambda name: Finding(name, "ok", ""))
    found = [each for each in diagnose(home) if "VirtualBox" in each.what]
    assert len(found) == 2
    assert all(each.state in ("ok", "note") for each in found)
