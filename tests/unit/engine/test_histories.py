"""Whatever happens to a job, and however often: it ends as if nothing had happened.

Random histories of crashes, faults and checkpoints on simulated machines, each carried to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import open_descriptors
from vmjob.engine.clock import Pace
from vmjob.engine.control import Control
from vmjob.engine.generations import Generation, Generations
from vmjob.engine.record import Record
from vmjob.engine.request import Request, Survival
from vmjob.engine.run import run_job
from vmjob.engine.slot import Asked, Slot, Streams
from vmjob.errors import VmjobError
from vmjob.grid.contract import Quiet
from vmjob.home import Home, remove_tree
from vmjob.host import durable
from vmjob.host.digest import digest
from vmjob.job.model import Job, Task
from vmjob.machine.contract import MachineSpec, Status
from vmjob.machine.fake import SimulatedDriver, SimulatedFaults, SimulatedMachine
from vmjob.machine.fake.programs import hash_chain

#: Steps of a program in a tick; a tick is a turn of the event loop.
STEPS = 4
#: Seconds of run time that a job may take, and for which every suspension seems to last.
TIME_LIMIT = 600.0
SUSPENDED = 1e6
#: Seconds after which a history hangs; more than a checkpoint waits for its turn.
DEADLINE = 120.0
#: Where nothing waits for a disk: a history has thousands of fsyncs, which are not its subject.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
#: What is left of a job.
LEFT = {"job.json", "result.json", "stdout", "stderr", "lock"}
#: What writes a generation, step by step.
DURABLE = ("write", "sync", "replace", "remove")


# -- histories ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """So many ``ticks`` after the event before; ``turns`` of the event loop is how long it takes.

    checkpoint      one is asked for; what follows does not wait for it
    suspend         the job stands still, and goes on
    before_still, after_still, disk_full
                    a checkpoint fails like this
    """

    ticks: int
    what: Literal["checkpoint", "suspend", "before_still", "after_still", "disk_full"]
    turns: int


@dataclass(frozen=True)
class End:
    """How a round ends, so many ``ticks`` after its last event.

    dies            the machine ends
    dies_still      it ends in the midst of a checkpoint
    cancelled       the job is cancelled by asyncio
    left            it is cancelled by the scope around it
    killed          vmjob is gone from one moment to the next
    killed_writing  the same, at a ``step`` of what a checkpoint does to the disk

    ``suspended``: the job is suspended then. ``damage``: which file of the newest generation is
    then spoilt, and how.
    """

    ticks: int
    how: Literal["dies", "dies_still", "cancelled", "left", "killed", "killed_writing"]
    step: int
    suspended: bool
    damage: tuple[int, Literal["flipped", "shorter", "gone"]] | None


@dataclass(frozen=True)
class Round:
    """One process that carries the job; so many machines that it makes first do not start."""

    bad_restores: int
    bad_starts: int
    every: float | None
    events: list[Event]
    end: End


@dataclass(frozen=True)
class Program:
    """A job with what it must write, and how its tasks must end."""

    tasks: tuple[tuple[str, ...], ...]
    stdout: bytes = field(repr=False)
    stderr: bytes = field(repr=False)
    codes: list[int]


def program(*tasks: tuple[str, ...]) -> Program:
    """The undisturbed run, without any machine."""
    out, err, codes = b"", b"", []
    for name, *args in tasks:
        code = 0
        if name == "hash-chain" and args[0] == "many":
            code = 2
            try:
                int(args[0])
            except ValueError as error:
                err += f"{name}: {error}\n".encode()
        elif name == "hash-chain":
            out += hash_chain(int(args[0]), int(args[1]))
        elif name == "count":
            out += b"".join(b"%d\n" % n for n in range(1, int(args[0]) + 1))
        elif name == "fail":
            code = int(args[0])
        codes.append(code)
        if code:
            break
    return Program(tasks, out, err, codes)


chains = st.tuples(st.just("hash-chain"), st.integers(500, 3000).map(str),
                   st.integers(3, 40).map(str))
short_chains = st.tuples(st.just("hash-chain"), st.integers(50, 600).map(str),
                         st.integers(3, 40).map(str))
counts = st.tuples(st.just("count"), st.integers(1, 300).map(str))
last_tasks = st.sampled_from([("fail", "3"), ("true",), ("hash-chain", "many", "1")])
programs = st.one_of(
    st.builds(program, chains),
    st.builds(program, counts, chains),
    st.builds(program, counts, chains, counts, last_tasks),
    st.builds(program, short_chains, short_chains, short_chains, chains, last_tasks),
    st.builds(program, short_chains, last_tasks, counts))

events = st.builds(
    Event, ticks=st.integers(0, 120), turns=st.integers(0, 30),
    what=st.sampled_from(["checkpoint", "checkpoint", "checkpoint", "suspend", "suspend",
                          "before_still", "after_still", "disk_full"]))
ends = st.builds(
    End, ticks=st.integers(0, 120), step=st.integers(0, 12), suspended=st.booleans(),
    how=st.sampled_from(["dies", "dies_still", "cancelled", "left", "killed", "killed_writing"]),
    damage=st.none() | st.tuples(st.integers(0, 9), st.sampled_from(["flipped", "shorter",
                                                                     "gone"])))
rarely = st.sampled_from([0, 0, 0, 0, 0, 1, 2])
rounds = st.builds(
    Round, bad_restores=rarely, bad_starts=rarely, every=st.sampled_from([None, None, 0.005]),
    events=st.lists(events, max_size=6), end=ends)


# -- what a history is carried by --------------------------------------------------------------


class Clock:
    """`time`, on a computer where every suspension takes very long."""

    def __init__(self) -> None:
        self.gone = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.gone


class Driver(SimulatedDriver):
    """Remembers its machines; the first of them fail as they are told to."""

    def __init__(self, bad_restores: int, bad_starts: int) -> None:
        super().__init__(tick=0, steps=STEPS)
        self.machines: list[SimulatedMachine] = []
        self.bad_restores = bad_restores
        self.bad_starts = bad_starts

    async def create(self, spec: MachineSpec) -> SimulatedMachine:
        self.faults = SimulatedFaults()
        if spec.saved is not None and self.bad_restores:
            self.bad_restores -= 1
            self.faults = SimulatedFaults(restore="no good")
        elif self.bad_starts:
            self.bad_starts -= 1
            self.faults = SimulatedFaults(start="no room")
        self.machines.append(await super().create(spec))
        return self.machines[-1]


class Power:
    """Keeps a copy of a slot as it was at one moment of its life."""

    def __init__(self, root: Path, copy: Path, patch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._copy = copy
        self._writing = threading.RLock()
        self._steps: int | None = None
        self.cut = False
        for name in DURABLE:
            patch.setattr(durable, name, self._counted(getattr(durable, name)))
        patch.setattr(Generations, "publish", self._alone(Generations.publish))
        patch.setattr(Streams, "sync", self._alone(Streams.sync))

    def cut_now(self) -> None:
        """What is there now is what will be found; nobody is writing a generation."""
        with self._writing:
            self._cut()

    def cut_after(self, steps: int) -> None:
        """The same, after so many steps from now that change the disk."""
        self._steps = steps

    def restore(self) -> bool:
        """What was there when the power was cut is there again; false when it was not cut."""
        self._steps = None
        if not self.cut:
            return False
        self.cut = False
        remove_tree(self._root)
        self._copy.rename(self._root)
        (self._root / "machine").mkdir()
        (self._root / "machine" / "disk").write_bytes(b"half a machine")
        return True

    def _cut(self) -> None:
        if not self.cut:
            self.cut = True
            shutil.copytree(self._root, self._copy, ignore=_special)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            if self._steps is not None:
                self._steps -= 1
                if self._steps < 0:
                    self._steps = None
                    self._cut()
            return function(*args)

        return counted

    def _alone(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def alone(*args: Any) -> Any:
            with self._writing:
                return function(*args)

        return alone


def _special(directory: str, names: list[str]) -> list[str]:
    """The machine, which has pipes."""
    return [name for name in names if name == "machine" or not (
        stat.S_ISREG(mode := Path(directory, name).lstat().st_mode) or stat.S_ISDIR(mode))]


class Carrier:
    """Carries one job through its history."""

    def __init__(self, home: Home, root: Path, program: Program, clock: Clock,
                 power: Power) -> None:
        self.home = home
        self.root = root
        self.program = program
        self.clock = clock
        self.power = power
        self.job = Job(tuple(Task(argv) for argv in program.tasks), memory_mb=128,
                       time_limit=TIME_LIMIT)
        self.shape = MachineSpec(id="", directory=home.root, boot=None, memory_mb=128)
        with Slot.claim(root) as slot:
            slot.begin(Asked(self.job))

    async def whole(self, history: list[Round]) -> Record:
        """All of a history, and then undisturbed to the end."""
        for each in history:
            record = await self.round(each)
            if self.power.restore():
                record = None  # whatever that process was about to say
            done = self.result()
            if done is not None:
                return done
            assert record is None or record.error is not None, record
            if each.end.damage is not None:
                self.damage(*each.end.damage)
        record = await self.round(Round(0, 0, None, [], End(0, "left", 0, False, None)),
                                  disturbed=False)
        assert record is not None
        assert self.result() is not None
        return record

    def result(self) -> Record | None:
        with Slot.claim(self.root) as slot:
            return slot.result()

    async def round(self, this: Round, *, disturbed: bool = True) -> Record | None:
        """One process's part; the record that it came to, unless it was cancelled."""
        good = self.good()
        driver = Driver(this.bad_restores, this.bad_starts)
        with Slot.claim(self.root) as slot:
            control, scope = Control(), anyio.CancelScope()
            records: list[Record] = []

            async def run() -> None:
                with scope:
                    records.append(await run_job(self.home, Request(
                        slot.asked().job, driver, self.shape, {},
                        survival=Survival(slot, Pace(this.every)), control=control), Quiet()))

            task = asyncio.ensure_future(run())
            disturbance = Disturbance(self, driver, control, scope, task)
            try:
                if disturbed:
                    await disturbance.all_of(this)
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            finally:
                await disturbance.over()
            known = slot.generations.listed() if slot.generations.directory.exists() else []
        self.began_where_it_must(this, driver, good)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert {machine.get_status() for machine in driver.machines} <= {Status.DESTROYED}
        record = records[0] if records else None
        made = [each.number for each in disturbance.made]
        assert made == sorted(set(made))
        if record is None or record.error is not None:  # else they are gone
            assert [each.number for each in known[:1]] >= made[-1:]
            assert min(2, len(made)) <= len(known) <= 2
        if record is not None and record.error is not None:
            assert record.error["retryable"], record.error
            assert record.error["code"] in disturbance.may_fail(this), record.error
            assert [end.exit_code for end in record.tasks] == self.program.codes[
                :len(record.tasks)]
        return record

    def good(self) -> list[Generation]:
        """The generations whose files are what they were, newest first."""
        found = Generations(self.root / "checkpoints")
        return [each for each in found.listed() if all(
            (path := found.directory / name).exists() and digest(path) == file.sha256
            for name, file in each.files.items())]

    def began_where_it_must(self, this: Round, driver: Driver, good: list[Generation]) -> None:
        """From each good generation that is there, until one starts, then from the beginning."""
        asked = [machine.spec.saved and machine.spec.saved.state for machine in driver.machines]
        tries: list[Any] = [*(each.state for each in good), None]
        failing = this.bad_restores + this.bad_starts
        if this.bad_restores > len(good):
            failing = len(good) + this.bad_starts
        expected = tries[:failing + 1]
        # It may have been cancelled before.
        assert asked == expected[:len(asked)]
        if not this.bad_starts and asked:
            assert asked == expected or len(asked) < len(expected)

    def damage(self, which: int, how: str) -> None:
        """Spoil a file of the newest generation."""
        found = Generations(self.root / "checkpoints")
        for newest in found.listed()[:1]:
            names = [f"{newest.number:06}.json", *sorted(newest.files)]
            path = found.directory / names[which % len(names)]
            content = bytearray(path.read_bytes()) if path.exists() else bytearray()
            if how == "gone" or not content:
                path.unlink(missing_ok=True)
            elif how == "shorter":
                path.write_bytes(content[:-1])
            else:
                content[len(content) // 2] ^= 1
                path.write_bytes(content)
                # A clock tick after it was sealed; the kernel's are 4 ms apart.
                os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


class Disturbance:
    """What happens to one process that carries the job."""

    def __init__(self, carrier: Carrier, driver: Driver, control: Control,
                 scope: anyio.CancelScope, task: asyncio.Task[None]) -> None:
        self._carrier = carrier
        self._driver = driver
        self._control = control
        self._scope = scope
        self._task = task
        self._asked: list[asyncio.Task[None]] = []
        self._scopes: list[anyio.CancelScope] = []
        #: The generations that were made because somebody asked for them.
        self.made: list[Generation] = []

    async def all_of(self, this: Round) -> None:
        for event in this.events:
            await self._ticks(event.ticks)
            await getattr(self, f"_{event.what}")(event.turns)
        await self._ticks(this.end.ticks)
        if this.end.suspended:
            await self._stand_still()
        await self._end(this.end)

    async def over(self) -> None:
        """Everything that was asked for has been answered, or is not needed any more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        for scope in self._scopes:
            scope.cancel()
        for each in self._asked:
            await each

    def may_fail(self, this: Round) -> set[str]:
        codes = {"machine-start-failed"} if this.bad_starts else set()
        return codes | ({"machine-died"} if this.end.how.startswith("dies") else set())

    async def _ticks(self, count: int) -> None:
        """So many ticks pass, or the job ends. Where there is no machine, nothing else happens."""
        wanted: int | None = None
        while not self._task.done():
            machine = self._machine()
            if machine is not None:
                wanted = machine.ticks + count if wanted is None else wanted
                if machine.ticks >= wanted:
                    return
            await asyncio.sleep(0)

    def _machine(self) -> SimulatedMachine | None:
        """The machine, when it has begun to carry the job's tasks."""
        for machine in self._driver.machines[-1:]:
            # One that dies while it is restored is a bad checkpoint, which is another story.
            if machine.get_status() in (Status.RUNNING, Status.SUSPENDED) and machine.ticks \
                    and self._control._parts is not None:
                return machine
        return None

    def _answering(self) -> anyio.CancelScope:
        self._scopes.append(anyio.CancelScope())
        return self._scopes[-1]

    async def _checkpoint(self, turns: int) -> None:
        async def ask() -> None:
            # Errors: the job has ended meanwhile, or will.
            with self._answering(), contextlib.suppress(VmjobError):
                generation = await self._control.checkpoint(DEADLINE)
                if generation is not None:
                    self.made.append(generation)

        self._asked.append(asyncio.ensure_future(ask()))
        await _turns(turns)

    async def _stand_still(self) -> bool:
        with contextlib.suppress(VmjobError):
            if await self._control.suspend():
                self._carrier.clock.gone += SUSPENDED
                return True
        await self._go_on()  # or it stands still as soon as its tasks begin
        return False

    async def _go_on(self) -> None:
        with contextlib.suppress(VmjobError):
            await self._control.resume()

    async def _suspend(self, turns: int) -> None:
        if await self._stand_still():
            await _turns(turns)
            await self._go_on()

    async def _before_still(self, turns: int) -> None:
        await self._failing(turns, before_still="before")

    async def _after_still(self, turns: int) -> None:
        await self._failing(turns, after_still="after")

    async def _disk_full(self, turns: int) -> None:
        await self._failing(turns, disk_full="full")

    async def _failing(self, turns: int, **faults: Any) -> None:
        machine = self._machine()
        if machine is not None:
            machine.faults = SimulatedFaults(**faults)
            await self._checkpoint(turns)
            await self._until(lambda: self._asked[-1].done())
            machine.faults = SimulatedFaults()

    async def _end(self, end: End) -> None:
        machine = self._machine()
        if machine is None:
            self._task.cancel()
        elif end.how == "dies":
            machine.faults = SimulatedFaults(dies_at_tick=machine.ticks)
            await self._go_on()
        elif end.how == "dies_still":
            machine.faults = SimulatedFaults(dies_while_still=True)
            await self._go_on()
            await self._checkpoint(0)
        elif end.how == "cancelled":
            self._task.cancel()
        elif end.how == "left":
            self._scope.cancel()
        elif end.how == "killed":
            self._carrier.power.cut_now()
            self._task.cancel()
        elif end.how == "killed_writing":
            await self._go_on()
            self._carrier.power.cut_after(end.step)
            await self._checkpoint(0)
            await self._until(lambda: self._carrier.power.cut or self._asked[-1].done())
            if not self._carrier.power.cut:
                self._carrier.power.cut_now()
            self._scope.cancel()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self._task.done():  # noqa: ASYNC110 - as fast as it goes
            await asyncio.sleep(0)


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def carry(home: Home, program: Program, history: list[Round]) -> None:
    """Carry a job through a history; it is as it must be afterwards."""
    before = open_descriptors()
    with (tempfile.TemporaryDirectory(dir=MEMORY) as directory,
          pytest.MonkeyPatch.context() as patch):
        root, clock = Path(directory) / "slot", Clock()
        patch.setattr("vmjob.engine.clock.time", clock)
        # While the start of a command waits for its end, there are no checkpoints.
        patch.setattr("vmjob.engine.work.SHORT_COMMAND", 0.0)
        power = Power(root, Path(directory) / "copy", patch)
        carrier = Carrier(home, root, program, clock, power)

        async def bounded(work: Awaitable[Record]) -> Record:
            async with asyncio.timeout(DEADLINE):
                return await work

        record = asyncio.run(bounded(carrier.whole(history)))
        assert (root / "stdout").read_bytes() == program.stdout
        assert (root / "stderr").read_bytes() == program.stderr
        assert {path.name for path in root.iterdir()} == LEFT
    assert record.error is None
    assert [end.exit_code for end in record.tasks] == program.codes
    assert all(end.ended_by is None for end in record.tasks)
    assert record.exit_code == program.codes[-1]
    assert record.status == ("failed" if record.exit_code else "succeeded")
    assert (record.stdout_bytes, record.stderr_bytes) == (len(program.stdout), len(program.stderr))
    assert record.discarded_bytes == 0
    assert list(home.machines.iterdir()) == []
    assert open_descriptors() <= before
    assert not [each for each in threading.enumerate() if "simulated" in each.name]


@pytest.fixture(scope="module")
def one_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@settings(max_examples=80, deadline=None, print_blob=True,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture,
                                 HealthCheck.data_too_large])
@given(program=programs, history=st.lists(rounds, min_size=1, max_size=6))
@example(program(("hash-chain", "3000", "7")), [Round(  # one is asked for, then the job suspended
    0, 0, None, [Event(20, "checkpoint", 0), Event(0, "suspend", 30)],
    End(100, "cancelled", 0, False, None))])
@example(program(("count", "200"), ("hash-chain", "1500", "3")), [
    Round(0, 0, None, [Event(20, "checkpoint", 9), Event(60, "checkpoint", 20)],
          End(100, "cancelled", 0, False, None)),
    Round(1, 0, None, [], End(30, "killed", 0, False, None)),  # it went back to the older one
    Round(0, 0, None, [], End(5, "killed", 0, False, None))])
def test_a_job_ends_as_if_nothing_had_happened(one_home: Home, program: Program,
                                               history: list[Round]) -> None:
    carry(one_home, program, history)
