"""One long job and a hundred mishaps: its answer is that of an undisturbed run all the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from vmjob.home import Home

__all__ = ["survive"]

SCRIPT = Path(__file__).with_name("long_job.py")
#: Rounds of the job from which its speed in a machine is told.
TRIAL = 40
#: Seconds between checkpoints, and from a start to the next mishap.
EVERY = 2
SOONEST, LATEST = 1.0, 6.0
#: Seconds for which a job stands still, and in which one that was ended must be gone.
STILL = 1.0
GONE = 90.0
MACHINE = ["--memory", "256", "--accel", "tcg"]


class _Job:
    """The process that carries the job, and its slot."""

    def __init__(self, home: Home, slot: Path, rounds: int) -> None:
        self._env = {**os.environ, "VMJOB_HOME": str(home.root)}
        self.slot = slot
        self._first = ["run", *MACHINE, "--slot", str(slot), "--checkpoint-every", str(EVERY),
                       "--in", f"{SCRIPT}:job.py", "--", "python3", "job.py", str(rounds)]
        self.process = self._start(self._first)

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self.slot.parent / "said").open("ab") as said:
            return subprocess.Popen([sys.executable, "-m", "vmjob", *arguments], env=self._env,
                                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                    stderr=said)

    def resume(self) -> None:
        """Start it again: from the beginning when it was struck before it was written down."""
        self.process = self._start(["run", "--resume", str(self.slot)] if (
            self.slot / "job.json").exists() else self._first)

    def second(self) -> int:
        """What a second process gets that wants the same slot."""
        return self._start(["run", "--resume", str(self.slot)]).wait(GONE)

    @property
    def machine(self) -> list[psutil.Process]:
        try:
            return [each for each in psutil.Process(self.process.pid).children(recursive=True)
                    if each.name().startswith("qemu")]
        except psutil.Error:
            return []


def survive(home: Home, place: Path, minutes: float, mishaps: int, seed: int) -> dict[str, Any]:
    """Run a job of so many minutes and let so many mishaps happen to it; what came of it."""
    dice = random.Random(seed)
    rounds = _rounds(home, place, minutes * 60)
    native = subprocess.run([sys.executable, str(SCRIPT), str(rounds)], stdout=subprocess.PIPE,
                            check=True, cwd=place).stdout
    job = _Job(home, place / "slot", rounds)
    began = time.monotonic()
    happened: Counter[str] = Counter()
    while job.process.poll() is None or job.process.returncode != 0:
        if job.process.poll() is not None:
            job.resume()
        if sum(happened.values()) >= mishaps:
            job.process.wait()
            continue
        try:
            job.process.wait(dice.uniform(SOONEST, LATEST))
        except subprocess.TimeoutExpired:
            name, mishap = dice.choice(MISHAPS)
            mishap(job, dice)
            happened[name] += 1
    slot = place / "slot"
    left = sorted(path.name for path in slot.iterdir())
    right = (slot / "stdout").read_bytes() == native
    said = (place / "said").read_text(errors="replace")
    return {"right": right, "rounds": rounds, "seconds": time.monotonic() - began,
            "mishaps": dict(happened), "fallbacks": said.count("is damaged"), "left": left,
            "machines": [path.name for path in home.machines.iterdir()],
            "processes": [each.pid for each in psutil.process_iter()
                          if _below(each, str(place))]}


def _below(process: psutil.Process, place: str) -> bool:
    try:
        return any(place in word for word in process.cmdline()) and process.pid != os.getpid()
    except psutil.Error:
        return False


def _rounds(home: Home, place: Path, seconds: float) -> int:
    """How many rounds the job must have to run that long in a machine."""
    began = 0.0
    process = subprocess.Popen(
        [sys.executable, "-m", "vmjob", "run", *MACHINE, "--in", f"{SCRIPT}:job.py", "--",
         "python3", "job.py", str(TRIAL)], stdout=subprocess.PIPE, cwd=place,
        env={**os.environ, "VMJOB_HOME": str(home.root)})
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        process.stdout.read()
    return max(TRIAL, int(seconds / ((time.monotonic() - began) / TRIAL)))


def _kill_us(job: _Job, dice: random.Random) -> None:
    job.process.kill()
    job.process.wait(GONE)


def _kill_machine(job: _Job, dice: random.Random) -> None:
    for each in job.machine:
        each.kill()
    job.process.wait(GONE)


def _kill_both(job: _Job, dice: random.Random) -> None:
    both = [*job.machine, job.process]
    dice.shuffle(both)
    for each in both:
        each.kill()
    job.process.wait(GONE)


def _terminate(job: _Job, dice: random.Random) -> None:
    job.process.terminate()
    job.process.wait(GONE)


def _interrupt(job: _Job, dice: random.Random) -> None:
    job.process.send_signal(signal.SIGINT)
    job.process.wait(GONE)


def _stand_still(job: _Job, dice: random.Random) -> None:
    job.process.send_signal(signal.SIGTSTP)
    time.sleep(STILL)
    job.process.send_signal(signal.SIGCONT)


def _freeze_us(job: _Job, dice: random.Random) -> None:
    """As a computer's own sleep does it: nobody was asked."""
    for each in (job.process, *job.machine):
        each.send_signal(signal.SIGSTOP)
    time.sleep(STILL)
    for each in (job.process, *job.machine):
        each.send_signal(signal.SIGCONT)


def _damage(job: _Job, dice: random.Random) -> None:
    """A power cut, and a disk that lost some of what it was told to keep."""
    _kill_both(job, dice)
    manifests = sorted((job.slot / "checkpoints").glob("*.json"))
    if len(manifests) < 2:
        return
    newest = manifests[-1]
    victim = dice.choice([newest, *newest.parent.glob(f"{newest.stem}.*")])
    size = victim.stat().st_size
    with victim.open("r+b") as file:
        if dice.random() < 0.5:
            file.truncate(dice.randrange(size))
        else:
            at = dice.randrange(size)
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << dice.randrange(8)]), at)


def _two_at_once(job: _Job, dice: random.Random) -> None:
    assert job.second() in (0, 125), "a second process took a slot that has an owner"


MISHAPS: list[tuple[str, Callable[[_Job, random.Random], None]]] = [
    ("vmjob killed", _kill_us), ("machine killed", _kill_machine), ("both killed", _kill_both),
    ("terminated", _terminate), ("interrupted", _interrupt), ("suspended", _stand_still),
    ("frozen", _freeze_us), ("newest checkpoint damaged", _damage),
    ("second process", _two_at_once)]
