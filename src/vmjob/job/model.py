"""The records: a `Job` is a list of `Task`s with files and limits."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vmjob.errors import BadPath, InputMissing, InputUnreadable, UsageError

__all__ = ["Input", "Job", "Network", "OnFlood", "Output", "Task", "parse_input", "parse_output"]

#: Smallest machine that Debian's kernel and the agent run in with room for a small job, MiB
#: (measured: 96 boots and answers, 80 panics).
LEAST_MEMORY_MB = 128
#: Sizes that a slip of the keyboard makes, not a user.
MOST_MEMORY_MB = 4 * 1024 * 1024
MOST_CPUS = 255
MOST_DISK_GB = 1024
#: Bytes of stdout, and of stderr, that a job may write before `OnFlood` applies.
DEFAULT_STREAM_LIMIT = 1 << 30


class Network(enum.StrEnum):
    """What a job can reach: nothing, or what the user-mode NAT of this computer reaches."""

    NONE = "none"
    NAT = "nat"


class OnFlood(enum.StrEnum):
    """What happens when a job writes more than its stream limit."""

    DISCARD = "discard"  # the rest is thrown away, the job goes on
    STOP = "stop"  # the job is ended


@dataclass(frozen=True)
class Input:
    """A file or directory of the host that the job finds at ``destination``.

    ``destination`` is relative to the job's directory, or absolute in the machine.
    """

    source: Path
    destination: str


@dataclass(frozen=True)
class Output:
    """A file or directory that the job makes (``source``), and where it goes on the host."""

    source: str
    destination: Path


@dataclass(frozen=True)
class Task:
    """One command.

    ``cwd`` defaults to the job's directory, ``user`` to the unprivileged user ``job``. Limits:
    ``cpu_seconds`` and ``memory_bytes`` of all its processes together, ``file_bytes`` of each
    file, ``processes`` at one time; None: the machine's own bounds.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | None = None
    cpu_seconds: float | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    processes: int | None = None


@dataclass(frozen=True)
class Job:
    """What to run, on what kind of machine, within which limits.

    Sizes: ``memory_mb`` MiB, ``disk_gb`` GiB, ``output_limit`` bytes for each output,
    ``stream_limit`` bytes for each of stdout and stderr. ``time_limit`` is seconds from the
    start of the first task to the end of the last (None: none).
    """

    tasks: tuple[Task, ...]
    image: str = "default"
    inputs: tuple[Input, ...] = ()
    outputs: tuple[Output, ...] = ()
    memory_mb: int = 512
    cpus: int = 1
    disk_gb: int = 10
    network: Network = Network.NONE
    time_limit: float | None = None
    output_limit: int | None = None
    stream_limit: int = DEFAULT_STREAM_LIMIT
    on_flood: OnFlood = OnFlood.DISCARD

    def check(self) -> None:
        """Raise the first thing that is wrong with this job; nothing was started then."""
        if not self.tasks or not all(task.argv and task.argv[0] for task in self.tasks):
            raise UsageError("there is no command to run")
        for what, value, least, most in (
                ("memory (MiB)", self.memory_mb, LEAST_MEMORY_MB, MOST_MEMORY_MB),
                ("number of CPUs", self.cpus, 1, MOST_CPUS),
                ("disk (GiB)", self.disk_gb, 1, MOST_DISK_GB)):
            if not least <= value <= most:
                raise UsageError(f"{what}: {value} is not between {least} and {most}")
        if self.time_limit is not None and self.time_limit <= 0:
            raise UsageError(f"the time limit must be more than 0 seconds, not {self.time_limit}")
        for given in self.inputs:
            check_input(given)
        destinations = [output.destination for output in self.outputs]
        for destination in destinations:
            if destinations.count(destination) > 1:
                raise BadPath(f"two outputs would go to {str(destination)!r}",
                              advice="Give each its own place: --out GUEST:HOST.")


def check_input(given: Input) -> None:
    """Raise `InputMissing` or `InputUnreadable` where an input cannot be copied."""
    check_guest_path(given.destination)
    try:
        with given.source.open("rb") if given.source.is_file() else _Nothing():
            found = given.source.exists()
    except PermissionError as error:
        raise InputUnreadable(f"cannot read {str(given.source)!r}: {error.strerror}") from None
    except OSError as error:
        raise InputMissing(f"cannot use {str(given.source)!r}: {error.strerror}") from None
    if not found:
        raise InputMissing(f"there is no {str(given.source)!r}")


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


def check_guest_path(path: str) -> str:
    """A path of the machine that a user may name: no ``..``, no control characters."""
    if not path or path == "/" or "\0" in path or ".." in PurePosixPath(path).parts:
        raise BadPath(f"{path!r} is not a path inside the machine that can be used here")
    if any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise BadPath(f"{path!r} has control characters")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise BadPath(f"{path!a} is not UTF-8") from None
    return path


def parse_input(text: str) -> Input:
    """``SRC[:DST]``; DST defaults to the last part of SRC, in the job's directory."""
    source, colon, destination = text.rpartition(":")
    if not colon or Path(text).exists():
        source, destination = text, ""
    path = Path(source)
    name = destination or Path(path.absolute()).name
    if destination.endswith("/"):
        name = destination + Path(path.absolute()).name
    return Input(path, check_guest_path(name))


def parse_output(text: str) -> Output:
    """``GUEST[:HOST]``; HOST defaults to the last part of GUEST, in the current directory."""
    source, _, destination = text.partition(":")
    check_guest_path(source)
    if not destination and source.startswith("/"):
        raise BadPath(f"where on this computer should {source!r} go?",
                      advice=f"Say it: --out {source}:NAME")
    name = PurePosixPath(source).name
    target = Path(destination or name)
    if destination.endswith("/"):
        target = Path(destination) / name
    return Output(source.rstrip("/"), target.absolute())
