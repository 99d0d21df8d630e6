"""Templates: made once, never stale, never damaged, never removed in use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import open_descriptors
from vmjob.engine import freezing, templates
from vmjob.engine.session import Session, open_session
from vmjob.engine.templates import Template, TemplateStore, key_of
from vmjob.errors import HypervisorRefused, UsageError
from vmjob.guest.client import AgentClient
from vmjob.home import Home
from vmjob.machine.contract import BootParts, MachineSpec
from vmjob.machine.fake import FakeDriver, Faults
from vmjob.machine.fake.driver import FakeMachine

pytestmark = pytest.mark.anyio


@pytest.fixture
def shape(home: Home) -> MachineSpec:
    return MachineSpec(id="", directory=home.root, boot=None, memory_mb=1)


@pytest.fixture
def store(home: Home) -> TemplateStore:
    return TemplateStore(home)


async def use(home: Home, shape: MachineSpec, driver: FakeDriver | None = None) -> Session:
    """Start a machine, run a command in it, end it."""
    async with open_session(home, driver or FakeDriver(), shape) as session:
        task = await session.client.start(["true"])
        assert (await session.client.follow(task, ignore)).exit_code == 0
        return session


async def ignore(stream: str, data: bytes) -> None: ...


def only(store: TemplateStore) -> Template:
    (found,) = store.all()
    return found


async def test_the_second_machine_is_a_copy_of_what_the_first_left(
        home: Home, shape: MachineSpec, store: TemplateStore) -> None:
    first = await use(home, shape)
    made = only(store).manifest.created
    second = await use(home, shape)
    assert first.machine.spec.template == second.machine.spec.template == only(store).directory
    assert only(store).manifest.created == made
    assert (first.cold_because, second.cold_because) == (None, None)


async def test_a_cold_start_makes_and_uses_none(home: Home, shape: MachineSpec,
                                                store: TemplateStore) -> None:
    async with open_session(home, FakeDriver(), shape, cold=True) as session:
        assert session.machine.spec.template is None
        assert session.cold_because is None
    assert store.all() == []


async def test_many_who_ask_at_once_make_one(home: Home, shape: MachineSpec, store: TemplateStore,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = freezing._make, []

    async def counted(*args: object) -> None:
        made.append(args)
        await real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(freezing, "_make", counted)
    sessions = await asyncio.gather(*(use(home, shape) for _ in range(10)))
    assert len(made) == 1
    assert {each.machine.spec.template for each in sessions} == {only(store).directory}


async def test_more_who_wait_than_there_are_threads_do_not_hold_each_other_up(
        home: Home, shape: MachineSpec) -> None:
    taken = await asyncio.gather(*(freezing.lease(home, FakeDriver(), shape, lambda phase: None)
                                   for _ in range(60)))
    for lease in taken:
        lease.close()


async def test_a_cancelled_wait_for_a_template_leaves_no_lock_and_no_descriptor(
        home: Home, shape: MachineSpec, store: TemplateStore) -> None:
    await use(home, shape)
    before = open_descriptors()
    for turns in range(12):
        waiting = asyncio.ensure_future(
            freezing.lease(home, FakeDriver(), shape, lambda phase: None))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await waiting).close()
    assert open_descriptors() == before
    assert store.remove(only(store).key)


async def test_templates_of_another_version_are_found_and_removed(
        home: Home, shape: MachineSpec, store: TemplateStore) -> None:
    await use(home, shape)
    (only(store).directory / "template.json").write_text("{}")
    assert len(store.unreadable()) == 1
    await use(home, replace(shape, memory_mb=2))
    assert store.unreadable() == []


PARTS = BootParts("digest", *(Path(name) for name in ("/kernel", "/initrd", "/root", "/scratch")))


@pytest.mark.parametrize("change", [
    {"memory_mb": 2}, {"cpus": 2}, {"network": "nat"}, {"accelerator": "kvm"},
    {"cpu_model": "baseline"}, {"disk_gb": 9}, {"boot": replace(PARTS, digest="other")}])
def test_whatever_a_frozen_machine_depends_on_is_in_its_key(shape: MachineSpec,
                                                            change: dict[str, object]) -> None:
    base = replace(shape, boot=PARTS)
    assert key_of(FakeDriver(), base)[0] != key_of(FakeDriver(), replace(base, **change))[0]
    other = FakeDriver(Faults(version="other"))
    assert key_of(FakeDriver(), base)[0] != key_of(other, base)[0]


@pytest.mark.parametrize("change", [
    {"id": "x"}, {"directory": Path("/elsewhere")}, {"disk_gb": 1000}, {"labels": {"a": "b"}},
    {"boot": replace(PARTS, root=Path("/moved"))}])
def test_what_is_applied_after_the_start_is_not_in_the_key(shape: MachineSpec,
                                                           change: dict[str, object]) -> None:
    base = replace(shape, boot=PARTS)
    assert key_of(FakeDriver(), base)[0] == key_of(FakeDriver(), replace(base, **change))[0]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "memory gone": lambda place: (place / "memory").unlink(),
    "memory cut": lambda place: os.truncate(place / "memory", 3),
    "memory flipped": lambda place: flip(place / "memory"),
    "memory a link": lambda place: ((place / "memory").rename(place / "m"),
                                    (place / "memory").symlink_to("m")),
    "manifest gone": lambda place: (place / "template.json").unlink(),
    "manifest flipped": lambda place: flip(place / "template.json"),
    "manifest empty": lambda place: (place / "template.json").write_text(""),
    "manifest of another format": lambda place: (place / "template.json").write_text(
        (place / "template.json").read_text().replace('"format":1', '"format":99')),
    "lock gone": lambda place: (place / "lock").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_template_is_made_anew(home: Home, shape: MachineSpec,
                                               store: TemplateStore, damage: str) -> None:
    await use(home, shape)
    before = only(store)
    DAMAGES[damage](before.directory)
    after = await use(home, shape)
    assert after.cold_because is None
    assert only(store).manifest.created > before.manifest.created
    assert (only(store).directory / "memory").read_text() == "a frozen fake machine\n"


async def test_a_template_that_is_touched_while_it_is_used_is_not_trusted(
        home: Home, shape: MachineSpec, store: TemplateStore,
        monkeypatch: pytest.MonkeyPatch) -> None:
    await use(home, shape)
    real = FakeMachine.start

    async def touched(machine: FakeMachine) -> object:
        if machine.spec.template:
            flip(machine.spec.template / "memory")
        return await real(machine)

    monkeypatch.setattr(FakeMachine, "start", touched)
    session = await use(home, shape)
    assert session.machine.spec.template is None
    assert "is damaged: memory" in str(session.cold_because)
    assert store.all() == []


async def test_a_template_with_another_link_to_its_files_is_used_as_before(
        home: Home, shape: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    await use(home, shape)
    real = FakeMachine.start

    async def linked(machine: FakeMachine) -> object:
        if machine.spec.template:  # as a checkpoint of another copy does it
            (home.root / "link").hardlink_to(machine.spec.template / "memory")
        return await real(machine)

    monkeypatch.setattr(FakeMachine, "start", linked)
    session = await use(home, shape)
    assert session.machine.spec.template is not None


async def test_a_template_whose_copies_do_not_start_is_dropped_and_the_machine_boots(
        home: Home, shape: MachineSpec, store: TemplateStore,
        monkeypatch: pytest.MonkeyPatch) -> None:
    await use(home, shape)

    async def deaf(driver: FakeDriver, machine: FakeMachine, *, grown: bool) -> object:
        raise templates.TemplateUnusable("QEMU did not start: bad state")

    monkeypatch.setattr("vmjob.engine.session.thaw", deaf)
    session = await use(home, shape)
    assert session.cold_because == "QEMU did not start: bad state"
    assert store.all() == []
    assert list(home.machines.iterdir()) == []


async def test_a_machine_that_cannot_be_frozen_boots_and_says_why(
        home: Home, shape: MachineSpec, store: TemplateStore) -> None:
    session = await use(home, shape, FakeDriver(Faults(freeze="the disk is full")))
    assert session.cold_because == "the disk is full"
    assert store.all() == []


@pytest.mark.parametrize(("failures", "frozen"), [(1, True), (2, True), (3, False)])
async def test_a_machine_that_its_hypervisor_fails_to_freeze_is_made_anew(
        home: Home, shape: MachineSpec, store: TemplateStore, monkeypatch: pytest.MonkeyPatch,
        failures: int, frozen: bool) -> None:
    real, left = FakeMachine.freeze, [HypervisorRefused("no words")] * failures

    async def freeze(machine: FakeMachine) -> list[str]:
        if left:
            raise left.pop()
        return await real(machine)

    monkeypatch.setattr(FakeMachine, "freeze", freeze)
    session = await use(home, shape)
    assert left == []
    assert len(store.all()) == int(frozen)
    assert session.cold_because == (
        None if frozen else "a machine could not be frozen: no words")
    assert list(home.machines.iterdir()) == []


async def test_without_room_for_a_template_none_is_begun(home: Home, shape: MachineSpec,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezing, "room_for", lambda home, shape: False)
    session = await use(home, shape)
    assert session.cold_because is not None
    assert "no room" in session.cold_because


async def test_a_clock_of_the_host_that_was_moved_changes_nothing(
        home: Home, shape: MachineSpec, store: TemplateStore,
        monkeypatch: pytest.MonkeyPatch) -> None:
    await use(home, shape)
    made = only(store).manifest.created
    for moved in (-1e8, 1e8):
        monkeypatch.setattr(templates.time, "time", lambda moved=moved: made + moved)
        session = await use(home, shape)
        assert session.cold_because is None
        assert only(store).manifest.created == made


# -- eviction ------------------------------------------------------------------------------------


async def test_the_longest_unused_is_evicted_first(home: Home, shape: MachineSpec,
                                                   store: TemplateStore,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [replace(shape, memory_mb=memory) for memory in (1, 2, 3)]
    for each in shapes[:2]:
        await use(home, each)
    size = only_size(store)
    keys = [key_of(FakeDriver(), each)[0] for each in shapes]
    os.utime(home.templates / keys[0] / "lock", (2e9, 2e9))
    os.utime(home.templates / keys[1] / "lock", (1e9, 1e9))
    monkeypatch.setattr(templates, "cap", lambda: 2 * size)
    await use(home, shapes[2])
    assert {each.key for each in store.all()} == {keys[0], keys[2]}


def only_size(store: TemplateStore) -> int:
    return max(each.disk_bytes for each in store.all())


async def test_one_in_use_is_never_removed(home: Home, shape: MachineSpec, store: TemplateStore,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "cap", lambda: 0)
    async with open_session(home, FakeDriver(), shape) as session:
        used = only(store)
        assert not store.remove(used.key)
        await use(home, replace(shape, memory_mb=2))
        assert used.key in {each.key for each in store.all()}
        assert session.machine.spec.template == used.directory
    assert store.remove(used.key)
    assert not used.directory.exists()


async def test_a_start_that_meets_a_removal_makes_a_new_one(home: Home, shape: MachineSpec,
                                                            store: TemplateStore) -> None:
    await use(home, shape)

    async def remove_again_and_again() -> None:
        while True:
            store.remove(only_key)
            await asyncio.sleep(0)

    only_key = only(store).key
    remover = asyncio.ensure_future(remove_again_and_again())
    try:
        for _ in range(5):
            await use(home, shape)
    finally:
        remover.cancel()


def test_the_cap_is_a_number_of_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMJOB_TEMPLATES_MB", "5")
    assert templates.cap() == 5 << 20
    monkeypatch.setenv("VMJOB_TEMPLATES_MB", "lots")
    with pytest.raises(UsageError):
        templates.cap()


async def test_leases_leave_no_descriptor_open(home: Home, shape: MachineSpec) -> None:
    await use(home, shape)
    before = open_descriptors()
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(open_session(home, FakeDriver(), shape))
    assert open_descriptors() == before


# -- power ---------------------------------------------------------------------------------------

KILLED = """
    import asyncio, os, signal, sys
    from pathlib import Path
    from vmjob.engine import freezing, templates
    from vmjob.engine.session import open_session
    from vmjob.home import Home
    from vmjob.machine.contract import MachineSpec
    from vmjob.machine.fake import FakeDriver

    freezing.QUIET = 0
    left = int(sys.argv[2])

    def step(real):
        def stepped(*args, **more):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)
        return stepped

    for owner, name in ((Path, "mkdir"), (Path, "rename"), (Path, "write_bytes"), (Path, "touch"),
                        (templates.durable, "sync"), (templates, "digest"),
                        (templates, "write_seal"), (os, "utime")):
        setattr(owner, name, step(getattr(owner, name)))

    async def main():
        home = Home(sys.argv[1])
        shape = MachineSpec(id="", directory=home.root, boot=None, memory_mb=1)
        async with open_session(home, FakeDriver(), shape) as session:
            assert session.cold_because is None, session.cold_because

    asyncio.run(main())
    print("done", left)
