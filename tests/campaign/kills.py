"""Kills of real jobs at chosen steps, and what became of them: `Field` runs them one by one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from tests.campaign.victim import Plan
from vmjob.home import Home, remove_tree

__all__ = ["Case", "Field", "Outcome", "Strike", "campaign"]

SCRIPT = Path(__file__).with_name("job.py")
ROOT = Path(__file__).parents[2]
#: Seconds after which a run is taken to hang.
HANGS = 180.0
#: Seconds that processes may take to go when their owner was killed.
GONE_DEADLINE = 10.0
#: What a slot holds when its job has ended.
AT_THE_END = {"job.json", "stdin", "stdout", "stderr", "result.json", "lock"}
#: How often each way of dying is chosen.
MODES = {"self": 6, "both": 3, "hypervisor": 3, "SIGTERM": 2, "SIGSTOP": 1, "SIGTSTP": 1}
#: Most strikes at one job, and how likely a further one is.
STRIKES = 4
AGAIN = 0.4
#: Undisturbed attempts in which a job must have ended.
ATTEMPTS = 3


@dataclass(frozen=True)
class Strike:
    """Where and how a run is struck; ``kind``, ``at`` and the rest as in `Plan`."""

    kind: str
    at: int
    mode: str
    named: bool = False
    ended_at: str | None = None
    delay: float = 0.0


@dataclass
class Outcome:
    """One run: its exit code (negative: the signal), what it said, what it told of itself."""

    code: int
    stderr: str
    events: list[dict[str, Any]]
    seconds: float
    strike: Strike | None
    stopped: bool = False
    hung: bool = False

    def told(self, what: str) -> list[Any]:
        return [event[what] for event in self.events if what in event]

    @property
    def reached(self) -> bool:
        return bool(self.told("reached"))


@dataclass
class Case:
    """One job from its first run to its end."""

    runs: list[Outcome] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Field:
    """A directory with a home, in which one job at a time is run and struck.

    ``hashes``, and what is in ``machine``: as in `Plan`. ``hangs``: seconds after which a run is
    taken to hang.
    """

    def __init__(self, place: Path, home: Home, *, hashes: int = 6000, hangs: float = HANGS,
                 **machine: Any) -> None:
        self.place = place
        self._machine = {"hashes": hashes, **machine}
        self._hangs = hangs
        self.home = home
        self.slot = place / "slot"
        self.output = place / "out" / "result"
        self.stdin = place / "input"
        self.stdin.write_bytes(b"".join(hashlib.sha512(b"%d" % n).hexdigest().encode() * 20 + b"\n"
                                        for n in range(60)))
        self.stdout, self.stderr, self.result = self._native()

    def _native(self) -> tuple[bytes, bytes, bytes]:
        """What the job writes where nothing happens to it."""
        directory = self.place / "native"
        directory.mkdir()
        with self.stdin.open("rb") as stdin:
            done = subprocess.run([sys.executable, SCRIPT, str(self._machine["hashes"])],
                                  stdin=stdin, cwd=directory, capture_output=True, check=True,
                                  timeout=HANGS)
        return done.stdout, done.stderr, (directory / "result").read_bytes()

    def clear(self) -> None:
        """Room for the next job."""
        remove_tree(self.slot)
        remove_tree(self.output.parent)
        self.output.parent.mkdir()

    def run(self, strike: Strike | None = None, **more: Any) -> Outcome:
        """Run the job, or continue it when its slot has one."""
        log = self.place / "log"
        log.unlink(missing_ok=True)
        plan = Plan(str(self.slot), str(SCRIPT), str(self.stdin), str(self.output), str(log),
                    [str(self.slot), str(self.home.root), str(self.output.parent)],
                    resume=(self.slot / "job.json").exists(), **{**self._machine, **more})
        if strike is not None:
            plan.kind, plan.at, plan.mode = strike.kind, strike.at, strike.mode
            plan.named, plan.ended_at = strike.named, strike.ended_at
            plan.delay = strike.delay
        env = {**os.environ, "VMJOB_HOME": str(self.home.root), "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
        began = time.monotonic()
        with (self.place / "said").open("w+b") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.campaign.victim", msgspec.json.encode(plan)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, cwd=self.place,
                env=env)
            stopped, hung = _await(process, self._hangs)
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
        events = [json.loads(line) for line in log.read_bytes().splitlines()] \
            if log.exists() else []
        return Outcome(process.returncode, text, events, time.monotonic() - began, strike, stopped,
                       hung)

    def newest(self) -> int | None:
        """The number of the newest checkpoint in the slot."""
        found = sorted(int(path.stem) for path in (self.slot / "checkpoints").glob("[0-9]*.json"))
        return found[-1] if found else None

    def left(self) -> list[str]:
        """Processes and machines that nobody owns any more."""
        processes = processes_below(self.place)
        alive = psutil.wait_procs(processes, timeout=GONE_DEADLINE)[1]
        machines = [path.name for path in self.home.machines.iterdir()]
        return [*(f"process {each.pid}" for each in alive), *(f"machine {each}" for each in
                                                                machines)]

    # -- a case --------------------------------------------------------------------------------

    def case(self, strikes: Iterator[Strike | None],
             prepare: Callable[[], None] = lambda: None) -> Case:
        """Run a job to its end with these strikes, the rest of its runs undisturbed."""
        self.clear()
        prepare()
        case = Case()
        undisturbed = 0
        while undisturbed < ATTEMPTS:
            strike = next(strikes, None)
            undisturbed += strike is None
            before = self.newest()
            outcome = self.run(strike)
            case.runs.append(outcome)
            case.wrong += self._wrong(outcome, before)
            if outcome.code == 0:
                break
        else:
            case.wrong.append("the job did not end")
        case.wrong += self._wrong_at_the_end()
        return case

    def _wrong(self, outcome: Outcome, before: int | None) -> Iterator[str]:
        """What one run did that it must not."""
        strike = outcome.strike
        mode = strike.mode if strike and outcome.reached else ""
        allowed = {"self": {-signal.SIGKILL}, "both": {-signal.SIGKILL}, "hypervisor": {0, 125},
                   "SIGTERM": {0, 143}}.get(mode, {0})
        if strike and strike.ended_at and mode in ("", "hypervisor"):
            allowed = {*allowed, 143}
        if outcome.hung or outcome.code not in allowed:
            yield f"{strike}: code {outcome.code}, hung {outcome.hung}: {outcome.stderr[-500:]}"
        if mode == "hypervisor" and outcome.code == 125 and "[machine-died]" not in outcome.stderr:
            yield f"{strike}: {outcome.stderr[-500:]}"
        if "unexpected" in outcome.stderr or "Traceback" in outcome.stderr:
            yield f"{strike}: {outcome.stderr[-2000:]}"
        yield from self._lost(outcome, before)
        if mode == "SIGTERM" and outcome.code == 143 and "run" in outcome.told("phase") and \
                outcome.told("phase")[-1] == "run" and self.newest() is None:
            yield f"{strike}: no last checkpoint"
        if left := [each for each in self.left() if each.startswith("process")]:
            yield f"{strike}: left over: {left}"

    def _lost(self, outcome: Outcome, before: int | None) -> Iterator[str]:
        """A run that had something to continue from continued from it, or says why not."""
        phases = outcome.told("phase")
        excused = "given up" in outcome.stderr or "damaged" in outcome.stderr
        if before is None or ((self.slot / "result.json").exists() and not phases):
            return
        if {"boot", "thaw"} & set(phases) and not excused:
            yield f"{outcome.strike}: began anew, although there was checkpoint {before}"
        used = outcome.told("continues")
        if used and used[0] != before:
            yield f"{outcome.strike}: went on from {used[0]}, although there was {before}"

    def _wrong_at_the_end(self) -> Iterator[str]:
        for name, expected in (("stdout", self.stdout), ("stderr", self.stderr)):
            path = self.slot / name
            if not path.exists() or path.read_bytes() != expected:
                yield f"wrong {name}"
        if not self.output.exists() or self.output.read_bytes() != self.result:
            yield "wrong output file"
        found = {path.name for path in self.slot.iterdir()}
        if found != AT_THE_END:
            yield f"the slot holds {sorted(found)}"
        if left := [*self.left(), *(path.name for path in self.output.parent.iterdir()
                                    if path != self.output)]:
            yield f"left over: {left}"


def _await(process: subprocess.Popen[bytes], seconds: float) -> tuple[bool, bool]:
    """Wait for a process to end; wake it when it stops. Whether it stopped, whether it hung."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, give_up)
    timer.start()
    stopped = False
    try:
        while True:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                process.returncode = os.waitstatus_to_exitcode(status)
                return stopped, late.is_set()
            stopped = True
            os.kill(process.pid, signal.SIGCONT)
    finally:
        timer.cancel()


