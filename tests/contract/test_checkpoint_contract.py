"""One suite for every driver that makes checkpoints: what continues, and what a failure leaves."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import psutil
import pytest

from tests.conftest import lend, open_descriptors
from vmjob.errors import (
    CheckpointFailed,
    CheckpointNewer,
    CheckpointUnusable,
    HostDiskFull,
    VmjobError,
    WrongState,
)
from vmjob.guest.client import AgentClient, Identity, TaskEnd
from vmjob.home import Home
from vmjob.image.store import Image
from vmjob.machine.contract import (
    BootParts,
    Checkpoint,
    Driver,
    Machine,
    MachineSpec,
    Saved,
    Status,
)
from vmjob.machine.fake import SimulatedDriver
from vmjob.machine.qemu.driver import QemuDriver
from vmjob.machine.virtualbox.driver import VirtualBoxDriver

pytestmark = pytest.mark.anyio

#: Seconds for whatever a machine is waited for; TCG on a loaded computer.
PATIENCE = 120.0
#: Steps of the chain from one line to the next: 20 ms or so in either kind of machine.
EVERY = 400
#: The simulated machine's program ``hash-chain 0 EVERY chain``, for a real one.
CHAIN = f"""
import hashlib, os, sys
known, step = bytes(32), 0
file = open("chain", "ab", buffering=0)
while True:
    known, step = hashlib.sha256(known).digest(), step + 1
    if step % {EVERY} == 0:
        over = os.path.exists("stop")
        line = known.hex().encode() + b"\\n"
        file.write(line)
        os.fsync(file.fileno())
        os.write(1, line)
        if over:
            break
"""
#: Bytes of a line.
LINE = 65


DRIVERS: dict[str, Callable[[], Driver]] = {
    "simulated": SimulatedDriver, "qemu": QemuDriver, "virtualbox": VirtualBoxDriver}


def driver_of(name: str) -> Driver:
    return DRIVERS[name]()


@pytest.fixture(params=["simulated", pytest.param("qemu", marks=pytest.mark.vm),
                        pytest.param("virtualbox", marks=pytest.mark.vm)])
def driver(request: pytest.FixtureRequest) -> Driver:
    if request.param == "virtualbox":
        request.getfixturevalue("virtualbox")
    return driver_of(request.param)


@pytest.fixture(scope="module")
def template(default_image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen machine: its copies are there at once."""
    directory, kept = tmp_path_factory.mktemp("frozen"), tmp_path_factory.mktemp("template")

    async def freeze() -> None:
        machine = await QemuDriver().create(replace(vm(default_image, directory), freezable=True))
        client = AgentClient(await machine.start(), slowness=machine.spec.slowness)
        try:
            await client.hello(PATIENCE)
            await client.sleep()
            for name in await machine.freeze():
                (directory / name).rename(kept / name)
        finally:
            client.close()
            await machine.destroy()

    anyio.run(freeze)
    return kept


def vm(image: Image, directory: Path) -> MachineSpec:
    return MachineSpec(id="m1", directory=directory, boot=BootParts.of(image), memory_mb=256,
                       accelerator="tcg")


def fresh(home: Home, driver: Driver, request: pytest.FixtureRequest) -> MachineSpec:
    directory = home.machines / "m1"
    directory.mkdir()
    if driver.name == "simulated":
        return MachineSpec(id="m1", directory=directory, boot=None)
    image = request.getfixturevalue("default_image")
    lend(image, home)
    if driver.name == "virtualbox":
        return replace(request.getfixturevalue("in_virtualbox"), id="m1", directory=directory)
    return vm(image, directory)


@pytest.fixture
def spec(driver: Driver, home: Home, request: pytest.FixtureRequest) -> MachineSpec:
    """A machine that starts quickly: a copy, unless a test asks for one that is ``booted``."""
    found = fresh(home, driver, request)
    if driver.name == "qemu" and getattr(request, "param", "copied") == "copied":
        found = replace(found, template=request.getfixturevalue("template"))
    return found


@pytest.fixture
def kept(home: Home) -> Path:
    """Where the checkpoints go."""
    directory = home.root / "checkpoints"
    directory.mkdir(parents=True)
    return directory


