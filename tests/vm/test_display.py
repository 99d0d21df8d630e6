"""The screen of a real guest: what is on it, who may look, and what a checkpoint keeps of it."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import time
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from anyio.to_thread import run_sync

from vmjob.engine.session import open_session
from vmjob.guest.client import AgentClient
from vmjob.home import Home
from vmjob.machine.contract import ConsoleAddress, Machine, MachineSpec, Saved
from vmjob.machine.qemu.driver import QemuDriver

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

PATIENCE = 60.0
#: A clean screen without a blinking cursor, half of it white.
PAINT = r"printf '\033[?25l\033[2J\033[1;1H\033[47m%960s\033[0m' '' > /dev/tty1"


async def drop(stream: str, data: bytes) -> None: ...


async def run(client: AgentClient, script: str) -> None:
    end = await client.follow(await client.start(["sh", "-c", script]), drop)
    assert end.exit_code == 0


async def picture(machine: Machine, path: Path) -> tuple[int, int, bytes]:
    """Width, height and the raw lines of what is on the screen."""
    await machine.screenshot(path)
    data, at, parts = path.read_bytes(), 8, []
    width = height = 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8:at + 8 + length]
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", body)
        elif kind == b"IDAT":
            parts.append(body)
        at += 12 + length
    return width, height, zlib.decompress(b"".join(parts))


def admitted(address: ConsoleAddress, password: str) -> bool:
    """Whether a viewer with this password may look (RFC 6143, 7.1 and 7.2.2)."""
    with closing(socket.create_connection((address.host, address.port), PATIENCE)) as viewer:
        stream = viewer.makefile("rwb")
        assert stream.read(12) == b"RFB 003.008\n"
        stream.write(b"RFB 003.008\n")
        stream.flush()
        assert stream.read(2) == b"\x01\x02", "there is a way in besides the password"
        stream.write(b"\x02")
        stream.flush()
        # Each byte of the key is mirrored: so VNC has it.
        key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password.encode().ljust(8, b"\0"))
        done = subprocess.run(
            ["openssl", "enc", "-des-ecb", "-nopad", "-K", key.hex(), "-provider", "legacy",
             "-provider", "default"], input=stream.read(16), capture_output=True, check=True)
        stream.write(done.stdout)
        stream.flush()
        answer: int = struct.unpack(">I", stream.read(4))[0]
        stream.close()
        return answer == 0


async def test_what_a_job_paints_is_seen_and_is_there_after_a_restore(
        vm_home: Home, vm_shape: MachineSpec, tmp_path: Path) -> None:
    shape = replace(vm_shape, display=True)
    checkpoints = vm_home.root / "checkpoints"
    checkpoints.mkdir()
    async with open_session(vm_home, QemuDriver(), shape) as session:
        assert session.machine.spec.template is not None
        boot = await picture(session.machine, tmp_path / "boot.png")
        assert boot[:2] == (720, 400)
        assert len(set(boot[2])) > 1, "nothing of the boot is on the screen"
        await run(session.client, PAINT)
        painted = await picture(session.machine, tmp_path / "painted.png")
        line = 1 + 3 * painted[0]
        assert painted[2][:line] != painted[2][-line:], "one half is like the other"
        password = session.machine.console_address().password
        kept = await session.machine.checkpoint(checkpoints, "1", lambda: None)
        assert await picture(session.machine, tmp_path / "kept.png") == painted
    directory = vm_home.machines / "again"
    directory.mkdir()
    machine = await QemuDriver().create(
        replace(shape, id="again", directory=directory, boot=None,
                saved=Saved(checkpoints, kept.state)))
    client = AgentClient(await machine.start())
    try:
        assert await picture(machine, tmp_path / "restored.png") == painted
        assert machine.console_address().password != password
        await client.hello(PATIENCE)
        await run(client, r"printf '\033[2J' > /dev/tty1")
        assert await picture(machine, tmp_path / "cleared.png") != painted
    finally:
        client.close()
        await machine.destroy()


@pytest.mark.skipif(not shutil.which("openssl"), reason="a viewer needs DES")
async def test_only_who_has_the_password_may_look(vm_home: Home, vm_shape: MachineSpec) -> None:
    async with open_session(vm_home, QemuDriver(), replace(vm_shape, display=True)) as session:
        machine = session.machine
        address = machine.console_address()
        assert await run_sync(admitted, address, address.password)
        assert not await run_sync(admitted, address, "")
        assert not await run_sync(admitted, address, address.password[::-1])
        await machine.stop()
        for path in machine.spec.directory.iterdir():
            assert address.password.encode() not in path.read_bytes(), path


#: The largest picture that the screen's memory allows, 4 bits a pixel, of noise: the registers are
#: those of the Bochs graphics adapter (QEMU's docs/specs/standard-vga.rst).
NOISE = """
import glob, mmap, os
card, = [os.path.dirname(path) for path in glob.glob("/sys/bus/pci/devices/*/class")
         if open(path).read().startswith("0x0300")]
registers = mmap.mmap(os.open(card + "/resource2", os.O_RDWR), 4096)
words = memoryview(registers).cast("H")
for index, value in ((4, 0), (1, 16000), (2, 1048), (3, 4), (4, 0x41)):
    words[0x280 + index] = value
screen = mmap.mmap(os.open(card + "/resource0", os.O_RDWR), 8 << 20)
for at in range(0, len(screen), 1 << 16):
    screen[at:at + (1 << 16)] = os.urandom(1 << 16)
"""


async def test_a_guest_cannot_make_pictures_that_take_the_disk_or_the_time(
        vm_home: Home, vm_shape: MachineSpec, tmp_path: Path) -> None:
    async with open_session(vm_home, QemuDriver(), replace(vm_shape, display=True)) as session:
        client = session.client
        task = await client.start(["python3", "-c", NOISE], user="root")
        assert (await client.follow(task, drop)).exit_code == 0
        began = time.monotonic()
        await session.machine.screenshot(tmp_path / "noise.png")
        assert time.monotonic() - began < 60
        assert 1 << 20 < (tmp_path / "noise.png").stat().st_size <= 32 << 20
        await client.ping()
