"""Machines that boot what their user brings: a sector of code is a whole system here."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from vmjob.errors import CheckpointUnusable, DiskUnusable, NotSupported, UsageError, WrongState
from vmjob.home import Home
from vmjob.machine.contract import EndReason, Foreign, Machine, MachineSpec, Saved, Status
from vmjob.machine.qemu.driver import QemuDriver
from vmjob.machine.qemu.merging import MAX_LAYERS

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

#: What is printed, 4 or 5 letters in a second.
LAST_LETTERS = "PQRSTUVWXYZ"
#: Reads a letter from the second sector, prints the next one on the serial port and writes it back;
#: switches itself off after Z.
LETTERS = bytes.fromhex("".join(line.partition("|")[0] for line in """
    31c0 8ed8 8ec0 8ed0 bc007c fb   |       xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,7c00
    88160070                        |       mov [7000],dl           the drive that the BIOS took
    b80102 e83000                   | next: mov ax,0201; call disk                          read
    fe060080 a00080 baf803 ee       |       inc byte [8000]; mov al,[8000]; mov dx,3f8; out dx,al
    b80103 e81f00                   |       mov ax,0301; call disk                         write
    803e00805a 7410                 |       cmp byte [8000],'Z'; je off
    8b1e6c04 83c304                 |       mov bx,[46c]; add bx,4               ticks of 55 ms
    f4 391e6c04 7cf9 ebd2           | wait: hlt; cmp [46c],bx; jl wait; jmp next
    ba0406 b80020 ef f4             | off:  mov dx,604; mov ax,2000; out dx,ax; hlt        ACPI
    bb0080 b90200 8a160070 b600     | disk: mov bx,8000; mov cx,2; mov dl,[7000]; mov dh,0
    cd13 c3                         |       int 13; ret
