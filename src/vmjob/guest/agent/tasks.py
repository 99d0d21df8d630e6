"""The tasks of a machine: started, fed, drained, limited, ended, reaped.

Two threads serve all tasks: the *pump* moves output from pipes to windows and
watches limits, the *reaper* collects every child that ends (orphans go to process 1,
which collects them). A task ends when its first process does: whatever it left
running is killed, then the last bytes are drained.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import threading
import time
from typing import Any

from .messages import Messages
from .place import Place, read_counters, write_file
from .spawn import CannotStart, Child
from .streams import Window

#: Seconds between looks at a limit that the kernel does not keep for us.
LIMIT_PERIOD = 1.0
#: Processes of one task unless it says otherwise: more than a large program needs, few enough
#: that a fork bomb cannot take the pid table (32768) from the agent.
DEFAULT_PROCESSES = 4096
#: Bytes read from a pipe at once.
PIPE_READ = 64 * 1024

RUSAGE_FIELDS = ("ru_utime", "ru_stime", "ru_maxrss", "ru_ixrss", "ru_idrss", "ru_isrss",
                 "ru_minflt", "ru_majflt", "ru_nswap", "ru_inblock", "ru_oublock", "ru_msgsnd",
                 "ru_msgrcv", "ru_nsignals", "ru_nvcsw", "ru_nivcsw")


class Task:
    """One command in the machine; ``end`` is its result once everything of it is over."""

    def __init__(self, number: int, cgroup: str | None, cpu_seconds: float | None) -> None:
        self.id = number
        self.pid = 0
        self.cgroup = cgroup
        self.cpu_seconds = cpu_seconds
        self.windows = {"stdout": Window(), "stderr": Window()}
        self.stdin: int | None = None
        self.stdin_taken = 0
        self.started = time.monotonic()
        self.exit: dict[str, Any] | None = None
        self.ended_by: str | None = None
        self.end: dict[str, Any] | None = None


class TaskTable:
    """All tasks, by number; safe to use from several threads."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.messages = Messages(place)
        self.tasks: dict[int, Task] = {}
        self._next = 1
        self._forks = 0
        self._lock = threading.RLock()
        self._child_started = threading.Condition(self._lock)
        self._pipes: dict[int, tuple[Task, str]] = {}
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._change_reader, self._change_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._spent_cgroups: list[str] = []

    def run(self) -> None:
        """Start the two threads."""
        threading.Thread(target=self._reap, name="reaper", daemon=True).start()
        threading.Thread(target=self._pump, name="pump", daemon=True).start()

    # -- what a request asks ---------------------------------------------------------------

    def start(self, asked: dict[str, Any]) -> Task:
        """Start a command; raises `CannotStart`, or `KeyError` for an unknown user."""
        account = self.place.account(asked.get("user"))
        limits = asked.get("limits") or {}
        env = self._environment(account)
        env.update(asked.get("env") or {})
        cwd = self.place.resolve(asked.get("cwd") or "")
        with self._lock:
            number = self._next
            self._next += 1
            task = Task(number, self._make_cgroup(number, limits), limits.get("cpu_seconds"))
            inner: list[int] = []
            outer: list[int] = []
            try:
                if asked.get("stdin") == "stream":
                    reader, writer = os.pipe2(os.O_CLOEXEC)
                    inner.append(reader)
                    outer.append(writer)
                    task.stdin = writer
                    os.set_blocking(writer, False)
                else:
                    inner.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
                for stream in ("stdout", "stderr"):
                    reader, writer = os.pipe2(os.O_CLOEXEC)
                    inner.append(writer)
                    outer.append(reader)
                    os.set_blocking(reader, False)
                    self._pipes[reader] = (task, stream)
                child = Child(asked["argv"], env, cwd, (inner[0], inner[1], inner[2]), account,
                              _rlimits(limits), task.cgroup)
                self._forks += 1
                task.pid = child.start()
            except BaseException:
                for fd in outer:
                    self._pipes.pop(fd, None)
                    os.close(fd)
                if task.cgroup:
                    self._spent_cgroups.append(task.cgroup)
                # A child that could not start is reaped as any other.
                self._child_started.notify()
                raise
            finally:
                for fd in inner:
                    os.close(fd)
            self.tasks[number] = task
            self._child_started.notify()
        self._wake()
        self.changed()
        return task

    def signal(self, task: Task, number: int) -> None:
        """Send a signal to every process of a task."""
        with self._lock:
            if task.exit is None:
                self._signal_tree(task, number)

    def stop(self, task: Task, number: int, why: str) -> None:
        """As `signal`, and note why the task ended."""
        with self._lock:
            if task.exit is None:
                task.ended_by = task.ended_by or why
                self._signal_tree(task, number)

    def forget(self, task: Task) -> None:
        """Drop a task that has ended; its output is gone after this."""
        with self._lock:
            if task.end is not None:
                self.tasks.pop(task.id, None)

    def write_stdin(self, task: Task, offset: int, data: bytes) -> int:
        """Take input at ``offset``; returns how much in all was taken so far.

        Bytes before what was taken are a repetition and are skipped; a gap is refused
        (`ValueError`). Raises `BrokenPipeError` when the job reads no more.
        """
        with self._lock:
            if task.stdin is None:
                raise BrokenPipeError
            if offset > task.stdin_taken:
                raise ValueError("input with a gap")
            rest = data[task.stdin_taken - offset:]
            if rest:
                try:
                    task.stdin_taken += os.write(task.stdin, rest)
                except BlockingIOError:
                    pass
                except BrokenPipeError:
                    self._close_stdin(task)
                    raise
            return task.stdin_taken

    def close_stdin(self, task: Task) -> None:
        """No more input."""
        with self._lock:
            self._close_stdin(task)

    def acknowledge(self, task: Task, stream: str, offset: int) -> None:
        """The host has the stream up to ``offset``; a job that waits for room goes on."""
        with self._lock:
            window = task.windows[stream]
            was_full = window.room <= 0
            window.acknowledge(offset)
            if was_full and window.room > 0:
                self._wake()

    # -- news for who waits ------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Grows with each task that is started."""
        return self._next

    @property
    def change_fd(self) -> int:
        """Readable when something happened since `settle` was last called."""
        return self._change_reader

    def changed(self) -> None:
        _poke(self._change_writer)

    def settle(self) -> None:
        _drain(self._change_reader)

    # -- inside ------------------------------------------------------------------------------

    def _wake(self) -> None:
        _poke(self._wake_writer)

    def _environment(self, account: tuple[str, int, int, str] | None) -> dict[str, str]:
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
               "LANG": "C.UTF-8", "HOME": self.place.workdir,
               "VMJOB_TO_HOST": self.place.to_host, "VMJOB_FROM_HOST": self.place.from_host}
        if account:
            env.update(HOME=account[3], USER=account[0], LOGNAME=account[0])
        return env

    def _make_cgroup(self, number: int, limits: dict[str, Any]) -> str | None:
        if not self.place.cgroup:
            return None
        path = f"{self.place.cgroup}/{number}"
        os.mkdir(path)
        write_file(path + "/pids.max", str(limits.get("processes") or DEFAULT_PROCESSES))
        if limits.get("memory_bytes"):
            write_file(path + "/memory.max", str(limits["memory_bytes"]))
        return path

    def _signal_tree(self, task: Task, number: int) -> None:
        if task.cgroup and number == signal.SIGKILL:
            write_file(task.cgroup + "/cgroup.kill", "1")
        elif task.cgroup:
            for pid in _pids(task.cgroup):
                _kill(pid, number)
        else:
            try:
                os.killpg(task.pid, number)
            except (ProcessLookupError, PermissionError):
                pass

    def _close_stdin(self, task: Task) -> None:
        if task.stdin is not None:
            os.close(task.stdin)
            task.stdin = None

    def _reap(self) -> None:
        while True:
            forks = self._forks
            try:
                pid, status, usage = os.wait4(-1, 0)
            except ChildProcessError:
                with self._child_started:
                    if forks == self._forks:
                        self._child_started.wait(LIMIT_PERIOD if self._spent_cgroups else None)
                    self._remove_cgroups()
                continue
            with self._lock:
                for task in self.tasks.values():
                    if task.pid == pid and task.exit is None:
                        self._exited(task, status, usage)
                self._remove_cgroups()

    def _exited(self, task: Task, status: int, usage: Any) -> None:
        code = os.waitstatus_to_exitcode(status)
        task.exit = {
            "exit_code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "wall_seconds": time.monotonic() - task.started,
            "rusage": dict(zip(RUSAGE_FIELDS, usage, strict=False)),
        }
        self._signal_tree(task, signal.SIGKILL)
        self._close_stdin(task)
        self._wake()

    def _finish(self, task: Task) -> None:
        """All is drained: make the result."""
        assert task.exit is not None
        facts: dict[str, Any] = {"oom_kills": 0, "cpu_seconds": None, "memory_peak_bytes": None}
        if task.cgroup:
            cpu = read_counters(task.cgroup + "/cpu.stat")
            facts["cpu_seconds"] = cpu.get("usage_usec", 0) / 1e6
            facts["oom_kills"] = read_counters(task.cgroup + "/memory.events").get("oom_kill", 0)
            with open(task.cgroup + "/memory.peak", "rb", buffering=0) as peak:
                facts["memory_peak_bytes"] = int(peak.read(32))
            self._spent_cgroups.append(task.cgroup)
            self._remove_cgroups()
        if task.ended_by is None and facts["oom_kills"] and task.exit["signal"] == signal.SIGKILL:
            task.ended_by = "out-of-memory"
        if task.ended_by is None and task.exit["signal"] == signal.SIGXCPU:
            task.ended_by = "cpu-limit"
        task.end = {**task.exit, **facts, "ended_by": task.ended_by}
        self.changed()

    def _remove_cgroups(self) -> None:
        for path in list(self._spent_cgroups):
            try:
                os.rmdir(path)
            except FileNotFoundError:
                pass
            except OSError:
                continue  # its last processes are still being reaped
            self._spent_cgroups.remove(path)

    def _pump(self) -> None:
        poll = select.poll()
        registered: set[int] = set()
        poll.register(self._wake_reader, select.POLLIN)
        poll.register(self.messages.fd, select.POLLIN)
        while True:
            with self._lock:
                wanted = {fd for fd, (task, stream) in self._pipes.items()
                          if task.windows[stream].room > 0}
                limited = any(t.cpu_seconds and t.exit is None for t in self.tasks.values())
            for fd in registered - wanted:
                poll.unregister(fd)
            for fd in wanted - registered:
                poll.register(fd, select.POLLIN)
            registered = wanted
            ready = poll.poll(LIMIT_PERIOD * 1000 if limited else None)
            with self._lock:
                self._move({fd for fd, _ in ready})
                if limited:
                    self._enforce_cpu()

    def _move(self, ready: set[int]) -> None:
        if self._wake_reader in ready:
            _drain(self._wake_reader)
        if self.messages.fd in ready and self.messages.take():
            self.changed()
        news = False
        for fd, (task, stream) in list(self._pipes.items()):
            window = task.windows[stream]
            if (fd not in ready and task.exit is None) or window.room <= 0:
                continue
            try:
                data = os.read(fd, min(PIPE_READ, window.room))
            except BlockingIOError:
                if task.exit is None:
                    continue
                data = b""  # everybody who could write is dead
            if data:
                window.append(data)
                news = True
                if task.exit is not None:
                    self._wake()
            else:
                window.ended = True
                del self._pipes[fd]
                os.close(fd)
        for task in self.tasks.values():
            if task.exit is not None and task.end is None and \
                    all(window.ended for window in task.windows.values()):
                self._finish(task)
        if news:
            self.changed()

    def _enforce_cpu(self) -> None:
        for task in self.tasks.values():
            if task.cpu_seconds and task.exit is None and task.cgroup:
                used = read_counters(task.cgroup + "/cpu.stat").get("usage_usec", 0) / 1e6
                if used > task.cpu_seconds:
                    self.stop(task, signal.SIGKILL, "cpu-limit")


def _rlimits(limits: dict[str, Any]) -> list[tuple[int, int]]:
    found = [(resource.RLIMIT_CORE, 0)]
    if limits.get("cpu_seconds"):
        found.append((resource.RLIMIT_CPU, max(1, int(limits["cpu_seconds"] + 0.999))))
    if limits.get("file_bytes"):
        found.append((resource.RLIMIT_FSIZE, limits["file_bytes"]))
    return found


def _pids(cgroup: str) -> list[int]:
    with open(cgroup + "/cgroup.procs", "rb", buffering=0) as file:
        return [int(line) for line in file.readall().split()]


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _poke(fd: int) -> None:
    try:
        os.write(fd, b"x")
    except BlockingIOError:
        pass  # it is full: whoever waits is woken anyway


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        pass


__all__ = ["CannotStart", "Task", "TaskTable"]