class Heard:
    """The output of one command, from some offset on."""

    def __init__(self, said: bytes = b"") -> None:
        self.said = said
        self._came = anyio.Event()

    async def take(self, stream: str, data: bytes) -> None:
        assert stream == "stdout", data
        self.said += data
        self._came.set()
        self._came = anyio.Event()

    async def lines(self, count: int) -> None:
        """Wait for so many more."""
        wanted = len(self.said) + count * LINE
        with anyio.fail_after(PATIENCE):
            while len(self.said) < wanted:
                await self._came.wait()


@asynccontextmanager
async def running(driver: Driver, spec: MachineSpec) -> AsyncIterator[tuple[Machine, AgentClient]]:
    spec.directory.mkdir(exist_ok=True)
    machine = await driver.create(spec)
    try:
        client = AgentClient(await machine.start(), slowness=machine.spec.slowness)
        try:
            await client.hello(PATIENCE)
            if spec.template is not None:
                await client.introduce(Identity.fresh("m1", network=False))
            yield machine, client
        finally:
            client.close()
    finally:
        await machine.destroy()


async def start_chain(client: AgentClient, driver: Driver) -> int:
    if driver.name == "simulated":
        return await client.start(["hash-chain", "0", str(EVERY), "chain"])
    return await client.start(["python3", "-c", CHAIN])


async def go_on(client: AgentClient, task: int, heard: Heard) -> TaskEnd:
    """Follow a command of whose output ``heard`` has the beginning."""
    return await client.follow(task, heard.take, {"stdout": len(heard.said)})


def chain(lines: int) -> bytes:
    """The first lines of the chain."""
    known, said = bytes(32), b""
    for _ in range(lines):
        for _ in range(EVERY):
            known = hashlib.sha256(known).digest()
        said += known.hex().encode() + b"\n"
    return said


@dataclass
class Kept:
    """A checkpoint, and what the host had heard at that instant."""

    checkpoint: Checkpoint
    said: bytes

    def spec(self, before: MachineSpec, directory: Path, name: str = "m2") -> MachineSpec:
        # What is kept of it is JSON.
        state = json.loads(json.dumps(self.checkpoint.state))
        return replace(before, id=name, directory=before.directory.with_name(name), boot=None,
                       template=None, saved=Saved(directory, state))


async def keep(machine: Machine, directory: Path, name: str, heard: Heard | None = None) -> Kept:
    """Make a checkpoint; ``while_still`` is called once, and all files are there."""
    noted: list[bytes] = []
    checkpoint = await machine.checkpoint(directory, name,
                                          lambda: noted.append(heard.said if heard else b""))
    said, = noted
    assert len(set(checkpoint.files)) == len(checkpoint.files)
    assert set(checkpoint.files) <= {path.name for path in directory.iterdir()}
    assert checkpoint.still_seconds >= 0
    assert checkpoint.written_bytes > 0
    return Kept(checkpoint, said)


async def stopped(client: AgentClient, task: int, heard: Heard, tmp_path: Path) -> None:
    """Let the chain come to its end; it must be right from the first to the last byte."""
    await client.mkdir("stop")
    end = await go_on(client, task, heard)
    assert end.exit_code == 0
    await is_right(client, heard, tmp_path)


