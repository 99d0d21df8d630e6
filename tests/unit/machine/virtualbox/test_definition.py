"""What VBoxManage is told a machine is: nothing between guest and host that was not asked for."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.guest.agent import system
from vmjob.machine.contract import Attached, ConsoleAddress, Foreign, MachineSpec
from vmjob.machine.virtualbox import definition, display
from vmjob.machine.virtualbox.definition import Medium

PLAIN = MachineSpec(id="m", directory=Path("/m"), boot=None, accelerator="interpreter")
SPECS = st.builds(
    replace, st.just(PLAIN), memory_mb=st.integers(32, 65536), cpus=st.integers(1, 64),
    network=st.sampled_from(("none", "nat")), accelerator=st.sampled_from(("hm", "interpreter")),
    display=st.booleans(),
    foreign=st.sampled_from((None, Foreign(Path("/d")), Foreign(Path("/d"), Path("/i"),
                                                                iso_first=True))))


def options(words: list[str]) -> dict[str, str]:
    return {name: words[at + 1] for at, name in enumerate(words) if name.startswith("--")}


@given(SPECS)
def test_no_machine_shares_anything_with_the_host(spec: MachineSpec) -> None:
    found = options(definition.configure(spec))
    for name in ("--audio-enabled", "--usb-ohci", "--usb-ehci", "--usb-xhci"):
        assert found[name] == "off", name
    for name in ("--clipboard-mode", "--drag-and-drop"):
        assert found[name] == "disabled", name
    assert (found["--memory"], found["--cpus"]) == (str(spec.memory_mb), str(spec.cpus))
    # What is taken by itself is not said: versions differ in the word.
    assert found.get("--vm-execution-engine", "hm") == spec.accelerator
    assert not [name for name in found if "vrde" in name or "sharedfolder" in name]


@given(SPECS)
def test_a_network_is_there_only_when_it_is_asked_for(spec: MachineSpec) -> None:
    found = options(definition.configure(spec))
    assert found["--nic1"] == spec.network
    if spec.network == "nat":
        assert found["--nat-localhostreachable1"] == "off"
    assert not {name for name in found if name.startswith("--nic") and name[-1] in "2345678"}


def test_there_is_a_place_for_each_disk_besides() -> None:
    def places(spec: MachineSpec) -> int:
        return int(options(definition.controllers(spec)[1])["--portcount"])

    disk = Path("/d")
    # What a machine was saved with, it is continued with.
    assert places(PLAIN) == places(replace(PLAIN, attached=Attached(disk))) == 5
    for attached in (Attached(disk, disk), Attached(disk, cache_disk=disk)):
        assert places(replace(PLAIN, attached=attached)) > max(definition.ATTACHED_PLACES.values())
    used = [definition.ROOT_PLACE, definition.SCRATCH_PLACE, definition.EXCHANGE_PLACE,
            *definition.ATTACHED_PLACES.values()]
    assert len(set(used)) == len(used)


def test_the_guest_knows_the_places() -> None:
    known = {(part, kind): int(place.split(":")[2])
             for part, kinds in system.PLACES.items() for place, kind in kinds.items()}
    assert known == definition.ATTACHED_PLACES


def test_a_screen_is_shown_on_loopback_only_with_a_password() -> None:
    found = options(display.words(display.chosen()))
    assert found["--vrde-address"] == "127.0.0.1"
    assert len(found["--vrde-property"].removeprefix("VNCPassword=")) == 8
    assert found["--vrde-extpack"] == "VNC"
    given = options(display.words(ConsoleAddress("127.0.0.1", 5999, "secretly")))
    assert (given["--vrde-port"], given["--vrde-property"]) == ("5999", "VNCPassword=secretly")


def test_no_two_screens_have_the_same_password() -> None:
    assert len({display.chosen().password for _ in range(20)}) == 20


@pytest.mark.parametrize(("foreign", "first"), [
    (None, "dvd"), (Foreign(Path("/d")), "disk"), (Foreign(iso=Path("/i"), iso_first=True), "dvd")])
def test_a_machine_boots_from_what_it_is_to_boot_from(foreign: Foreign | None, first: str) -> None:
    found = options(definition.configure(replace(PLAIN, foreign=foreign)))
    assert found["--boot1"] == first
    assert {found["--boot1"], found["--boot2"]} == {"dvd", "disk"}
    assert found["--boot3"] == found["--boot4"] == "none"


def test_the_settings_are_in_the_machines_directory() -> None:
    assert options(definition.create(Path("/a b/m")))["--basefolder"] == "/a b/m"


def test_a_machine_is_joined_to_what_it_is_given_and_no_more() -> None:
    assert definition.joined({1: "/one", 2: "/two"}, None) == [
        "modifyvm", "machine", "--uart-mode1", "client", "/one", "--uart-mode2", "client", "/two"]
    assert "--uart-mode2" not in definition.joined({1: "/one"}, None)
    assert definition.joined({}, "/three") == [
        "modifyvm", "machine", "--nic-trace1", "on", "--nic-trace-file1", "/three"]


def test_each_medium_has_its_place() -> None:
    found = [options(definition.attach(medium)) for medium in (
        Medium(definition.SCSI, 2, "hdd", "/x", "writethrough"),
        Medium(definition.IDE, 3, "dvddrive", "/y"))]
    assert [(each["--port"], each["--device"], each.get("--mtype")) for each in found] == [
        ("2", "0", "writethrough"), ("1", "1", None)]


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_a_description_names_its_file_and_no_other(path: str) -> None:
    own = uuid.uuid4()
    try:
        text = definition.flat_disk(path, 1 << 20, own)
    except ValueError:
        assert '"' in path or "\n" in path
        return
    assert f'RW 2048 FLAT "{path}" 0' in text.split("\n")
    assert text.count("FLAT") == 1 + path.count("FLAT") + ('createType="monolithicFlat"' in path)
