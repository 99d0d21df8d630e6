"""Copies of frozen machines: no two alike, of any shape, and never of a broken template."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import vmjob
from tests.clocks import Clocks
from tests.conftest import eventually, lend
from vmjob.engine.session import Session, open_session
from vmjob.engine.templates import TemplateStore, key_of
from vmjob.home import Home
from vmjob.image.store import Image
from vmjob.machine.contract import MachineSpec
from vmjob.machine.qemu import programs
from vmjob.machine.qemu.driver import QemuDriver

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

#: Everything by which one machine could be taken for another.
WHO = """
import os, uuid, socket
print(open('/dev/urandom', 'rb').read(16).hex())
print(os.getrandom(16).hex())
print(uuid.uuid4())
print(socket.gethostname())
print(open('/etc/machine-id').read().strip())
print(open('/proc/sys/kernel/random/boot_id').read().strip())
"""
COPIES = 50


async def test_fifty_copies_have_nothing_in_common(home: Home, science_image: Image) -> None:
    """Random numbers of the kernel and of Python, a key of ssh-keygen, and every name."""
    lend(science_image, home)
    seen: list[list[str]] = []
    for number in range(COPIES):
        async with vmjob.AsyncMachine.create(image="science", accel="tcg") as machine:
            assert (await machine.facts())["started_from"] == "template"
            found = (await machine.run(["python3", "-c", WHO])).stdout_text.splitlines()
            assert found[3].startswith("vmjob-")
            if number < 5:  # a second each
                script = "ssh-keygen -q -t ed25519 -N '' -f key; cut -d' ' -f2 key.pub"
                key = await machine.run(["sh", "-c", script])
                assert key.exit_code == 0, key.stderr_text
                found.append(key.stdout_text)
            seen.append(found)
    for column in range(6):
        assert len({row[column] for row in seen}) == COPIES
    assert len({row[6] for row in seen[:5]}) == 5


@pytest.fixture
def copied(vm_home: Home, vm_shape: MachineSpec):  # type: ignore[no-untyped-def]
    @asynccontextmanager
    async def start(**change: object) -> AsyncIterator[Session]:
        async with open_session(vm_home, QemuDriver(), replace(vm_shape, **change)) as session:
            yield session
    return start


async def text_of(session: Session, *argv: str) -> str:
    caught = b""

    async def take(stream: str, data: bytes) -> None:
        nonlocal caught
        caught += data

    task = await session.client.start(list(argv))
    await session.client.follow(task, take)
    return caught.decode()


#: What two clocks say of half a second; the best of some, for much can come between two looks.
HALF = """
import time
def look():
    a, b = time.monotonic(), time.time()
    time.sleep(0.5)
    return time.monotonic() - a, time.time() - b
