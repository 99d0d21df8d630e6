"""A client that computes jobs in virtual machines, and a look at what runs for each of them."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from tests.conftest import eventually, session_processes, wait_until_gone
from tests.e2e.project import Project
from vmjob.home import Home
from vmjob.image.store import Image
from vmjob.project.boinccmd import ClientTask
from vmjob.project.devserver import Result

SCRIPT = Path(__file__).with_name("chain_job.py")
#: MiB. Other sizes than this one need a template of their own.
MEMORY = 256
JOB = """run = ["python3", "chain_job.py"]
inputs = ["chain_job.py", "rounds"]
outputs = ["answer", "clock"]
memory_mb = {memory}
"""
#: Seconds. For everything up to a task's first sign of life; for one small step of it; to its end.
BEGIN, STEP, END = 150.0, 60.0, 240.0
#: Seconds that something is watched that is to stand still, and the processor time that it may use.
STILL, NEXT_TO_NOTHING = 2.0, 0.1
#: What the name of a hypervisor's process begins with.
HYPERVISOR = "qemu-system"


def measured(text: str) -> None:
    """A figure for whoever wants to know it: pytest --log-cli-level=INFO shows it."""
    logging.getLogger("measured").info(text)


def golden(rounds: int, place: Path) -> str:
    """The right answer, found on this computer."""
    place.mkdir()
    (place / "rounds").write_text(str(rounds))
    subprocess.run([sys.executable, "-I", SCRIPT], cwd=place, check=True, timeout=STEP,
                   stdout=subprocess.DEVNULL, env={"PAUSE": "0"})
    return (place / "answer").read_text()


def make_template(home: Home, place: Path) -> None:
    """Freeze the machine of these jobs in ``home``, as the wrapper does, unless it is there."""
    place.mkdir()
    (place / "vmjob.toml").write_text(JOB.format(memory=MEMORY))
    for name in ("chain_job.py", "rounds"):
        (place / name).write_text("")
    subprocess.run([sys.executable, "-m", "vmjob", "wrapper", "--allow-emulation",
                    "--register_only"], cwd=place, check=True, timeout=END,
                   env={**os.environ, "VMJOB_HOME": str(home.root)})


class World(Project):
    """A client whose jobs wait until they are `released`: word -> result's name.

    ``rounds``: word -> the length of its job. ``memory``: words whose machines are not the usual
    ones -> MiB; nobody has frozen these yet. ``consent``: words of jobs that may be emulated;
    None: all.
    """

    def __init__(self, root: Path, image: Image, templates: Home, rounds: Mapping[str, int], *,
                 memory: Mapping[str, int] | None = None,
                 consent: Collection[str] | None = None, **client: Any) -> None:
        super().__init__(root, image, templates, cpus=16, **client)
        self.rounds = dict(rounds)
        self.names: dict[str, str] = {}
        own = self.client.project_directory / "vmjob" / "templates"
        own.unlink()  # ours alone: what is made here stays here
        shutil.copytree(templates.templates, own, copy_function=os.link)
        for size in {MEMORY, *(memory or {}).values()}:
            self.app(f"chain{size}", JOB.format(memory=size), inputs=["rounds"],
                     files={"chain_job.py": SCRIPT})
        for word, count in rounds.items():
            self.names[word] = self.add(
                f"chain{(memory or {}).get(word, MEMORY)}", {"rounds": str(count)},
                ["answer", "clock"], consent=consent is None or word in consent)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.client.set_run_mode("never")
            for name in self.names.values():
                self.client.wait_task(name, lambda task: True, BEGIN)
                self.client.suspend(name)
            self.client.set_run_mode("always")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        if exc == (None, None, None):
            assert self.client.leftovers == []
            assert self.left() == []

    def left(self) -> list[psutil.Process]:
        """As for any project; but another one of the same tests may still be at work."""
        return wait_until_gone([each for each in session_processes(self.root)
                                if works_below(each, self.root)])

    def job(self, word: str) -> Task:
        return Task(self, self.names[word], self.rounds[word])

    def released(self, word: str) -> Task:
        """A job that may run from now on."""
        job = self.job(word)
        job.wait(lambda task: task.state == "downloaded", BEGIN)
        self.client.resume(job.name)
        return job


@dataclass
class Task:
    """One job, seen from outside."""

    world: World
    name: str
    rounds: int

    # -- what the client says of it --------------------------------------------------------------

    def told(self) -> ClientTask:
        found = self.world.client.task(self.name)
        assert found is not None, f"the client does not know {self.name}"
        return found

    def wait(self, condition: Callable[[ClientTask], bool], deadline: float = STEP) -> ClientTask:
        return self.world.client.wait_task(self.name, condition, deadline)

    @property
    def slot(self) -> Path:
        """Where it runs, once it has a slot."""
        number = self.wait(lambda task: task.slot is not None, BEGIN).slot
        assert number is not None
        return self.world.client.slot(number)

    # -- what it does ----------------------------------------------------------------------------

    def lines(self) -> int:
        """Rounds that the job has told of so far."""
        try:
            return (self.slot / "vmjob" / "stdout").read_bytes().count(b"\n")
        except OSError:
            return 0

    def goes_on(self, rounds: int = 3, deadline: float = BEGIN) -> None:
        """Return when it has done some more rounds than now."""
        before = self.lines()
        assert eventually(lambda: self.lines() >= before + rounds, deadline), self.story()

    def log(self) -> str:
        try:
            return (self.slot / "stderr.txt").read_text("utf-8", "replace")
        except OSError:
            return ""

    def logs(self, pattern: str, deadline: float = STEP, *, count: int = 1) -> list[str]:
        """Return when the wrapper has logged so many lines like that; what their groups hold."""
        found: list[str] = []

        def there() -> bool:
            found[:] = re.findall(pattern, self.log())
            return len(found) >= count

        assert eventually(there, deadline), f"no {pattern!r}\n{self.story()}"
        return found

    def kept(self, more: int = 1, deadline: float = BEGIN) -> None:
        """Return when so many more checkpoints have been made than now."""
        count = len(re.findall(r"vmjob: checkpoint \d", self.log()))
        self.logs(r"vmjob: checkpoint \d", deadline, count=count + more)

    # -- what runs for it ------------------------------------------------------------------------

    def wrapper(self, deadline: float = STEP) -> psutil.Process:
        """The process that the client has started for it."""
        pid = self.wait(lambda task: bool(task.pid) and psutil.pid_exists(task.pid or 0),
                        deadline).pid
        assert pid
        return psutil.Process(pid)

    def machine(self, deadline: float = STEP) -> psutil.Process:
        """Its virtual machine."""
        found: list[psutil.Process] = []

        def there() -> bool:
            found[:] = hypervisors(self.wrapper())
            return bool(found)

        assert eventually(there, deadline), self.story()
        return found[0]

    # -- the end ---------------------------------------------------------------------------------

    def result(self, deadline: float = END) -> Result:
        return self.world.result(self.name, deadline)

    def ends_well(self) -> Result:
        """Its result, which is the right one."""
        result = self.result()
        assert result.succeeded, f"{result}\n{result.stderr_out}"
        answer = result.outputs["answer"].read_text()
        assert answer == golden(self.rounds, self.world.root / f"golden {self.name}"), \
            result.stderr_out
        return result

    def story(self) -> str:
        """What explains a failure."""
        return (f"{self.name}: {self.world.client.task(self.name)}\n--- stderr.txt\n{self.log()}\n"
                f"--- client\n{self.world.client.log[-6000:]}")


def hypervisors(process: psutil.Process) -> list[psutil.Process]:
    """Virtual machines below a process."""
    try:
        below = process.children(recursive=True)
        return [each for each in below if each.name().startswith(HYPERVISOR)]
    except psutil.NoSuchProcess:
        return []


def works_below(process: psutil.Process, directory: Path) -> bool:
    try:
        return any(str(directory) in each for each in (*process.cmdline(), process.cwd()))
    except (psutil.Error, OSError):
        return False


def used(process: psutil.Process) -> float:
    """Seconds of processor time."""
    times = process.cpu_times()
    return times.user + times.system


def seconds_to_end(processes: list[psutil.Process], since: float, deadline: float) -> float:
    """Until all of them have ended; fails after ``deadline``.

    One that has ended and that the client has not looked at yet is gone, too.
    """
    left = list(processes)
    assert eventually(lambda: not any(map(is_alive, left)), deadline), \
        f"still there {deadline:g} s later: {[each for each in left if is_alive(each)]}"
    return time.monotonic() - since


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stands_still(process: psutil.Process) -> None:
    """Return when a process has used next to no processor time for a while."""
    spent = [0.0]

    def still() -> bool:
        before = used(process)
        time.sleep(STILL)  # this is what it is about
        spent[0] = used(process) - before
        return spent[0] <= NEXT_TO_NOTHING

    assert eventually(still, STEP), f"it used {spent[0]:.2f} s of processor time in {STILL} s"
    measured(f"standing still: {spent[0]:.3f} s of processor time in {STILL} s")
