"""Start one process as a job's first: its user, limits, directory and descriptors.

The child runs no Python: under emulation each page that Python touches after a fork costs a
fault, and a child that prepares itself in Python takes 9 ms where this takes 5
(docs/decisions/003-agent-without-threads.md). What the child must inherit and `subprocess`
cannot set, the agent takes on itself around the fork: it is alone on its thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Sequence

from .place import Account, write_file

#: What Python ignores for itself and a job must not inherit ignored.
DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)


class CannotStart(Exception):
    """The program cannot be started.

    ``reason`` is ``not-found``, ``not-executable``, ``no-directory`` or ``setup``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Limits:
    """Per-process limits; the control group keeps the others. None: no limit."""

    def __init__(self, cpu_seconds: int | None, file_bytes: int | None) -> None:
        self.cpu_seconds = cpu_seconds
        self.file_bytes = file_bytes


def start(argv: list[str], env: dict[str, str], cwd: str, stdio: Sequence[int],
          account: Account | None, limits: Limits, cgroup: str | None, *, alone: bool) -> int:
    """Start a program; its pid once it runs. The caller reaps it. Raises `CannotStart`.

    ``alone``: no process of any job is alive. Then the agent itself takes on the job's user while
    it makes the child, which is 5 ms cheaper under emulation; with others alive it never does,
    because they could send it signals in that moment.
    """
    quick = alone or account is None or account[1] == os.geteuid()
    how = _spawn if quick else _fork
    # What surrounds the spawn is undone in plain `finally` clauses, here and below: generators in
    # `with` statements are more for an emulated processor to run, before every command.
    before = None
    try:
        before = _limit_files(limits.file_bytes)
        if cgroup is None:
            pid = how(argv, env, cwd, stdio, account)
        else:
            pid = _inside(cgroup, how, argv, env, cwd, stdio, account)
    except OSError as error:
        raise _cause(argv[0], cwd, error) from error
    finally:
        if before is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # The hard limits, which the job could not raise, are set from outside: we could not raise our
    # own again everywhere.
    if limits.file_bytes is not None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limits.file_bytes,) * 2)
    if limits.cpu_seconds is not None:
        with contextlib.suppress(ProcessLookupError):
            # SIGXCPU at the limit, SIGKILL a second later for one that ignores it.
            resource.prlimit(pid, resource.RLIMIT_CPU,
                             (limits.cpu_seconds, limits.cpu_seconds + 1))
    return pid


def _spawn(argv: list[str], env: dict[str, str], cwd: str, stdio: Sequence[int],
           account: Account | None) -> int:
    """By posix_spawn, which is a vfork: the agent itself is the user, and in ``cwd``, meanwhile."""
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]
    back = os.getcwd()
    changed = _act_as(account)
    try:
        os.chdir(cwd)
        # Not posix_spawnp, which tries execve in each directory: one that fails has made, and
        # drops, a whole address space.
        return os.posix_spawn(_found(argv[0], env), argv, env, file_actions=actions, setsid=True,
                              setsigdef=DEFAULT_SIGNALS)
    finally:
        if changed:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)
            os.setgroups([0])
        os.chdir(back)


def _fork(argv: list[str], env: dict[str, str], cwd: str, stdio: Sequence[int],
          account: Account | None) -> int:
    """By fork, because the child has to change its user by itself."""
    assert account is not None
    process = subprocess.Popen(argv, env=env, cwd=cwd, stdin=stdio[0], stdout=stdio[1],
                               stderr=stdio[2], start_new_session=True, user=account[1],
                               group=account[2], extra_groups=account[4])
    # We wait for the child ourselves, for its resource usage; `subprocess` must not.
    process.returncode = 0
    return process.pid


def _found(program: str, env: dict[str, str]) -> str:
    """The first file of that name in the task's PATH that its user may execute."""
    if "/" in program:
        return program
    denied = False
    for directory in env.get("PATH", os.defpath).split(":"):
        path = f"{directory}/{program}" if directory else program
        if os.access(path, os.X_OK, effective_ids=True) and not os.path.isdir(path):
            return path
        denied = denied or os.path.exists(path)
    code = errno.EACCES if denied else errno.ENOENT
    raise OSError(code, os.strerror(code), program)


def _inside(cgroup: str, how: Callable[..., int], *call: object) -> int:
    """Make a child in a control group: be in it, and as killable as a job, meanwhile."""
    home = os.path.dirname(os.path.dirname(cgroup))
    killable, back = _kept("/proc/self/oom_score_adj"), _kept(home + "/cgroup.procs")
    try:
        os.pwrite(killable, b"0", 0)
        write_file(cgroup + "/cgroup.procs", "0")
        return how(*call)
    finally:
        os.pwrite(back, b"0", 0)
        os.pwrite(killable, b"-1000", 0)


@functools.cache
def _kept(path: str) -> int:
    """A control file of the agent itself, opened once: opening takes longer than writing."""
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def _act_as(account: Account | None) -> bool:
    """Be a user for whom a program is executed; whether that has to be undone.

    Undoing is possible: the saved ids stay root's. The program gets none of root's: execve copies
    the effective ones (credentials(7)).
    """
    if account is None or account[1] == 0 or os.geteuid() != 0:
        return False
    os.setgroups(account[4])
    os.setresgid(account[2], account[2], 0)
    os.setresuid(account[1], account[1], 0)
    return True


def _limit_files(size: int | None) -> tuple[int, int] | None:
    """Have a file size limit that children inherit; the limit before, None without a new one."""
    if size is None:
        return None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return before


def _cause(program: str, cwd: str, error: OSError) -> CannotStart:
    text = error.strerror or str(error)
    if error.filename == cwd and not os.path.isdir(cwd):
        return CannotStart("no-directory", f"cannot enter {cwd!r}: {text}")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if "/" in program and os.path.lexists(os.path.join(cwd, program)):
            return CannotStart("not-executable", f"{program!r} is there, but the interpreter or "
                               "loader that it names is not")
        return CannotStart("not-found", f"there is no program {program!r} in the machine")
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return CannotStart("setup", f"cannot start {program!r}: {text}")
    return CannotStart("not-executable", f"cannot execute {program!r}: {text}")