def processes_below(place: Path) -> list[psutil.Process]:
    """Living processes that have to do with a directory."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            # VirtualBox's are told of their place by a variable only.
            known = [*process.cmdline(), process.cwd(), process.environ().get("VBOX_USER_HOME", "")]
            if any(str(place) in each for each in known):
                found.append(process)
    return found


# -- the campaign ------------------------------------------------------------------------------


@dataclass
class Profile:
    """How often each step happens: in a run from the beginning, in one that is continued."""

    first: dict[str, int]
    resumed: dict[str, int]
    seconds: float

    @classmethod
    def of(cls, place: Field) -> Profile:
        """From a run that nothing happens to, and one that is continued from its middle."""
        place.clear()
        place.run()  # makes the template, which others find
        place.clear()
        first = place.run()
        place.clear()
        place.run(Strike("checkpoint rename", 3, "self"))
        resumed = place.run()
        if (first.code, resumed.code) != (0, 0):
            raise RuntimeError(f"an undisturbed run fails: {first.stderr}{resumed.stderr}")
        return cls(first.told("steps")[0], resumed.told("steps")[0], first.seconds)

    def strikes(self, rng: random.Random) -> Iterator[Strike | None]:
        """Strikes at one job: at any kind of step alike, at any time of it."""
        counts = self.first
        for _ in range(STRIKES):
            kind = rng.choice(sorted(counts))
            mode, = rng.choices(list(MODES), list(MODES.values()))
            yield Strike(kind, rng.randint(1, counts[kind]), mode)
            counts = self.resumed
            if rng.random() > AGAIN:
                return


@dataclass
class Row:
    """Strikes at one kind of step."""

    strikes: int = 0
    wrong: int = 0
    seconds: float = 0.0
    codes: dict[str, int] = field(default_factory=dict)


def campaign(fields: list[Field], count: int, seed: int,
             deadline: float | None = None) -> dict[str, Any]:
    """At least so many strikes that were reached, or as many as fit in ``deadline`` seconds."""
    began = time.monotonic()
    profile = Profile.of(fields[0])
    rng = random.Random(seed)
    turn = threading.Lock()
    cases: list[Case] = []
    done = 0

    def work(place: Field) -> None:
        nonlocal done
        while True:
            with turn:
                late = deadline is not None and time.monotonic() - began > deadline
                if done >= count or late:
                    return
                strikes = profile.strikes(random.Random(rng.randrange(1 << 32)))
            case = place.case(strikes)
            with turn:
                cases.append(case)
                done += sum(run.reached for run in case.runs)
                for each in case.wrong:
                    print(f"WRONG: {each}", file=sys.stderr, flush=True)  # noqa: T201

    with ThreadPoolExecutor(len(fields)) as pool:
        for each in pool.map(work, fields):
            assert each is None
    return _summed(cases, profile, seed, time.monotonic() - began)


def _summed(cases: list[Case], profile: Profile, seed: int, seconds: float) -> dict[str, Any]:
    rows: dict[str, Row] = {}
    modes: dict[str, int] = {}
    for case in cases:
        for run in case.runs:
            if run.strike is None or not run.reached:
                continue
            phase, what = run.strike.kind.split(" ")[:2]
            row = rows.setdefault(f"{phase} {what}", Row())
            row.strikes += 1
            row.wrong += bool(case.wrong)
            row.seconds = round(row.seconds + run.seconds, 1)
            row.codes[str(run.code)] = row.codes.get(str(run.code), 0) + 1
            modes[run.strike.mode] = modes.get(run.strike.mode, 0) + 1
    runs = [run for case in cases for run in case.runs]
    wrong = [each for case in cases for each in case.wrong]
    return {"seed": seed, "jobs": len(cases), "runs": len(runs),
            "strikes": sum(row.strikes for row in rows.values()),
            "not_reached": sum(bool(run.strike) and not run.reached for run in runs),
            "continued": sum(bool(run.told("continues")) for run in runs),
            "checkpoints": sum(len(run.told("published")) for run in runs),
            "modes": dict(sorted(modes.items())),
            "wrong_answers": sum(each.startswith("wrong") for each in wrong),
            "leftovers": sum("left over" in each or "the slot holds" in each for each in wrong),
            "wrong": wrong, "seconds": round(seconds, 1),
            "undisturbed_seconds": round(profile.seconds, 1),
            "steps": {kind: msgspec.to_builtins(row) for kind, row in sorted(rows.items())}}