print(*min((look() for _ in range(5)), key=lambda each: abs(each[0] - each[1])))
"""


async def test_the_clock_of_a_copy_is_right_and_runs(copied, clocks: Clocks) -> None:  # type: ignore[no-untyped-def]
    async with copied() as session:
        assert await clocks.wrong(session.client) < 0.1
        monotonic, wall = map(float, (await text_of(session, "python3", "-c", HALF)).split())
        assert 0.5 <= monotonic < 5
        assert abs(wall - monotonic) < 0.1


async def test_a_copy_takes_the_clock_of_the_host_whatever_it_was_before(
        copied, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    month = 30 * 86400
    for moved in (month, -month):
        clock = SimpleNamespace(time=lambda moved=moved: time.time() + moved)
        monkeypatch.setattr("vmjob.guest.client.time", clock)
        async with copied() as session:
            said = float((await session.client.ping())["time"])
            assert abs(said - (time.time() + moved)) < 300


async def test_a_small_program_has_a_small_peak_of_memory(copied) -> None:  # type: ignore[no-untyped-def]
    """Not that of the agent, which had nearly all of the machine before it was frozen."""
    async def ignore(stream: str, data: bytes) -> None: ...

    async with copied() as session:
        end = await session.client.follow(await session.client.start(["true"]), ignore)
        assert 0 < end.rusage["ru_maxrss"] < 32 << 10  # KiB


async def test_a_name_resolves_in_a_copy(copied) -> None:  # type: ignore[no-untyped-def]
    async with copied() as session:
        script = "import socket; print(socket.gethostbyname(socket.gethostname()))"
        assert await text_of(session, "python3", "-c", script) == "127.0.0.1\n"


async def test_copies_with_a_network_have_addresses_of_their_own(copied) -> None:  # type: ignore[no-untyped-def]
    found = set()
    for _ in range(2):
        async with copied(network="nat") as session:
            found.add(await text_of(session, "cat", "/sys/class/net/eth0/address"))
    assert len(found) == 2
    assert all(mac.startswith("52:54:00:") for mac in found)


@pytest.mark.parametrize("gigabytes", [2, 10, 30])
async def test_a_copy_has_the_disk_that_was_asked_for(copied, gigabytes: int) -> None:  # type: ignore[no-untyped-def]
    async with copied(disk_gb=gigabytes) as session:
        size = int((await text_of(session, "stat", "-f", "-c", "%b", "/job")).strip()) * 4096
        assert 0.9 < size / (gigabytes << 30) <= 1


async def test_what_one_copy_writes_no_other_sees(copied) -> None:  # type: ignore[no-untyped-def]
    async with copied() as first, copied() as second:
        await text_of(first, "sh", "-c", "echo mine > file; head -c 20000000 /dev/zero > large")
        assert await text_of(second, "ls", "-A") == ""
        assert first.machine.spec.template == second.machine.spec.template


async def test_state_that_qemu_does_not_take_leads_to_a_boot(
        copied, vm_home: Home, vm_shape: MachineSpec) -> None:  # type: ignore[no-untyped-def]
    """A template whose checksums are right and whose content is not."""
    own = replace(vm_shape, memory_mb=200)
    async with copied(memory_mb=200):
        pass
    store = TemplateStore(vm_home)
    key, _ = key_of(QemuDriver(), own)
    place = vm_home.templates / key
    (place / "devices").write_bytes(b"not what QEMU wrote")
    sealed = json.loads((place / "template.json").read_text())
    sealed["template"]["files"]["devices"]["size"] = 19
    sealed["template"]["files"]["devices"]["sha256"] = templates_digest(place / "devices")
    raw = json.dumps(sealed["template"], separators=(",", ":"))
    sealed["sha256"] = hashlib.sha256(raw.encode()).hexdigest()
    (place / "template.json").write_text(json.dumps(sealed, separators=(",", ":")))
    async with copied(memory_mb=200) as session:
        assert session.machine.spec.template is None
        assert session.cold_because is not None
        assert await text_of(session, "echo", "alive") == "alive\n"
    assert key not in {each.key for each in store.all()}


def templates_digest(path: Path) -> str:
    from vmjob.host.digest import digest

    return digest(path)


def test_another_qemu_is_another_template(vm_shape: MachineSpec,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(QemuDriver(), vm_shape)[0]
    assert key_of(QemuDriver(), vm_shape)[0] == before
    monkeypatch.setattr(programs, "identity", lambda binary: "upgraded")
    assert key_of(QemuDriver(), vm_shape)[0] != before


def vmjob_run(*arguments: str, **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vmjob", "run", "--accel", "tcg", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            stdin=subprocess.DEVNULL, **more)  # type: ignore[call-overload, no-any-return]


async def test_several_first_starts_freeze_one_machine(vm_home: Home) -> None:
    before = {each.key for each in TemplateStore(vm_home).all()}
    runs = [vmjob_run("--memory", "150", "--", "echo", str(n)) for n in range(4)]
    for number, each in enumerate(runs):
        out, err = each.communicate(timeout=300)
        assert (out, err) == (f"{number}\n", "")
    assert len({each.key for each in TemplateStore(vm_home).all()} - before) == 1


async def test_a_freeze_that_is_killed_leaves_nothing(vm_home: Home) -> None:
    store = TemplateStore(vm_home)

    def published() -> set[str]:
        return {each.name for each in vm_home.templates.iterdir() if not each.name.startswith(".")}

    before = published()
    for mark in ("memory", "devices"):  # while it boots, while it is written
        process = vmjob_run("--memory", "140", "--", "true")
        assert eventually(lambda mark=mark, process=process: process.poll() is not None or any(
            next(vm_home.machines.glob(f"*/{place}{mark}"), None) for place in ("", "template/")),
            120)
        process.kill()
        process.communicate()
        for key in published() - before:  # the kill came late: then it is whole
            lease = store.lease(key)
            assert lease is not None
            lease.close()
            store.condemn(key)
    out, err = vmjob_run("--memory", "140", "--", "echo", "works").communicate(timeout=300)
    assert (out, err) == ("works\n", "")
    assert list(vm_home.machines.iterdir()) == []


@pytest.mark.usefixtures("vm_home")
def test_a_machine_of_more_memory_is_a_copy_as_well() -> None:
    """Its kernel keeps more of it free, and gives up everything else for that."""
    done = subprocess.run(
        [sys.executable, "-m", "vmjob", "run", "--json", "--memory", "1024", "--accel", "tcg", "--",
         "true"], capture_output=True, text=True, timeout=250, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["machine"]["started_from"] == "template"
