"""An accelerator is believed as long as nothing speaks against it."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from vmjob.errors import AcceleratorUnusable
from vmjob.home import Home
from vmjob.machine.contract import BootParts, MachineSpec
from vmjob.machine.qemu import accelerators
from vmjob.machine.qemu.accelerators import Proof
from vmjob.shape import doubt

BOOT = BootParts("d", *(Path(f"/{name}") for name in ("kernel", "initrd", "root", "scratch")))
SHAPE = MachineSpec(id="", directory=Path("/"), boot=BOOT, accelerator="kvm")
DIED = {"code": "machine-died", "message": "QEMU was ended by signal 6"}


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch, no_virtual_machines: None) -> list[str]:
    """The probes that were booted; each says that the accelerator works."""
    found: list[str] = []

    def boot(binary: str, accelerator: str, boot: BootParts) -> Proof:
        found.append(accelerator)
        return Proof(accelerator, True, f"probe {len(found)}")

    monkeypatch.setattr(accelerators, "_boot", boot)
    monkeypatch.setattr(accelerators.programs, "find", lambda name: "/bin/sh")
    monkeypatch.setattr(accelerators, "device_identity", lambda path: "device")
    monkeypatch.setattr(accelerators, "candidates", lambda: ["kvm", "tcg"])
    return found


def choose(home: Home, wanted: str = "auto") -> Proof:
    return anyio.run(accelerators.choose, home, wanted, BOOT)


def test_a_proof_is_kept_until_its_ground_changes(home: Home, boots: list[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose(home).accelerator for _ in range(3)] == ["kvm"] * 3
    assert boots == ["kvm"]
    for name, changed in (("device_identity", lambda path: "other"), ("boot_id", lambda: "other")):
        monkeypatch.setattr(accelerators, name, changed)
        before = len(boots)
        choose(home)
        assert len(boots) == before + 1
    monkeypatch.setattr(accelerators.programs, "identity", lambda binary: "upgraded")
    choose(home)
    assert len(boots) == 4


def test_a_start_that_failed_for_a_new_cause_leads_to_one_more_probe(home: Home,
                                                                     boots: list[str]) -> None:
    choose(home)
    for _ in range(3):
        doubt(home, SHAPE, DIED)
        choose(home)
    assert len(boots) == 2
    doubt(home, SHAPE, {**DIED, "message": "another cause"})
    choose(home)
    assert len(boots) == 3


@pytest.mark.parametrize(("why", "lasts"), [
    ("QEMU ended: failed to initialize kvm: Device or resource busy", False),
    ("QEMU ended: cannot set up guest memory: Cannot allocate memory", False),
    ("QEMU ended: failed to initialize kvm: No such device", True),
    ("a Linux kernel did not boot within 10 s", True)])
def test_a_fault_that_passes_proves_nothing_for_long(
        home: Home, boots: list[str], monkeypatch: pytest.MonkeyPatch, why: str,
        lasts: bool) -> None:
    works = accelerators._boot
    monkeypatch.setattr(accelerators, "_boot", lambda *_: Proof("kvm", False, why))
    assert choose(home).accelerator == "tcg"
    monkeypatch.setattr(accelerators, "_boot", works)
    assert choose(home).accelerator == ("tcg" if lasts else "kvm")


@pytest.mark.parametrize("error", [None, {"code": "time-limit", "message": "x"},
                                   {"code": "output-missing", "message": "x"}])
def test_what_is_the_jobs_own_fault_raises_no_doubt(home: Home, boots: list[str],
                                                    error: dict[str, str] | None) -> None:
    choose(home)
    doubt(home, SHAPE, error)
    choose(home)
    assert len(boots) == 1


def test_one_that_was_asked_for_and_does_not_work_is_refused(
        home: Home, boots: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "_boot",
                        lambda binary, name, boot: Proof(name, False, "it hung"))
    with pytest.raises(AcceleratorUnusable, match="it hung"):
        choose(home, "kvm")
    with pytest.raises(AcceleratorUnusable):
        choose(home, "hvf")
    assert choose(home).accelerator == "tcg"
