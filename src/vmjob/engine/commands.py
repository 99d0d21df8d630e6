"""What a task becomes in the machine: what the agent is to start, and where."""

from __future__ import annotations

import shlex

from vmjob.job.model import Task

__all__ = ["command"]

#: The shell of every image; it opens a task's files as the task's user, not as the agent.
SHELL = "/bin/sh"


def command(task: Task) -> tuple[list[str], str | None]:
    """The argv of a task, and its directory (None: the job's).

    A task's files are below the job's directory, wherever the task itself is. What it writes to is
    appended to, as the wrappers of BOINC do: several tasks share a file. A daemon's output goes to
    ``NAME.log`` where its task says nothing else.
    """
    stdout = task.stdout or (f"{task.title}.log" if task.daemon else None)
    stderr = task.stderr or (f"{task.title}.log" if task.daemon else None)
    streams = [("<", task.stdin), (">>", stdout), ("2>>", stderr)]
    redirections = [sign + shlex.quote(_plain(path)) for sign, path in streams if path]
    if not redirections:
        return list(task.argv), task.cwd
    steps = [" ".join(["exec", *redirections])]
    if task.cwd is not None:
        steps.append(f"cd {shlex.quote(_plain(task.cwd))}")
    steps.append('exec "$@"')
    return [SHELL, "-c", " && ".join(steps), task.title, *task.argv], None


def _plain(path: str) -> str:
    """A path that a shell takes for nothing else."""
    return f"./{path}" if path.startswith(("-", "&")) else path
