"""The doctor says what `vmjob run` does: a job can run where any hypervisor is taken for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from tests.unit.machine.virtualbox.test_checkup import GOOD
from vmjob import diagnosis, shape
from vmjob.cli.main import cli
from vmjob.errors import ProgramMissing
from vmjob.home import Home
from vmjob.host.checkup import Finding
from vmjob.machine.contract import BootParts
from vmjob.machine.proofs import Proof
from vmjob.machine.qemu import accelerators
from vmjob.machine.virtualbox import checkup

BOOT = BootParts("d", *(Path(f"/{name}") for name in ("kernel", "initrd", "root", "scratch")))


class Computer:
    """One without QEMU. ``works``: VirtualBox's accelerators that do; ``missing``: programs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.works: set[str] = set()
        self.missing = {"qemu-system-x86_64", "qemu-img"}
        self.image = True
        self.facts = GOOD
        patch.setattr(accelerators.programs, "system_binary", lambda: "qemu-system-x86_64")
        patch.setattr(accelerators.programs, "find", self.find)
        patch.setattr(accelerators.programs, "version", lambda binary: "9.0.0")
        patch.setattr(accelerators, "device_identity", lambda path: None)
        patch.setattr(accelerators, "prove", self.prove_qemu)
        patch.setattr("vmjob.machine.virtualbox.accelerators.prove", self.prove)
        patch.setattr("vmjob.machine.virtualbox.programs.find", lambda: None)
        patch.setattr("vmjob.machine.virtualbox.programs.concerns", lambda found: frozenset())
        patch.setattr(shape, "virtualbox_why_not",
                      lambda: None if self.facts.device else "there is no driver")
        patch.setattr(checkup, "look", lambda: self.facts)
        patch.setattr(diagnosis, "_image", self.find_image)
        patch.setattr(BootParts, "of", lambda image: BOOT)

    def find(self, name: str) -> str:
        if name in self.missing:
            raise ProgramMissing(f"{name} is not installed", advice="Install it.")
        return f"/usr/bin/{name}"

    def find_image(self, home: Home, findings: list[Finding]) -> object:
        if not self.image:
            findings.append(Finding("image", "problem", "not built", "Build it."))
        return SimpleNamespace() if self.image else None

    async def prove_qemu(self, home: Home, name: str, boot: BootParts, *,
                         fresh: bool = False) -> Proof:
        return Proof(name, name == "tcg", "so it is")

    async def prove(self, home: Home, accelerator: str) -> Proof:
        return Proof(accelerator, accelerator in self.works, "so it is")


@pytest.fixture
def computer(monkeypatch: pytest.MonkeyPatch, home: Home) -> Computer:
    return Computer(monkeypatch)


def doctor(*options: str) -> Result:
    return CliRunner().invoke(cli, ["doctor", *options])


def states() -> dict[str, str]:
    return {each["what"]: each["state"] for each in json.loads(doctor("--json").stdout)["findings"]}


def test_without_qemu_virtualbox_runs_jobs(computer: Computer) -> None:
    computer.works = {"hm", "interpreter"}
    told = doctor("--fresh")
    assert told.exit_code == 0
    assert "jobs will use: hm" in told.stdout
    assert told.stdout.endswith("A job can run here.\n")
    assert (states()["QEMU"], states()["qemu-img"]) == ("note", "note")


def test_an_interpreter_that_must_be_asked_for_is_told_of(computer: Computer) -> None:
    computer.works = {"interpreter"}
    told = doctor()
    assert told.exit_code == 1
    assert "only with `--hypervisor virtualbox --accel interpreter`" in told.stdout.splitlines()[-1]
    assert states()["QEMU"] == "problem"


@pytest.mark.parametrize("there", [True, False])
def test_with_nothing_that_runs_machines_there_is_no_job(computer: Computer, there: bool) -> None:
    if not there:
        computer.facts = dataclasses.replace(GOOD, version=None, problem="no VirtualBox")
    told = doctor()
    assert told.exit_code == 1
    assert told.stdout.endswith("No job can run here yet.\n")


def test_what_both_hypervisors_need_stops_jobs(computer: Computer) -> None:
    computer.works = {"hm", "interpreter"}
    computer.missing |= {"setpriv"}
    assert doctor().exit_code == 1
    assert (states()["QEMU"], states()["setpriv"]) == ("note", "problem")


def test_without_an_image_virtualbox_is_taken_at_its_word(computer: Computer) -> None:
    computer.image = False
    assert (states()["QEMU"], states()["image"]) == ("note", "problem")
    assert doctor().exit_code == 1


def test_a_job_takes_what_the_doctor_says_where_qemu_emulates(computer: Computer) -> None:
    computer.missing, computer.works = set(), {"hm"}
    assert "jobs will use: hm" in doctor().stdout
    computer.facts = dataclasses.replace(GOOD, device=False)
    assert "jobs will use: tcg" in doctor().stdout
    computer.missing = {"qemu-img"}
    assert doctor().exit_code == 1


def test_emulation_is_not_taken_for_there_without_qemu(
        computer: Computer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it came before a VirtualBox that keeps no machines, and nothing ran."""
    monkeypatch.setattr("vmjob.machine.virtualbox.programs.concerns",
                        lambda found: frozenset({"vdi-overlay"}))
    computer.works = {"hm"}
    assert "jobs will use: hm" in doctor().stdout
    computer.missing = set()
    assert "jobs will use: tcg" in doctor().stdout
