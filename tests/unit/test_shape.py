"""Which hypervisor and accelerator a machine gets."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from vmjob import shape
from vmjob.cli import hypervisors
from vmjob.errors import AcceleratorUnusable, ProgramMissing, UsageError, VmjobError
from vmjob.home import Home
from vmjob.machine.contract import BootParts
from vmjob.machine.proofs import Proof
from vmjob.machine.virtualbox.driver import VirtualBoxDriver

BOOT = BootParts("d", *(Path(f"/{name}") for name in ("kernel", "initrd", "root", "scratch")))


class Computer:
    """What works on it; None for QEMU: it is not installed."""

    def __init__(self, home: Home, patch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.qemu: set[str] | None = {"tcg"}
        self.virtualbox: set[str] | None = set()
        self.booted: list[str] = []
        patch.setattr(shape.accelerators, "choose", self.choose)
        patch.setattr("vmjob.machine.virtualbox.accelerators.prove", self.prove)
        #: Faults of its VirtualBox's version.
        self.faults: frozenset[str] = frozenset()
        patch.setattr("vmjob.machine.virtualbox.programs.find", lambda: None)
        self.driver_missing: str | None = None
        patch.setattr(shape, "virtualbox_why_not", lambda: self.driver_missing)
        patch.setattr("vmjob.machine.virtualbox.programs.concerns", lambda found: self.faults)

    async def choose(self, home: Home, wanted: str, boot: BootParts,
                     allowed: object = None) -> Proof:
        if self.qemu is None:
            raise ProgramMissing("no QEMU")
        for name in ("kvm", "hvf", "whpx", "tcg"):
            if name in self.qemu and wanted in ("auto", name):
                return Proof(name, True, "it booted")
        raise AcceleratorUnusable("none works")

    async def prove(self, home: Home, accelerator: str) -> Proof:
        self.booted.append(accelerator)
        if self.virtualbox is None:
            raise ProgramMissing("no VirtualBox")
        return Proof(accelerator, accelerator in self.virtualbox, "so it is")

    def gets(self, hypervisor: str = "auto", accel: str = "auto",
             allowed: set[str] | None = None) -> str:
        return anyio.run(shape._choose, self.home, hypervisor, accel, BOOT, allowed).accelerator


@pytest.fixture
def computer(home: Home, monkeypatch: pytest.MonkeyPatch) -> Computer:
    return Computer(home, monkeypatch)


@pytest.mark.parametrize(("qemu", "virtualbox", "expected"), [
    ({"kvm", "tcg"}, {"hm", "interpreter"}, "kvm"), ({"whpx", "tcg"}, {"hm"}, "whpx"),
    ({"tcg"}, {"hm", "interpreter"}, "hm"), ({"tcg"}, {"interpreter"}, "tcg"),
    ({"tcg"}, None, "tcg"), (None, {"hm"}, "hm"), (set(), {"hm"}, "hm")])
def test_the_fastest_that_is_proved_is_taken(computer: Computer, qemu: set[str] | None,
                                             virtualbox: set[str] | None, expected: str) -> None:
    computer.qemu, computer.virtualbox = qemu, virtualbox
    assert computer.gets() == expected
    assert "interpreter" not in computer.booted


def test_a_virtualbox_that_keeps_no_machines_comes_after_emulation(computer: Computer) -> None:
    computer.virtualbox, computer.faults = {"hm"}, frozenset({"vdi-overlay"})
    assert computer.gets() == "tcg"
    assert computer.gets("virtualbox") == "hm"
    computer.qemu = None
    assert computer.gets() == "hm"


def test_virtualbox_is_not_even_loaded_where_its_driver_is_not(computer: Computer) -> None:
    computer.virtualbox, computer.driver_missing = {"hm"}, "there is none"
    assert computer.gets() == "tcg"
    assert computer.booted == []
    computer.qemu = None  # there is nothing else: it has the last word on why
    assert computer.gets() == "hm"


def test_virtualbox_is_not_even_asked_where_qemu_is_as_fast(computer: Computer) -> None:
    computer.qemu = {"kvm"}
    computer.gets()
    assert computer.booted == []


def test_without_any_the_first_hypervisor_says_why(computer: Computer) -> None:
    computer.qemu = computer.virtualbox = None
    with pytest.raises(ProgramMissing, match="QEMU"):
        computer.gets()
    computer.qemu = set()
    with pytest.raises(AcceleratorUnusable):
        computer.gets()


def test_the_interpreter_is_taken_by_its_name_only(computer: Computer) -> None:
    computer.virtualbox = {"interpreter"}
    assert computer.gets(accel="interpreter") == "interpreter"
    assert computer.gets("virtualbox", "interpreter") == "interpreter"
    with pytest.raises(AcceleratorUnusable, match="VirtualBox does not work"):
        computer.gets("virtualbox")


def test_a_hypervisor_by_its_name_is_taken_or_nothing(computer: Computer) -> None:
    computer.qemu, computer.virtualbox = {"kvm", "tcg"}, {"hm"}
    assert computer.gets("virtualbox") == "hm"
    assert computer.gets("qemu") == "kvm"
    computer.qemu = None
    with pytest.raises(VmjobError):
        computer.gets("qemu")


@pytest.mark.parametrize(("hypervisor", "accel"), [
    ("qemu", "hm"), ("qemu", "interpreter"), ("virtualbox", "kvm"), ("virtualbox", "tcg"),
    ("auto", "warp"), ("vmware", "auto"), ("vmware", "kvm")])
def test_an_accelerator_of_another_hypervisor_is_a_mistake(computer: Computer, hypervisor: str,
                                                          accel: str) -> None:
    with pytest.raises(UsageError):
        computer.gets(hypervisor, accel)
    assert computer.booted == []


def test_what_is_not_allowed_is_not_tried(computer: Computer) -> None:
    computer.virtualbox = {"hm"}
    with pytest.raises(AcceleratorUnusable, match="not allowed"):
        computer.gets("virtualbox", allowed={"kvm"})
    assert computer.gets(allowed={"tcg"}) == "tcg"
    assert computer.booted == []


def test_each_accelerator_has_its_driver() -> None:
    for name, accelerators in shape.HYPERVISORS.items():
        assert {shape._driver(each).name for each in accelerators} == {name}
    assert isinstance(shape._driver("hm"), VirtualBoxDriver)


def test_the_command_line_knows_the_same_ones() -> None:
    """It has a copy, because of what an import costs."""
    assert tuple(shape.HYPERVISORS) == hypervisors.HYPERVISORS
    assert shape.ACCELERATORS == hypervisors.ACCELERATORS
