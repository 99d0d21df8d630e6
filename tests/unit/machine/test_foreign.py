"""What is told of a user's disk from its first bytes, and how QEMU is given it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.errors import DiskUnusable
from vmjob.guest.agent.wire import LANES
from vmjob.machine.contract import Attached, BootParts, Foreign, MachineSpec
from vmjob.machine.disks import CD_HEAD, check_cd, format_of
from vmjob.machine.qemu import argv
from vmjob.machine.qemu.foreign import Disk, Media, size_of

SPEC = MachineSpec(id="m1", directory=Path("/m"), boot=None, foreign=Foreign(Path("/d")))
FDS = argv.Descriptors(3, 4, {})
IMAGE = Disk(Path("/u/a,b disk"), "vdi", 1 << 20)
CACHE = Disk(Path("/u/cache"), "qcow2", 1 << 21)
ISO = Disk(Path("/u/cd"), "raw", 1 << 22)


def qcow2(*, version: int = 3, backing: int = 0, encrypted: int = 0, features: int = 0) -> bytes:
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", version, backing, 0, 16, 1 << 20, encrypted)
    return head.ljust(72, b"\0") + struct.pack(">Q", features) + bytes(24)


def test_the_formats_that_are_taken() -> None:
    assert format_of(qcow2()) == "qcow2"
    assert format_of(qcow2(version=2)) == "qcow2"
    assert format_of(qcow2(features=1 | 8 | 16)) == "qcow2"
    assert format_of(b"<<< Oracle VM".ljust(64, b"\0") + b"\x7f\x10\xda\xbe") == "vdi"
    assert format_of(b"\x55\xaa" * 256) == "raw"
    assert format_of(b"") == "raw"


@pytest.mark.parametrize("head", [
    qcow2(backing=1), qcow2(encrypted=1), qcow2(features=2), qcow2(features=4),
    qcow2(features=1 << 63), qcow2(version=1), qcow2(version=4), qcow2()[:30], qcow2()[:75],
    b"KDMV", b"COWD", b"# Disk DescriptorFile\n", b"vhdxfile", b"conectix", b"QED\0",
    b"LUKS\xba\xbe", b"WithoutFreeSpace", b"WithouFreSpacExt", b"Bochs Virtual HD Image",
    *(line + b"\n#".ljust(64 - len(line)) + b"\x7f\x10\xda\xbe" for line in (
        b"# Disk DescriptorFile", b"# Disk Descriptor File", b"#Disk DescriptorFile",
        b"#Disk Descriptor File", b"\n  # version=1")),
    b"#Disk DescriptorFile\n", b"\r\n#"])
def test_what_may_name_other_files_is_refused(head: bytes) -> None:
    with pytest.raises(DiskUnusable):
        format_of(head)


def cd(begin: bytes = b"", mark: bytes = b"CD001") -> bytes:
    return begin.ljust(0x8000, b"\0") + b"\1" + mark + b"\1"


@pytest.mark.parametrize("head", [cd(), cd(mark=b"BEA01"), cd(b"\x33\xed"), cd(b"ER\x08\0")])
def test_a_cd_is_one_whatever_it_starts_a_computer_with(head: bytes) -> None:
    check_cd(head[:CD_HEAD])


@pytest.mark.parametrize("head", [
    b"", b"\0" * CD_HEAD, cd(mark=b"CD002"), cd()[:CD_HEAD - 1],
    cd(b"--iprt-iso-maker-file-marker-bourne-sh=1\n/secret=/etc/passwd"),
    cd(b"\n \t--iprt-iso-maker-file-marker=1"), cd(b"\xef\xbb\xbf--iprt-iso-maker-file-marker=1"),
    cd(b'FILE "/etc/passwd" BINARY\n'), cd(b"REM x\n"), cd(b"# Disk DescriptorFile\n")])
def test_a_list_of_this_computers_files_is_no_cd(head: bytes) -> None:
    with pytest.raises(DiskUnusable):
        check_cd(head[:CD_HEAD])


@given(st.binary(max_size=200), st.sampled_from([b"", b"QFI\xfb", b"QFI\xfb\0\0\0\3"]))
def test_whatever_a_file_begins_with_is_a_format_or_refused(rest: bytes, begin: bytes) -> None:
    try:
        found = format_of(begin + rest)
    except DiskUnusable:
        return
    assert found in ("raw", "vdi", "qcow2")
    if found == "qcow2":
        assert not any(rest[8 - len(begin):16 - len(begin)])


def test_the_size_is_the_guests_in_whole_sectors() -> None:
    assert size_of('{"virtual-size": 1048576, "format": "vdi"}', "vdi") == 1048576
    assert size_of('{"virtual-size": 1000, "format": "raw"}', "raw") == 1024


@pytest.mark.parametrize("told", [
    "", "[]", "{}", '{"virtual-size": 512}', '{"virtual-size": 512, "format": "raw"}',
    '{"virtual-size": 0, "format": "qcow2"}', '{"virtual-size": "x", "format": "qcow2"}',
    '{"virtual-size": 512, "format": "qcow2", "backing-filename": "/etc/passwd"}',
    '{"virtual-size": 512, "format": "qcow2", "encrypted": true}',
    '{"virtual-size": 512, "format": "qcow2", "format-specific": {"data": {"data-file": "x"}}}',
    '{"virtual-size": 512, "format": "qcow2", "format-specific": 1}'])
def test_what_qemu_img_finds_besides_is_refused(told: str) -> None:
    with pytest.raises(DiskUnusable):
        size_of(told, "qcow2")


def command(media: Media, **more: object) -> list[str]:
    return argv.command_line("qemu", replace(SPEC, **more), Path("/m/overlay.qcow2"), FDS, media)  # type: ignore[arg-type]


def nodes(words: list[str]) -> dict[str, dict[str, object]]:
    found = [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "-blockdev"]
    return {node["node-name"]: node for node in found}


def devices(words: list[str]) -> list[str]:
    return [words[at + 1] for at, word in enumerate(words) if word == "-device"]


def test_a_users_file_is_never_written_and_its_format_never_guessed() -> None:
    found = nodes(command(Media(IMAGE, CACHE, ISO, False)))
    for name, path, kind in (("base", "/u/a,b disk", "vdi"), ("cache-base", "/u/cache", "qcow2"),
                             ("cd", "/u/cd", "raw")):
        assert found[f"{name}-file"]["filename"] == path
        assert found[f"{name}-file"]["read-only"] is True
        assert (found[name]["driver"], found[name]["read-only"]) == (kind, True)
    assert found["cache-base"]["backing"] is None
    written = {name: node.get("filename") for name, node in found.items() if not node["read-only"]}
    assert written == {"scratch": None, "scratch-file": "/m/overlay.qcow2",
                       "cache": None, "cache-file": "/m/cache.qcow2"}
    assert (found["scratch"]["backing"], found["cache"]["backing"]) == ("base", "cache-base")


def test_the_bios_starts_from_what_it_is_told() -> None:
    def order(media: Media) -> list[str]:
        return [each.partition(",")[0] for each in sorted(
            (each for each in devices(command(media)) if "bootindex" in each),
            key=lambda each: each[-1])]

    assert order(Media(IMAGE, CACHE, ISO, False)) == ["ide-hd", "ide-cd"]
    assert order(Media(IMAGE, None, ISO, True)) == ["ide-cd", "ide-hd"]
    assert order(Media(None, None, ISO, False)) == ["ide-cd"]


def test_a_foreign_machine_is_a_pc_without_lanes_that_may_restart() -> None:
    words = command(Media(IMAGE, None, None, False), network="nat")
    machine = words[words.index("-machine") + 1]
    assert "sata=off" not in machine
    assert "graphics=off" in machine
    assert "graphics=off" not in " ".join(command(Media(IMAGE, None, None, False), display=True))
    assert not {"-kernel", "-append", "-no-reboot"} & set(words)
    assert "virtserialport" not in " ".join(words)
    assert "e1000,netdev=net0,romfile=" in words
    assert words[words.index("-serial") + 1] == "chardev:console"


@pytest.mark.parametrize(("part", "given", "driver", "serial"), [
    ("disk", IMAGE, "raw", "vmjob-disk-vdi"), ("disk", CACHE, "qcow2", "vmjob-disk-raw"),
    ("disk", ISO, "raw", "vmjob-disk-raw"), ("iso", ISO, "raw", "vmjob-iso-raw"),
    ("cache_disk", IMAGE, "raw", "vmjob-cache_disk-vdi")])
def test_a_disk_besides_is_only_read_and_comes_after_all_others(part: str, given: Disk, driver: str,
                                                                serial: str) -> None:
    nowhere = Path("/i")
    spec = replace(SPEC, foreign=None, boot=BootParts("", nowhere, nowhere, nowhere, nowhere))
    fds = argv.Descriptors(3, 4, dict.fromkeys(LANES, 5))
    without = argv.command_line("qemu", spec, Path("/m/overlay.qcow2"), fds)
    spec = replace(spec, attached=Attached(given.path))
    words = argv.command_line("qemu", spec, Path("/m/overlay.qcow2"), fds, attached={part: given})
    nodes = [json.loads(word) for word in words if word.startswith("{") and "attached" in word]
    assert [node["driver"] for node in nodes] == ["file", driver]
    assert all(node["read-only"] for node in nodes)
    assert nodes[0]["filename"] == str(given.path)
    assert [word for word in words if word.endswith(f",serial={serial}")]
    assert len(serial) <= 20  # VIRTIO_BLK_ID_BYTES
    others = [word for word in without if word.startswith("virtio-blk")]
    assert [word for word in words if word.startswith("virtio-blk")][:-1] == others
    assert "vsyscall=xonly" in words[words.index("-append") + 1]