async def is_right(client: AgentClient, heard: Heard, tmp_path: Path) -> None:
    assert heard.said == chain(len(heard.said) // LINE)
    await client.get("chain", tmp_path / "chain", limit=1 << 20)
    assert (tmp_path / "chain").read_bytes() == heard.said, "memory and disk are not of one time"
    (tmp_path / "chain").unlink()


@pytest.mark.parametrize("spec", ["booted", "copied"], indirect=True)
async def test_a_job_goes_on_from_exactly_where_it_was_kept(
        driver: Driver, spec: MachineSpec, kept: Path, tmp_path: Path) -> None:
    """From the newest checkpoint, from the one before it, and from one of a continued machine."""
    heard = Heard()
    async with running(driver, spec) as (machine, client), anyio.create_task_group() as group:
        task = await start_chain(client, driver)
        group.start_soon(go_on, client, task, heard)
        await heard.lines(3)
        older = await keep(machine, kept, "1", heard)
        await heard.lines(3)
        newest = await keep(machine, kept, "2", heard)
        await heard.lines(3)
        group.cancel_scope.cancel()
    assert LINE <= len(older.said) < len(newest.said) < len(heard.said)
    assert not spec.directory.exists()

    heard = Heard(newest.said)
    async with running(driver, newest.spec(spec, kept)) as (machine, client):
        async with anyio.create_task_group() as group:
            group.start_soon(go_on, client, task, heard)
            await heard.lines(2)
            later = await keep(machine, kept, "3", heard)
            await heard.lines(2)
            group.cancel_scope.cancel()
        await stopped(client, task, heard, tmp_path)
    for each in (older, later):
        heard = Heard(each.said)
        async with running(driver, each.spec(spec, kept)) as (machine, client):
            await stopped(client, task, heard, tmp_path)


SUCCESSOR = """
import sys
from pathlib import Path
import anyio
from tests.contract.test_checkpoint_contract import *

async def main(name, directory, checkpoints, state, task, said):
    spec = MachineSpec("m2", Path(directory), None, **json.loads(sys.argv[7]),
                       saved=Saved(Path(checkpoints), json.loads(state)))
    heard = Heard(said.encode())
    async with running(driver_of(name), spec) as (machine, client):
        await stopped(client, int(task), heard, Path(checkpoints))
    print(heard.said.decode(), end="")

anyio.run(main, *sys.argv[1:7])
"""


async def test_another_process_goes_on_when_the_owner_is_gone(
        driver: Driver, spec: MachineSpec, kept: Path) -> None:
    heard = Heard()
    async with running(driver, spec) as (machine, client), anyio.create_task_group() as group:
        task = await start_chain(client, driver)
        group.start_soon(go_on, client, task, heard)
        await heard.lines(2)
        known = await keep(machine, kept, "1", heard)
        group.cancel_scope.cancel()
    again = known.spec(spec, kept)
    assert again.saved is not None
    command = [sys.executable, "-c", textwrap.dedent(SUCCESSOR), driver.name, str(again.directory),
               str(kept), json.dumps(again.saved.state), str(task), known.said.decode(),
               json.dumps({name: getattr(spec, name) for name in (
                   "memory_mb", "accelerator", "network", "display")})]
    answer = await anyio.to_thread.run_sync(partial(
        subprocess.run, command, check=True, capture_output=True, timeout=PATIENCE,
        cwd=Path(__file__).parents[2]))
    assert answer.stdout.startswith(known.said)
    assert answer.stdout == chain(len(answer.stdout) // LINE)


async def test_a_suspended_machine_stays_suspended_and_is_kept_all_the_same(
        driver: Driver, spec: MachineSpec, kept: Path, tmp_path: Path) -> None:
    heard = Heard()
    async with running(driver, spec) as (machine, client), anyio.create_task_group() as group:
        task = await start_chain(client, driver)
        group.start_soon(go_on, client, task, heard)
        await heard.lines(1)
        await machine.suspend()
        known = await keep(machine, kept, "1", heard)
        assert machine.get_status() is Status.SUSPENDED
        with anyio.move_on_after(0.3) as waited:
            await client.ping()
        assert waited.cancelled_caught, "it answers"
        await keep(machine, kept, "2", heard)
        await machine.resume()
        await heard.lines(2)
        group.cancel_scope.cancel()
    heard = Heard(known.said)
    async with running(driver, known.spec(spec, kept)) as (machine, client):
        assert machine.get_status() is Status.RUNNING
        await stopped(client, task, heard, tmp_path)


async def test_ten_checkpoints_in_a_row_are_all_good(driver: Driver, spec: MachineSpec, kept: Path,
                                                     tmp_path: Path) -> None:
    heard = Heard()
    async with running(driver, spec) as (machine, client):
        async with anyio.create_task_group() as group:
            task = await start_chain(client, driver)
            group.start_soon(go_on, client, task, heard)
            all_kept = [await keep(machine, kept, f"{number:03}", heard) for number in range(10)]
            group.cancel_scope.cancel()
        await stopped(client, task, heard, tmp_path)
    for number in (9, 4):
        heard = Heard(all_kept[number].said)
        async with running(driver, all_kept[number].spec(spec, kept)) as (machine, client):
            await stopped(client, task, heard, tmp_path)


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """This process can write no file beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail() -> None:
    raise ZeroDivisionError


async def test_a_checkpoint_that_fails_harms_neither_the_machine_nor_those_before(
        driver: Driver, spec: MachineSpec, kept: Path, tmp_path: Path) -> None:
    heard = Heard()
    (tmp_path / "large").write_bytes(os.urandom(2 << 20))
    async with running(driver, spec) as (machine, client), anyio.create_task_group() as group:
        task = await start_chain(client, driver)
        group.start_soon(go_on, client, task, heard)
        before = await keep(machine, kept, "1", heard)
        files = {path.name: path.stat().st_size for path in kept.iterdir()}
        await client.put(tmp_path / "large", "large")
        if driver.name != "virtualbox":  # there another process writes them
            with small_files(1 << 20), pytest.raises((CheckpointFailed, HostDiskFull)):
                await machine.checkpoint(kept, "2", lambda: None)
        assert {path.name: path.stat().st_size for path in kept.iterdir()} == files
        await heard.lines(1)
        with pytest.raises(CheckpointFailed):  # its name is taken
            await machine.checkpoint(kept, "1", lambda: None)
        assert {path.name: path.stat().st_size for path in kept.iterdir()} == files
        with pytest.raises(CheckpointFailed):
            await machine.checkpoint(kept / "nowhere", "2", lambda: None)
        await heard.lines(1)
        with pytest.raises(ZeroDivisionError):
            await machine.checkpoint(kept, "2", fail)
        assert {path.name: path.stat().st_size for path in kept.iterdir()} == files
        await heard.lines(1)
        after = await keep(machine, kept, "2", heard)
        group.cancel_scope.cancel()
    for each in (before, after):
        heard = Heard(each.said)
        async with running(driver, each.spec(spec, kept)) as (machine, client):
            await stopped(client, task, heard, tmp_path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """A bit of each page: one alone may be in a page that is not needed any more."""
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 2 % 4096, len(content), 4096):
        content[at] ^= 0x10
    path.write_bytes(content)


async def is_unusable(driver: Driver, spec: MachineSpec,
                      kind: type[VmjobError] = CheckpointUnusable) -> None:
    """Such a machine is refused when it is made, or when it is started."""
    spec.directory.mkdir()
    made: list[Machine] = []

    async def use() -> None:
        made.append(await driver.create(spec))
        await made[0].start()

    try:
        with pytest.raises(kind):
            await use()
    finally:
        for machine in made:
            await machine.destroy()
            assert not spec.directory.exists()
        shutil.rmtree(spec.directory, ignore_errors=True)


async def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(
        driver: Driver, spec: MachineSpec, kept: Path, tmp_path: Path) -> None:
    async with running(driver, spec) as (machine, client):
        task = await client.start(["true"])
        await client.follow(task, Heard().take)
        known = await keep(machine, kept, "1")
    damaged = tmp_path / "damaged"
    before = open_descriptors()
    for name in known.checkpoint.files:
        own = name.partition(".")[0] == "1"  # the others are images and templates, sealed elsewhere
        for damage in (cut, flip, Path.unlink) if own and not name.endswith(".disk") else (
                Path.unlink,):
            damaged.mkdir()
            for each in known.checkpoint.files:
                os.link(kept / each, damaged / each)
            (damaged / name).unlink()
            shutil.copyfile(kept / name, damaged / name)
            damage(damaged / name)
            await is_unusable(driver, known.spec(spec, damaged))
            shutil.rmtree(damaged)
    assert psutil.Process().children(recursive=True) == []
    assert open_descriptors() <= before
    async with running(driver, known.spec(spec, kept)) as (machine, client):
        await client.ping()


async def test_a_state_that_is_not_a_checkpoints_is_refused(driver: Driver, spec: MachineSpec,
                                                            kept: Path) -> None:
    async with running(driver, spec) as (machine, client):
        good = (await keep(machine, kept, "1")).checkpoint.state
    kinds: dict[int, type[VmjobError]] = {1: CheckpointNewer}
    for number, bad in enumerate((
            {}, {**good, "format": 1000, "layers": "new"}, {**good, "format": "1"},
            json.loads(json.dumps(good).replace('"1.', '"../1.')))):
        await is_unusable(driver, replace(
            spec, id="m2", directory=spec.directory.with_name("m2"), boot=None, template=None,
            saved=Saved(kept, bad)), kinds.get(number, CheckpointUnusable))


async def test_a_machine_that_does_not_run_is_not_kept(driver: Driver, spec: MachineSpec,
                                                       kept: Path) -> None:
    machine = await driver.create(spec)
    for end in (machine.stop, machine.destroy):
        with pytest.raises(WrongState):
            await machine.checkpoint(kept, "1", lambda: None)
        await end()
    with pytest.raises(WrongState):
        await machine.checkpoint(kept, "1", lambda: None)
    assert list(kept.iterdir()) == []