""".splitlines()))
#: The same on the second disk.
LETTERS_OF_THE_SECOND = LETTERS.replace(bytes.fromhex("8a160070"), bytes.fromhex("b2819090"))
#: Prints what follows, up to a NUL, and switches itself off.
SAY = bytes.fromhex("fc31c08ed8be1b7cac84c07406baf803eeebf5ba0406b80020eff4")

MIB = 1 << 20


def disk(path: Path, code: bytes = LETTERS, *, after: str = "V", kind: str = "raw") -> Path:
    """A disk with this code, and in its second sector the letter that was printed last."""
    content = bytearray(MIB)
    content[:len(code)] = code
    content[510:513] = b"\x55\xaa" + after.encode()
    raw = path.with_suffix(".raw")
    raw.write_bytes(content)
    if kind != "raw":
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, raw, path], check=True)
        return path
    return raw


def cd(path: Path, text: bytes) -> Path:
    """The least of a CD that a PC starts from (El Torito, without emulation)."""
    content = bytearray(2 * MIB)

    def put(sector: int, data: bytes) -> None:
        content[sector * 2048:sector * 2048 + len(data)] = data

    put(16, b"\1CD001\1")
    put(17, b"\0CD001\1EL TORITO SPECIFICATION".ljust(0x47, b"\0") + struct.pack("<I", 19))
    put(18, b"\xffCD001\1")
    put(19, b"\1".ljust(30, b"\0") + b"\x55\xaa" + struct.pack("<BBHBBHI", 0x88, 0, 0, 0, 0, 4, 20))
    put(20, SAY + text + b"\0")
    path.write_bytes(content)
    return path


@pytest.fixture
def spec(home: Home) -> MachineSpec:
    return fresh(home, "m1")


def fresh(home: Home, name: str) -> MachineSpec:
    directory = home.machines / name
    directory.mkdir()
    return MachineSpec(id=name, directory=directory, boot=None, memory_mb=128)


async def said(machine: Machine) -> str:
    """What a machine says until it switches itself off."""
    try:
        assert await machine.start() == {}
        return await heard_to_the_end(machine)
    finally:
        await machine.destroy()


async def heard(machine: Machine, text: str) -> None:
    while text not in machine.console():  # noqa: ASYNC110 - nobody announces what is on a console
        await anyio.sleep(0.01)


async def heard_to_the_end(machine: Machine) -> str:
    with anyio.fail_after(60):
        ended = await machine.ended()
    assert ended.reason is EndReason.POWERED_OFF
    # The BIOS may still be saying that it boots.
    return machine.console().replace(".", "").replace("\n", "")


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vdi"])
async def test_a_disk_boots_and_is_never_written(spec: MachineSpec, tmp_path: Path,
                                                 kind: str) -> None:
    given = disk(tmp_path / "disk", kind=kind)
    before = given.read_bytes()
    machine = await QemuDriver().create(
        replace(spec, network="nat", foreign=Foreign(given)))
    text = await said(machine)
    assert "SeaBIOS" in text
    assert text.endswith("WXYZ")
    assert machine.facts()["started_from"] == "disk"
    assert given.read_bytes() == before
    assert not spec.directory.exists()


async def test_a_machine_boots_from_a_disk_or_a_cd_as_it_is_told(home: Home,
                                                                 tmp_path: Path) -> None:
    given, iso = disk(tmp_path / "disk"), cd(tmp_path / "cd.iso", b"this is the CD")
    for number, (foreign, expected) in enumerate((
            (Foreign(given, iso), "WXYZ"), (Foreign(given, iso, iso_first=True), "this is the CD"),
            (Foreign(iso=iso), "this is the CD"))):
        machine = await QemuDriver().create(replace(fresh(home, f"m{number}"), foreign=foreign))
        assert (await said(machine)).endswith(expected)


async def test_a_second_disk_is_there_and_is_never_written(spec: MachineSpec,
                                                           tmp_path: Path) -> None:
    first = disk(tmp_path / "disk", LETTERS_OF_THE_SECOND, after="A")
    second = disk(tmp_path / "second", b"", after="X", kind="vdi")
    before = second.read_bytes()
    machine = await QemuDriver().create(replace(spec, foreign=Foreign(first, cache_disk=second)))
    assert (await said(machine)).endswith("YZ")
    assert second.read_bytes() == before


@pytest.mark.parametrize("kind", ["qcow2", "vdi"])
async def test_it_stands_still_goes_on_and_continues_from_a_checkpoint(
        spec: MachineSpec, home: Home, tmp_path: Path, kind: str) -> None:
    checkpoints = home.root / "checkpoints"
    checkpoints.mkdir()
    driver = QemuDriver()
    foreign = Foreign(disk(tmp_path / "disk", after="O", kind=kind),
                      cd(tmp_path / "cd.iso", b"the CD"))
    machine = await driver.create(replace(spec, display=True, foreign=foreign))
    try:
        assert await machine.start() == {}
        with anyio.fail_after(60):
            await heard(machine, "PQ")
        await machine.suspend()
        await machine.screenshot(tmp_path / "screen.png")
        kept = await machine.checkpoint(checkpoints, "1", lambda: None)
        assert machine.get_status() is Status.SUSPENDED
        first = machine.console()
        assert first == LAST_LETTERS[:len(first)]
        await machine.resume()
        assert (await heard_to_the_end(machine)) == LAST_LETTERS
    finally:
        await machine.destroy()
    for name in ("disk", "cd.iso"):
        (tmp_path / name).unlink()
    for number in range(2):
        again = await driver.create(replace(fresh(home, f"again{number}"), display=True,
                                            saved=Saved(checkpoints, kept.state)))
        assert first + await said(again) == LAST_LETTERS
    (checkpoints / "base").write_bytes(b"QFI\xfb")
    with pytest.raises(CheckpointUnusable):
        await driver.create(replace(fresh(home, "damaged"), saved=Saved(checkpoints, kept.state)))


async def test_layers_above_a_vdi_are_merged_as_others_are(spec: MachineSpec, home: Home,
                                                           tmp_path: Path) -> None:
    checkpoints = home.root / "checkpoints"
    checkpoints.mkdir()
    driver = QemuDriver()
    given = disk(tmp_path / "disk", after=":", kind="vdi")
    machine = await driver.create(replace(spec, foreign=Foreign(given)))
    try:
        await machine.start()
        with anyio.fail_after(60):
            await heard(machine, ";")
        for number in range(MAX_LAYERS + 3):
            kept = await machine.checkpoint(checkpoints, f"{number:02}", lambda: None)
            if merging := machine._merging:
                await merging
    finally:
        await machine.destroy()
    given.unlink()
    assert kept.state["layers"][0].endswith(".merged")
    again = await driver.create(replace(fresh(home, "again"), saved=Saved(checkpoints, kept.state)))
    # Each comes from the one before, which is on the disk.
    rest = await said(again)
    assert rest.endswith("YZ")
    assert rest in "".join(map(chr, range(ord(";"), ord("Z") + 1)))


@pytest.mark.parametrize("with_disk", [True, False])
async def test_only_a_machine_with_one_disk_can_be_kept(spec: MachineSpec, tmp_path: Path,
                                                        with_disk: bool) -> None:
    given = disk(tmp_path / "disk", after="@")
    iso = cd(tmp_path / "cd.iso", b"")
    foreign = Foreign(given, cache_disk=given) if with_disk else Foreign(iso=iso)
    machine = await QemuDriver().create(replace(spec, foreign=foreign))
    await machine.start()
    try:
        await machine.suspend()
        with pytest.raises(NotSupported):
            await machine.checkpoint(tmp_path, "1", lambda: None)
        assert machine.get_status() is Status.SUSPENDED
    finally:
        await machine.destroy()


async def test_an_image_that_names_other_files_is_refused(spec: MachineSpec,
                                                          tmp_path: Path) -> None:
    secret = disk(tmp_path / "secret")
    commands = {
        "backed": ["qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", secret, "backed"],
        "outside": ["qemu-img", "create", "-f", "qcow2", "-o", "data_file=data", "outside", "1M"],
        "extents": ["qemu-img", "create", "-f", "vmdk", "-o", "subformat=monolithicFlat",
                    "extents", "1M"],
        "newer": ["qemu-img", "create", "-f", "qed", "newer", "1M"]}
    for name, command in commands.items():
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        for foreign in (Foreign(tmp_path / name), Foreign(iso=tmp_path / name),
                        Foreign(secret, cache_disk=tmp_path / name)):
            with pytest.raises(DiskUnusable, match=name):
                await QemuDriver().create(replace(spec, foreign=foreign))
    cut = tmp_path / "cut"
    cut.write_bytes(disk(tmp_path / "whole", kind="qcow2").read_bytes()[:60])
    os.mkfifo(tmp_path / "pipe")
    for path in (cut, tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "nothing"):
        with pytest.raises(DiskUnusable):
            await QemuDriver().create(replace(spec, foreign=Foreign(path)))
    with pytest.raises(UsageError):
        await QemuDriver().create(replace(spec, foreign=Foreign(cache_disk=secret)))
    assert list(spec.directory.iterdir()) == []


async def test_what_was_changed_since_it_was_made_is_refused(spec: MachineSpec,
                                                             tmp_path: Path) -> None:
    given = disk(tmp_path / "disk")
    machine = await QemuDriver().create(replace(spec, foreign=Foreign(given)))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd",
                    given], check=True)
    with pytest.raises(DiskUnusable):
        await machine.start()
    await machine.destroy()


async def test_a_hypervisor_that_was_told_to_end_is_no_system_that_switched_itself_off(
        spec: MachineSpec, tmp_path: Path) -> None:
    machine = await QemuDriver().create(
        replace(spec, foreign=Foreign(disk(tmp_path / "disk", after="@"))))
    await machine.start()
    try:
        assert machine.pid is not None
        os.kill(machine.pid, signal.SIGTERM)
        with anyio.fail_after(60):
            assert (await machine.ended()).reason is EndReason.KILLED
    finally:
        await machine.destroy()


async def test_load_takes_up_what_create_made(home: Home, tmp_path: Path) -> None:
    for name, foreign in (("disk", Foreign(disk(tmp_path / "disk"))),
                          ("cd", Foreign(iso=cd(tmp_path / "cd.iso", b"WXYZ")))):
        made = replace(fresh(home, name), foreign=foreign)
        await QemuDriver().create(made)
        assert (await said(await QemuDriver().load(made))).endswith("WXYZ")
        with pytest.raises(WrongState):
            await QemuDriver().load(made)


async def test_it_is_no_template(spec: MachineSpec, tmp_path: Path) -> None:
    given = Foreign(disk(tmp_path / "disk"))
    for change in (replace(spec, freezable=True), replace(spec, template=tmp_path)):
        with pytest.raises(WrongState):
            await QemuDriver().create(replace(change, foreign=given))