"""


async def test_a_making_that_is_killed_at_any_step_leaves_nothing_that_is_used(
        home: Home, shape: MachineSpec, store: TemplateStore,
        monkeypatch: pytest.MonkeyPatch) -> None:
    home.machines  # noqa: B018 - so that the steps counted are those of the making
    step = 1
    while True:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(home.root), str(step)],
            capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        for template in store.all():  # what is there is whole
            lease = store.lease(template.key)
            assert lease is not None
            lease.close()
            store.remove(template.key)
        step += 1
    assert step > 15, "the steps of a making were not met"
    monkeypatch.setattr("vmjob.engine.ownership.NEWBORN", -1)  # a minute has passed
    session = await use(home, shape)
    assert session.cold_because is None
    assert list(home.machines.iterdir()) == []
    assert [each.name for each in home.templates.iterdir()] == [only(store).key]


class FastClock:
    """Makes the clocks of so many machines go too fast, as an overloaded computer does."""

    def __init__(self, patch: pytest.MonkeyPatch, wrong: int) -> None:
        self.asked = 0
        ping = AgentClient.ping

        async def lying(client: AgentClient, deadline: float = 60.0) -> dict[str, Any]:
            answer = await ping(client, deadline)
            self.asked += 1
            if self.asked <= 2 * wrong and not self.asked % 2:
                answer["time"] += 60.0
            return answer

        patch.setattr(AgentClient, "ping", lying)


async def test_a_machine_whose_clock_is_wrong_becomes_no_template(
        home: Home, shape: MachineSpec, store: TemplateStore,
        monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FastClock(monkeypatch, wrong=1)
    assert (await use(home, shape)).cold_because is None
    assert clock.asked == 4  # twice for each of two machines
    assert only(store)


async def test_where_no_clock_is_right_machines_boot_and_say_why(
        home: Home, shape: MachineSpec, store: TemplateStore,
        monkeypatch: pytest.MonkeyPatch) -> None:
    FastClock(monkeypatch, wrong=9)
    because = (await use(home, shape)).cold_because
    assert because is not None
    assert "clock" in because
    assert store.all() == []
