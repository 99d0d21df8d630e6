"""The tasks of a machine: started, fed, drained, limited, ended, reaped.

Everything happens on the agent's one loop. A task ends when its first process does:
whatever it left running is killed, then the last bytes are drained, then its result
is made. (Orphans go to process 1, which reaps them.)
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from . import spawn
from .loop import READ, WRITE, Loop
from .place import Account, Place, read_counters, read_file, write_file
from .streams import Window

#: Seconds between looks at a limit that the kernel does not keep for us.
LIMIT_PERIOD = 1.0
#: Seconds from a task's end until its output is taken to be complete although somebody holds the
#: other end of its pipe: possible only where there is no control group to kill everybody.
DRAIN_PATIENCE = 1.0
#: Seconds from a task's end until its control group is removed, and between attempts while its last
#: processes are still dying. All that are over by then go together: one moment for each of them
#: made the loop look at twenty, and removing each at once came in the way of the next command.
CLEAN_PERIOD = 0.2
#: Seconds from a start until its output is looked at, when the answer waits for the command's end.
#: One that ends before that is looked at once, then: each end of a stream would wake the agent in
#: the middle of the command's exit. Nothing is answered before `server.OUTPUT_PATIENCE` anyway; one
#: that fills its pipe (64 KiB) earlier waits for this.
FIRST_LOOK = 0.01
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
        self.pipes: dict[str, int] = {}
        #: Whether its pipes are looked at already.
        self.heard = False
        self.stdin: int | None = None
        self.stdin_taken = 0
        #: Whoever waits for room in its input.
        self.on_room: Callable[[], None] | None = None
        self.started = time.monotonic()
        self.exit: dict[str, Any] | None = None
        self.ended_by: str | None = None
        self.end: dict[str, Any] | None = None


class TaskTable:
    """All tasks, by number. ``changed()`` is called with every byte of output and every end."""

    def __init__(self, place: Place, loop: Loop, changed: Callable[[], None]) -> None:
        self.place = place
        self.tasks: dict[int, Task] = {}
        #: Grows with each task that is started.
        self.epoch = 0
        #: Tasks whose number the host never learned; they are forgotten when they end.
        self.abandoned: set[int] = set()
        self._prepared: str | None = None
        #: Control groups of tasks that have ended, to be removed.
        self._left: list[str] = []
        self._loop = loop
        self._changed = changed

    # -- what a request asks ---------------------------------------------------------------

    def start(self, asked: dict[str, Any]) -> Task:
        """Start a command; raises `CannotStart`, or `KeyError` for an unknown user."""
        account = self.place.account(asked.get("user"))
        limits = asked.get("limits") or {}
        env = self._environment(account)
        env.update(asked.get("env") or {})
        cwd = self.place.resolve(asked.get("cwd") or "")
        cgroup = self._take_cgroup(limits)
        self.epoch += 1
        task = Task(self.epoch, cgroup, limits.get("cpu_seconds"))
        inner: list[int] = []
        outer: list[int] = []
        try:
            if asked.get("stdin") == "stream":
                reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                os.set_blocking(reader, True)
                inner.append(reader)
                outer.append(writer)
                task.stdin = writer
            else:
                reader = _nothing()
            stdio = [reader]
            for stream in task.windows:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                inner.append(writer)
                outer.append(reader)
                stdio.append(writer)
                os.set_blocking(reader, False)
                task.pipes[stream] = reader
            task.pid = spawn.start(asked["argv"], env, cwd, stdio, account, _limits(limits),
                                   task.cgroup,
                                   alone=all(old.exit for old in self.tasks.values()))
        except BaseException:
            for fd in outer:
                os.close(fd)
            if cgroup:
                self._leave_cgroup(cgroup)
            raise
        finally:
            for fd in inner:
                os.close(fd)
        self.tasks[task.id] = task
        if asked.get("wait_seconds"):
            self._loop.later(("look", task.id), FIRST_LOOK, lambda: self._listen(task))
        else:
            self._listen(task)
        pidfd = os.pidfd_open(task.pid)
        self._loop.watch(pidfd, READ, lambda events: self._exited(task, pidfd))
        if task.cpu_seconds and task.cgroup:
            self._loop.later(("cpu", task.id), LIMIT_PERIOD, lambda: self._enforce_cpu(task))
        return task

    def signal(self, task: Task, number: int, why: str | None = None) -> None:
        """Send a signal to every process of a task; ``why`` is noted as what ended it."""
        if task.exit is None:
            task.ended_by = task.ended_by or why
            self._signal_tree(task, number)

    def forget(self, task: Task) -> None:
        """Drop a task that has ended; its output is gone after this."""
        if task.end is not None:
            self.tasks.pop(task.id, None)

    def tidy(self) -> None:
        """Drop all tasks that have ended, and what is left of them."""
        for task in list(self.tasks.values()):
            self.forget(task)
        self._clean()
        self._prepare_ahead()

    def write_stdin(self, task: Task, offset: int, data: bytes) -> int:
        """Take input at ``offset``; returns how much in all was taken so far.

        Bytes before what was taken are a repetition and are skipped; a gap is refused
        (`ValueError`). A job that reads no more has its input closed.
        """
        if offset > task.stdin_taken:
            raise ValueError("input with a gap")
        rest = data[task.stdin_taken - offset:]
        if task.stdin is not None and rest:
            try:
                task.stdin_taken += os.write(task.stdin, rest)
            except BlockingIOError:
                pass
            except BrokenPipeError:
                self.close_stdin(task)
        return task.stdin_taken

    def when_writable(self, task: Task, call: Callable[[], None]) -> None:
        """Call once when the job has read some of its input, or closed it."""
        if task.stdin is None:
            call()
            return
        task.on_room = call
        self._loop.watch(task.stdin, WRITE, lambda events: self._room(task))

    def stop_waiting(self, task: Task) -> None:
        """Nobody waits for room in a task's input any more."""
        task.on_room = None
        if task.stdin is not None:
            self._loop.unwatch(task.stdin)

    def _room(self, task: Task) -> None:
        call = task.on_room
        self.stop_waiting(task)
        if call:
            call()

    def close_stdin(self, task: Task) -> None:
        """No more input."""
        if task.stdin is not None:
            self._loop.unwatch(task.stdin)
            os.close(task.stdin)
            task.stdin = None
            self._room(task)

    def acknowledge(self, task: Task, stream: str, offset: int) -> None:
        """The host has the stream up to ``offset``; a job that waits for room goes on."""
        window = task.windows[stream]
        was_full = window.room <= 0
        window.acknowledge(offset)
        if was_full and window.room > 0 and stream in task.pipes:
            self._watch(task, stream)

    # -- inside ------------------------------------------------------------------------------

    def _environment(self, account: Account | None) -> dict[str, str]:
        env = {"PATH": os.environ.get("PATH", os.defpath),
               "LANG": "C.UTF-8", "HOME": self.place.workdir,
               "VMJOB_TO_HOST": self.place.to_host, "VMJOB_FROM_HOST": self.place.from_host}
        if account:
            env.update(HOME=account[3], USER=account[0], LOGNAME=account[0])
        return env

    def _prepare_cgroup(self) -> None:
        """Make the next task's control group while nobody waits: it takes 0.7 ms."""
        if self.place.cgroup and self._prepared is None:
            path = f"{self.place.cgroup}/{self.epoch + 1}"
            os.mkdir(path)
            try:
                write_file(path + "/pids.max", str(DEFAULT_PROCESSES))
            except OSError:
                os.rmdir(path)
                raise
            self._prepared = path

    def _prepare_ahead(self) -> None:
        with contextlib.suppress(OSError):  # what is wrong is for the next start to say
            self._prepare_cgroup()

    def _take_cgroup(self, limits: dict[str, Any]) -> str | None:
        self._prepare_cgroup()
        path, self._prepared = self._prepared, None
        if path is None:
            return None
        try:
            if limits.get("processes"):
                write_file(path + "/pids.max", str(limits["processes"]))
            if limits.get("memory_bytes"):
                write_file(path + "/memory.max", str(limits["memory_bytes"]))
        except OSError:
            os.rmdir(path)  # half set, it must not be anybody's
            raise
        return path

    def _leave_cgroup(self, path: str) -> None:
        if not self._left:
            self._loop.later("clean", CLEAN_PERIOD, self._clean)
        self._left.append(path)

    def _clean(self) -> None:
        """Remove the control groups that are over, but those whose last processes still die."""
        self._left = [path for path in self._left if not _removed(path)]
        if self._left:
            self._loop.later("clean", CLEAN_PERIOD, self._clean)
        else:
            self._loop.forget("clean")

    def _signal_tree(self, task: Task, number: int) -> None:
        if task.cgroup and number == signal.SIGKILL:
            write_file(task.cgroup + "/cgroup.kill", "1")
        elif task.cgroup:
            for pid in read_file(task.cgroup + "/cgroup.procs").split():
                _kill(int(pid), number)
        else:
            try:
                os.killpg(task.pid, number)
            except (ProcessLookupError, PermissionError):
                pass

    def _listen(self, task: Task) -> None:
        task.heard = True
        for stream in task.pipes:
            self._watch(task, stream)

    def _watch(self, task: Task, stream: str) -> None:
        fd = task.pipes[stream]
        self._loop.watch(fd, READ, lambda events: self._drain(task, stream))

    def _drain(self, task: Task, stream: str) -> None:
        """Move what a pipe has into its window."""
        fd, window = task.pipes[stream], task.windows[stream]
        try:
            data = os.read(fd, min(PIPE_READ, window.room))
        except BlockingIOError:
            return
        if data:
            window.append(data)
            if window.room <= 0:
                self._loop.unwatch(fd)
            self._changed()
        else:
            self._end_stream(task, stream)

    def _drain_whole(self, task: Task, stream: str) -> None:
        """Go on until there is no more, or no room for it: whoever wrote it has ended."""
        window = task.windows[stream]
        while stream in task.pipes and window.room > 0:
            before = window.end
            self._drain(task, stream)
            if window.end == before:
                return

    def _end_stream(self, task: Task, stream: str) -> None:
        fd = task.pipes.pop(stream)
        self._loop.unwatch(fd)
        os.close(fd)
        if not task.pipes and task.exit is not None:
            self._finish(task)

    def _exited(self, task: Task, pidfd: int) -> None:
        self._loop.unwatch(pidfd)
        os.close(pidfd)
        self._loop.forget(("cpu", task.id))
        _, status, usage = os.wait4(task.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        # Before the task counts as ended: its first process is gone, its group may not be.
        self._signal_tree(task, signal.SIGKILL)
        task.exit = {
            "exit_code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "wall_seconds": time.monotonic() - task.started,
            "rusage": dict(zip(RUSAGE_FIELDS, usage, strict=False)),
        }
        self.close_stdin(task)
        if not task.heard:
            self._loop.forget(("look", task.id))
            self._listen(task)
            for stream in list(task.pipes):
                self._drain_whole(task, stream)
        elif not task.pipes:
            self._finish(task)
        if task.pipes:
            self._loop.later(("drain", task.id), DRAIN_PATIENCE, lambda: self._abandon(task))

    def _abandon(self, task: Task) -> None:
        """End the streams that nobody has written to for a while."""
        for stream in list(task.pipes):
            window = task.windows[stream]
            before = window.end
            if window.room > 0:
                self._drain(task, stream)
                if stream in task.pipes and window.end == before:
                    self._end_stream(task, stream)
        if task.pipes:
            self._loop.later(("drain", task.id), DRAIN_PATIENCE, lambda: self._abandon(task))

    def _finish(self, task: Task) -> None:
        """All is drained: make the result."""
        assert task.exit is not None
        self._loop.forget(("drain", task.id))
        facts: dict[str, Any] = {"oom_kills": 0, "cpu_seconds": None, "memory_peak_bytes": None}
        if task.cgroup:
            facts["cpu_seconds"] = _cpu_seconds(task.cgroup)
            facts["oom_kills"] = read_counters(task.cgroup + "/memory.events").get("oom_kill", 0)
            facts["memory_peak_bytes"] = int(read_file(task.cgroup + "/memory.peak") or 0)
            self._leave_cgroup(task.cgroup)
        if task.ended_by is None and facts["oom_kills"] and task.exit["signal"] == signal.SIGKILL:
            task.ended_by = "out-of-memory"
        if task.ended_by is None and self._spent(task, facts["cpu_seconds"]):
            task.ended_by = "cpu-limit"
        task.end = {**task.exit, **facts, "ended_by": task.ended_by}
        self._changed()
        if task.id in self.abandoned:
            self.abandoned.discard(task.id)
            self.forget(task)
        self._loop.later("prepare", 0, self._prepare_ahead)

    def _spent(self, task: Task, cpu_seconds: float | None) -> bool:
        """Whether the kernel ended a task because it had used its CPU time."""
        assert task.exit is not None
        if task.exit["signal"] == signal.SIGXCPU:
            return True
        return (task.exit["signal"] == signal.SIGKILL and task.cpu_seconds is not None
                and cpu_seconds is not None and cpu_seconds >= task.cpu_seconds)

    def _enforce_cpu(self, task: Task) -> None:
        if task.exit is None and task.cgroup and task.cpu_seconds:
            if _cpu_seconds(task.cgroup) > task.cpu_seconds:
                self.signal(task, signal.SIGKILL, "cpu-limit")
            self._loop.later(("cpu", task.id), LIMIT_PERIOD, lambda: self._enforce_cpu(task))


@functools.cache
def _nothing() -> int:
    """The input of commands that get none."""
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def _removed(cgroup: str) -> bool:
    try:
        os.rmdir(cgroup)
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True


def _cpu_seconds(cgroup: str) -> float:
    return read_counters(cgroup + "/cpu.stat").get("usage_usec", 0) / 1e6


def _limits(asked: dict[str, Any]) -> spawn.Limits:
    seconds = asked.get("cpu_seconds")
    return spawn.Limits(max(1, int(seconds + 0.999)) if seconds else None,
                        asked.get("file_bytes") or None)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass
