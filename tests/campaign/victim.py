"""``python -m tests.campaign.victim PLAN``: `vmjob run` that dies where it is told to.

Everything that it does to the world is a step: files opened for writing, renamed, removed and
synced, commands to the hypervisor, requests to the agent, processes started. A step is known by the
phase of the job, what is done, and how often that was done before. Just before the step of the
plan, the process, its hypervisor or both are killed, or it gets a signal.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from vmjob.cli.carrying import How, carry
from vmjob.engine.generations import Generations
from vmjob.engine.life import Life
from vmjob.guest.lane import Lane
from vmjob.host import durable
from vmjob.job.files import Input, Output
from vmjob.job.model import Job, Network, Task
from vmjob.machine.contract import Priority
from vmjob.machine.qemu.monitor import Monitor
from vmjob.machine.virtualbox.manage import Manage

__all__ = ["MEMORY_MB", "Plan"]

MEMORY_MB = 256
#: Seconds for a last checkpoint after SIGTERM.
STOP_DEADLINE = 60.0
#: How the names of the processes begin that machines are.
HYPERVISORS = ("qemu-system", "VBoxHeadless")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
#: Audit event -> what the step is called. Renaming over a file is a rename as well.
EVENTS = {"open": "open", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir",
          "os.mkdir": "mkdir", "os.link": "link", "os.truncate": "truncate"}


#: The same for steps that are known by their files' names; whole trees are removed as one.
NAMED = {"open": "open", "os.rename": "rename", "os.remove": "unlink", "os.link": "link",
         "os.truncate": "truncate", "os.mkdir": "mkdir", "shutil.rmtree": "rmtree"}
#: Those that are known by what they lead to.
TARGETS = {"os.rename", "os.link"}


class Plan(msgspec.Struct):
    """What to run, and where to die.

    ``below``: files outside these directories are nobody's business. ``kind`` and ``at``: the step
    (None: no step); ``mode``: ``self``, ``hypervisor`` or ``both`` are killed, or the name of a
    signal that the process gets; ``delay`` seconds later. ``log``: where it tells what it does, one
    JSON object a line. ``named``: steps are known by the names of their files as well, and told one
    by one. ``ended_at``: the kind of step before which SIGTERM comes; from then on steps are of
    kinds that begin with ``stop``. ``hashes``: how many the job computes in each of its rounds.
    """

    slot: str
    script: str
    stdin: str
    output: str
    log: str
    below: list[str]
    resume: bool = False
    every: float = 0.5
    kind: str | None = None
    at: int = 0
    mode: str = "self"
    time_limit: float | None = None
    named: bool = False
    ended_at: str | None = None
    hypervisor: str = "qemu"
    accel: str = "tcg"
    network: Network = Network.NONE
    hashes: int = 6000
    delay: float = 0.0


class Steps:
    """Counts the steps, tells of some, and carries out the plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._phase = "image"
        #: How many states the job has been in.
        self._visit = 0
        self._ending = False
        self._log = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._turn = threading.RLock()
        self.counts: Counter[str] = Counter()

    @property
    def named(self) -> bool:
        return self._plan.named

    def tell(self, **facts: Any) -> None:
        os.write(self._log, json.dumps(facts).encode() + b"\n")

    def phase(self, name: str) -> None:
        self._phase = name
        self._visit += 1
        self.tell(phase=name)

    def step(self, what: str) -> None:
        """Something is about to be done."""
        with self._turn:
            kind = f"{self._phase} {what}"
            if kind == self._plan.ended_at and not self._ending:
                self._ending = True
                os.kill(os.getpid(), signal.SIGTERM)
            if self._ending:
                kind = f"stop {kind}"
            self.counts[kind] += 1
            if self._plan.named:
                self.tell(step=kind, visit=self._visit)
            if kind == self._plan.kind and self.counts[kind] == self._plan.at:
                self.tell(reached=kind, at=self._plan.at, mode=self._plan.mode)
                if self._plan.delay:
                    threading.Timer(self._plan.delay, self._die).start()
                else:
                    self._die()

    def _die(self) -> None:
        mode = self._plan.mode
        if mode in ("hypervisor", "both"):
            for child in psutil.Process().children(recursive=True):
                if child.name().startswith(HYPERVISORS):
                    child.kill()
                    self.tell(killed=child.pid)
        if mode in ("self", "both"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif mode != "hypervisor":
            os.kill(os.getpid(), getattr(signal, mode))

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            self.step(f"spawn {Path(os.fsdecode(arguments[0])).name}")
        elif self._plan.named and event in NAMED:
            if (event != "open" or arguments[2] & WRITING) and self._ours(arguments[0]) \
                    and _does_something(event, arguments[0]):
                self.step(f"{NAMED[event]} {named(arguments[1 if event in TARGETS else 0])}")
        elif (not self._plan.named and event in EVENTS
              and (event != "open" or arguments[2] & WRITING) and self._ours(arguments[0])):
            self.step(EVENTS[event])

    def _ours(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        text = os.fsdecode(path)
        return any(text.startswith(each) for each in self._plan.below) and text != self._plan.log


def _does_something(event: str, path: Any) -> bool:
    """Not what is made when it is there, or removed when it is not."""
    there = os.path.lexists(path)
    return there is not (event == "os.mkdir") or event not in (
        "os.mkdir", "os.remove", "shutil.rmtree")


def named(path: Any) -> str:
    """A file's name without what differs from run to run."""
    return re.sub(r"[0-9a-f]*\d[0-9a-f-]*", "N", Path(os.fsdecode(path)).name)


def watch(steps: Steps) -> None:
    """Make everything that is done to the world a step."""
    sys.addaudithook(steps.audit)
    sync = durable.sync
    fsync, enter, saved, publish = os.fsync, Life.enter, Generations.saved, Generations.publish
    execute, call, request = Monitor.execute, Manage._call, Lane.request

    def synced(fd: int) -> None:
        if not steps.named:
            steps.step("fsync")
        elif sys._getframe(1).f_code.co_filename != durable.__file__:
            steps.step("sync streams")
        fsync(fd)

    def synced_by_name(path: Path) -> None:
        if steps.named:
            steps.step(f"sync {named(path)}")
        sync(path)

    def entered(self: Life, state: Any) -> None:
        if state is not self.state:
            if steps.named:
                steps.step(f"becomes {state}")
            steps.phase(str(state))
        enter(self, state)

    def continued(self: Generations, generation: Any) -> Any:
        steps.tell(continues=generation.number)
        return saved(self, generation)

    def published(self: Generations, *arguments: Any) -> Any:
        generation = publish(self, *arguments)
        steps.tell(published=generation.number)
        return generation

    async def executed(self: Monitor, command: str, **arguments: Any) -> Any:
        steps.step(f"qmp {command}")
        return await execute(self, command, **arguments)

    async def called(self: Manage, words: Sequence[str], end: float) -> Any:
        what = f"{words[0]} {words[2]}" if words[0] in ("snapshot", "controlvm") else words[0]
        steps.step(f"vboxmanage {what}")
        return await call(self, words, end)

    async def requested(self: Lane, method: str, target: str, *more: Any, **options: Any) -> Any:
        what = re.sub(r"\d+", "N", target.partition("?")[0].replace("/v1", ""))
        steps.step(f"agent {method} {what}")
        return await request(self, method, target, *more, **options)

    os.fsync = synced  # type: ignore[assignment]
    durable.sync = synced_by_name
    Life.enter = entered  # type: ignore[method-assign]
    Generations.saved = continued  # type: ignore[method-assign]
    Generations.publish = published  # type: ignore[method-assign,assignment]
    Monitor.execute = executed  # type: ignore[method-assign]
    Manage._call = called  # type: ignore[method-assign]
    Lane.request = requested  # type: ignore[method-assign]


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    steps = Steps(plan)
    watch(steps)
    job = None
    if not plan.resume:
        job = Job((Task(("python3", "job.py", str(plan.hashes))),),
                  inputs=(Input(Path(plan.script), "job.py"),),
                  outputs=(Output("result", Path(plan.output)),), memory_mb=MEMORY_MB,
                  network=plan.network, time_limit=plan.time_limit)
    how = How(hypervisor=plan.hypervisor, accel=plan.accel, cpu="host", cold=False,
              stdin=plan.stdin, slot=Path(plan.slot), every=plan.every, slot_limit=None,
              stop_deadline=STOP_DEADLINE, priority=Priority.NORMAL, keep=False, as_json=False,
              quiet=False)
    code = asyncio.run(carry(job, how))
    steps.tell(code=code, steps=dict(steps.counts))
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
