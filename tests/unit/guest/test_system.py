"""What the guest makes of a disk image of a job's, and of the system on it."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.guest.agent import system
from vmjob.guest.agent.disks import Run, partitions, vdi_runs

MIB = 1 << 20
SECTORS = MIB // 512


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, count: data[offset:offset + count]


def put_together(image: bytes, runs: list[Run]) -> bytes:
    return b"".join(bytes(length * 512) if at is None else image[at * 512:(at + length) * 512]
                    for _, length, at in runs)


def test_the_disk_in_a_vdi_is_what_qemu_says(tmp_path: Path) -> None:
    raw = bytearray(7 * MIB + 1024)
    for at in (0, 2 * MIB + 5, 3 * MIB, 7 * MIB + 1000):
        raw[at:at + 9] = b"something"
    (tmp_path / "raw").write_bytes(raw)
    for options in ((), ("-o", "static=on")):
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vdi", *options,
                        tmp_path / "raw", tmp_path / "vdi"], check=True)
        image = (tmp_path / "vdi").read_bytes()
        runs = vdi_runs(reader(image))
        assert put_together(image, runs) == raw
        assert [first for first, _, _ in runs] == [
            sum(length for _, length, _ in runs[:n]) for n in range(len(runs))]
    assert len(runs) == 1  # blocks in their order are one piece


def vdi(*, version: int = 0x10001, kind: int = 1, size: int = 2 * MIB, block: int = MIB,
        extra: int = 0, count: int = 2, data_at: int = 1024, parent: bytes = b"",
        table: tuple[int, ...] = (1, 0)) -> bytes:
    head = bytearray(512)
    struct.pack_into("<IIIII", head, 64, 0xBEDA107F, version, 400, kind, 0)
    struct.pack_into("<II", head, 0x154, 512, data_at)
    struct.pack_into("<QIII", head, 0x170, size, block, extra, count)
    head[0x1b8:0x1b8 + len(parent)] = parent
    return bytes(head) + struct.pack(f"<{len(table)}I", *table)


def test_blocks_are_found_in_any_order() -> None:
    assert vdi_runs(reader(vdi())) == [(0, SECTORS, 2 + SECTORS), (SECTORS, SECTORS, 2)]
    assert vdi_runs(reader(vdi(table=(0xFFFFFFFF, 0xFFFFFFFE)))) == [(0, 2 * SECTORS, None)]


@pytest.mark.parametrize("image", [
    b"", vdi()[:300], vdi()[:516], vdi(version=1), vdi(kind=4), vdi(parent=b"x"), vdi(block=512),
    vdi(extra=1), vdi(size=0), vdi(size=3 * MIB), vdi(count=1 << 31), vdi(data_at=1000),
    bytes(1024)])
def test_a_vdi_that_cannot_be_is_refused(image: bytes) -> None:
    with pytest.raises(ValueError):
        vdi_runs(reader(image))


@given(st.binary(min_size=512, max_size=2048))
def test_no_image_breaks_the_look_at_it(noise: bytes) -> None:
    image = noise[:64] + struct.pack("<II", 0xBEDA107F, 0x10001) + noise[72:]
    try:
        vdi_runs(reader(image))
    except ValueError:
        pass
    record = noise[:510] + b"\x55\xaa" + noise[510:]
    for first, length in partitions(reader(record), len(record) // 512).values():
        assert first > 0
        assert first + length <= len(record) // 512


def record(*entries: tuple[int, int, int]) -> bytes:
    table = b"".join(struct.pack("<B3xB3xII", 0, *entry) for entry in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def test_partitions_are_found_also_within_others() -> None:
    disk = bytearray(100 * 512)
    disk[:512] = record((0x0c, 1, 5), (0x83, 6, 4), (0x05, 20, 60), (0x83, 90, 50))
    disk[20 * 512:21 * 512] = record((0x83, 1, 9), (0x05, 10, 20))
    disk[30 * 512:31 * 512] = record((0x82, 2, 8))
    assert partitions(reader(disk), 100) == {
        1: (1, 5), 2: (6, 4), 5: (21, 9), 6: (32, 8)}


def test_a_chain_of_partitions_that_is_a_ring_ends() -> None:
    disk = bytearray(100 * 512)
    disk[:512] = record((0x0f, 20, 60))
    disk[20 * 512:21 * 512] = record((0x83, 1, 9), (0x05, 10, 20))
    disk[30 * 512:31 * 512] = record((0x83, 1, 9), (0x05, 10, 20))
    assert partitions(reader(disk), 100) == {5: (21, 9), 6: (31, 9)}


def test_partitions_of_a_newer_kind() -> None:
    disk = bytearray(100 * 512)
    disk[:512] = record((0xee, 1, 99))
    disk[512:1024] = b"EFI PART" + bytes(64) + struct.pack("<QII", 2, 3, 128) + bytes(424)
    disk[1024:1072] = b"k" * 16 + bytes(16) + struct.pack("<QQ", 40, 49)
    disk[1280:1328] = b"k" * 16 + bytes(16) + struct.pack("<QQ", 50, 5000)
    assert partitions(reader(disk), 100) == {1: (40, 10)}


def test_a_table_of_file_systems_keeps_what_is_not_on_a_disk() -> None:
    assert system.fstab("# disks\n/dev/sda1 / ext3 errors=remount-ro 0 1\nUUID=1 /home ext3\n"
                        "rootfs / rootfs rw 0 0\nx none swap sw 0 0\nproc /proc proc defaults\n"
                        "shared /root/shared vboxsf defaults 0 0\nodd\n") == (
        "system / overlay defaults 0 0\nproc /proc proc defaults\n"
        "shared /root/shared vboxsf defaults 0 0\nodd\n")


def test_a_table_of_file_systems_keeps_those_on_disks_that_are_there() -> None:
    text = "/dev/sdb1 /cache ext4 defaults 0 2\n/dev/cdrom /media iso9660 ro 0 0\n"
    assert system.fstab(text, {"/dev/sdb1"}) == "system / overlay defaults 0 0\n" + text[:35]


def test_what_the_system_has_besides_must_be_known() -> None:
    for words in (["look", "--floppy"], ["look", "x"], ["jump"], []):
        assert system.main(words) == 2


# -- mount -t vboxsf ---------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """The program with its folders elsewhere, and a `mount` that only says what it is to do."""
    folders = tmp_path / "folders"
    (folders / "shared").mkdir(parents=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("mount", "chown", "chgrp"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tools / name).chmod(0o755)
    script = tmp_path / "mount.vboxsf"
    script.write_text(system.MOUNT_VBOXSF.replace(system.FOLDERS, str(folders))
                      .replace("PATH=", f"PATH={tools}:"))

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(["sh", script, *arguments], capture_output=True, text=True,
                              timeout=60, cwd=tmp_path)
        return done.returncode, (done.stdout or done.stderr).replace(str(folders), "FOLDERS")

    return run


@pytest.mark.parametrize("arguments", [
    ("shared", "/root/shared"), ("shared", "/root/shared", "-o", "rw"),
    ("-o", "rw", "shared", "/root/shared"), ("shared", "/root/shared", "-n", "-s", "-v"),
    ("shared", "/root/shared", "-orw,exec")])
def test_a_shared_folder_is_bound_however_it_is_asked_for(
        mount: Callable[..., tuple[int, str]], arguments: tuple[str, ...]) -> None:
    assert mount(*arguments) == (0, "mount -o bind -- FOLDERS/shared /root/shared\n")


@pytest.mark.parametrize("options", [("-o", "ro,uid=1000,gid=*,dmode=0777"),
                                     ("-oro", "-o", "gid=*", "-ouid=1000")])
def test_its_owner_and_mode_are_as_asked_for(
        mount: Callable[..., tuple[int, str]], options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "gid=made-of-a-star").touch()
    code, text = mount("shared", "/mnt", *options)
    assert code == 0
    assert text.splitlines() == [
        "mount -o bind -- FOLDERS/shared /mnt", "mount -o remount,bind,ro -- /mnt",
        "chown -R -h -- 1000 FOLDERS/shared", "chgrp -R -h -- * FOLDERS/shared"]


@pytest.mark.parametrize("name", ["", ".", "..", "../folders/shared", "shared/", "/etc", "other",
                                  "a b", "*", "$(touch made)", "shared\n"])
def test_a_folder_that_there_is_not_is_not_mounted(
        mount: Callable[..., tuple[int, str]], name: str, tmp_path: Path) -> None:
    assert mount(name, "/mnt") == (
        1, f"mount.vboxsf: shared folder '{name}' was not found (check VM settings / spelling)\n")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("arguments", [(), ("shared",), ("-x", "/mnt"), ("a", "b", "c"), ("-o",)])
def test_what_is_no_mount_is_told_how(mount: Callable[..., tuple[int, str]],
                                      arguments: tuple[str, ...]) -> None:
    code, text = mount(*arguments)
    assert code == 1
    assert text.startswith("usage:")
