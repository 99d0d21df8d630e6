"""The records: a `Job` is a list of `Task`s with files and limits.

Whatever language a job was written in, it becomes these; see the readers beside this module.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from vmjob.errors import BadPath, UsageError
from vmjob.job.files import (
    FOLDER_NAME,
    FOLDER_NAMES,
    Folder,
    Input,
    Output,
    check_guest_path,
    check_input,
)

__all__ = ["Job", "Task", "Triggers", "Forward", "Hardware", "Network", "OnFlood"]

#: Smallest machine that Debian's kernel and the agent run in with room for a small job, MiB
#: (measured: 96 boots and answers, 80 panics).
LEAST_MEMORY_MB = 128
#: Sizes that a slip of the keyboard makes, not a user.
MOST_MEMORY_MB = 4 * 1024 * 1024
MOST_CPUS = 255
MOST_DISK_GB = 1024
#: Bytes of stdout, and of stderr, that a job may write before `OnFlood` applies.
DEFAULT_STREAM_LIMIT = 1 << 30
#: Bytes of each half of the mailbox, a floppy disk of 28672: one for the guest, one for the host.
MAILBOX_HALF = 14335
#: The folder in which trigger files are.
SHARED = "shared"


class Network(enum.StrEnum):
    """What a job can reach: nothing, or what the user-mode NAT of this computer reaches."""

    NONE = "none"
    NAT = "nat"


class OnFlood(enum.StrEnum):
    """What happens when a job writes more than its stream limit."""

    DISCARD = "discard"  # the rest is thrown away, the job goes on
    STOP = "stop"  # the job is ended


@dataclass(frozen=True)
class Task:
    """One command.

    ``cwd`` defaults to the job's directory, ``user`` to the unprivileged user ``job``. Limits:
    ``cpu_seconds`` and ``memory_bytes`` of all its processes together, ``file_bytes`` of each
    file, ``processes`` at one time; None: the machine's own bounds.

    ``name`` is for messages; '' means the program's. ``stdin``, ``stdout``, ``stderr``: files in
    the machine (relative to the job's directory) instead of the job's streams; the output files are
    appended to. ``weight``: its share of the job's fraction done. ``fraction_file``: where it
    writes its own, a number from 0 to 1 on the last line. ``checkpoint_file``: one whose change
    says that the program could start again from there. ``time_limit``: seconds of run time after
    which it is ended, which counts as success. ``may_fail``: the tasks after it run even so.
    ``daemon``: it runs beside the tasks after it in the job's list, until the last has ended.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | None = None
    cpu_seconds: float | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    processes: int | None = None
    name: str = ""
    stdin: str | None = None
    stdout: str | None = None
    stderr: str | None = None
    weight: float = 1.0
    fraction_file: str | None = None
    checkpoint_file: str | None = None
    time_limit: float | None = None
    may_fail: bool = False
    daemon: bool = False

    @property
    def title(self) -> str:
        """What to call it."""
        return self.name or self.argv[0].rpartition("/")[2]


@dataclass(frozen=True)
class Triggers:
    """Files by which a job speaks to whoever runs it; paths below the folder named ``shared``.

    ``completion``: the job is over; first line the exit code, second whether the volunteer is to be
    told (a number), then a message. ``temporary_exit``: the job is to be continued later; first
    line seconds, then as above. ``fraction_done``: a number from 0 to 1 on the last line.
    ``heartbeat``: a file that must change every ``heartbeat_interval`` seconds of run time.
    ``trickles``: messages for the project's server, removed when they are sent. ``uploads``: output
    files to be uploaded as soon as they are there. ``credit``: floating-point and integer
    operations so far, one number on each of the first two lines.
    """

    completion: str | None = None
    temporary_exit: str | None = None
    fraction_done: str | None = None
    heartbeat: str | None = None
    heartbeat_interval: float = 600.0
    trickles: tuple[str, ...] = ()
    uploads: tuple[str, ...] = ()
    credit: str | None = None


@dataclass(frozen=True)
class Forward:
    """A TCP port of this computer that leads to one of the machine.

    ``host_port`` 0: any that is free. Bound to loopback unless ``remote``. ``web``: it is a page to
    look at, whose address whoever shows the job wants to know.
    """

    guest_port: int
    host_port: int = 0
    remote: bool = False
    web: bool = False


@dataclass(frozen=True)
class Hardware:
    """Devices that only some jobs want; paths are files of the host, never written.

    ``disk``: the job's own disk image, which is booted instead of a vmjob image; ``iso``: a CD,
    which is booted where there is no disk; ``iso_first``: both, the CD first. ``cache_disk``: a
    second disk. ``mailbox``: what the first half of a 28 KiB floppy disk holds. ``display``: a
    screen, to be seen over VNC from this computer with a password; ``screenshot``: where a picture
    of it goes when the job fails.
    """

    disk: Path | None = None
    iso: Path | None = None
    iso_first: bool = False
    cache_disk: Path | None = None
    mailbox: bytes | None = None
    display: bool = False
    screenshot: Path | None = None

    @property
    def screen(self) -> bool:
        """Whether a machine needs a screen for it."""
        return self.display or self.screenshot is not None


@dataclass(frozen=True)
class Job:
    """What to run, on what kind of machine, within which limits.

    Sizes: ``memory_mb`` MiB, ``disk_gb`` GiB, ``output_limit`` bytes for each output,
    ``stream_limit`` bytes for each of stdout and stderr. ``time_limit`` is seconds from the
    start of the first task to the end of the last (None: none); after ``duration`` seconds the job
    is ended as well, but has succeeded.

    ``cpu``: `MachineSpec.cpu_model`. ``packages``: Debian packages or tar archives of the host that
    are installed in the machine first. ``announce``: a directory where files tell other programs of
    this computer the ports of the job's page (``vbox_webapi.xml``) and of its screen
    (``vbox_remote_desktop.xml``). ``tasks``: none where the machine boots the job's own disk,
    which knows what to do. ``checkpoint_every``: seconds of run time between
    checkpoints where there is a slot; None: whatever the caller chooses; 0: none but the last one.
    ``trickle_every``: seconds of run time between trickles that tell the run time; None: none.
    ``duration_file``: a file that is written when ``duration`` is over, for who waits for it.
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
    cpu: str | None = None
    folders: tuple[Folder, ...] = ()
    triggers: Triggers = Triggers()
    duration: float | None = None
    checkpoint_every: float | None = None
    trickle_every: float | None = None
    forwards: tuple[Forward, ...] = ()
    announce: Path | None = None
    hardware: Hardware = Hardware()
    packages: tuple[Path, ...] = ()
    duration_file: Path | None = None

    @property
    def tells_its_fraction(self) -> bool:
        """Whether some part of it says how much is done; a message of a task's may as well."""
        return (self.triggers.fraction_done is not None or len(self.tasks) > 1
                or any(task.fraction_file is not None for task in self.tasks))

    def check(self) -> None:
        """Raise the first thing that is wrong with this job; nothing was started then."""
        own_disk = self.hardware.disk is not None or self.hardware.iso is not None
        if (not (self.tasks or own_disk)
                or not all(task.argv and task.argv[0] for task in self.tasks)):
            raise UsageError("there is no command to run")
        if self.tasks and all(task.daemon for task in self.tasks):
            raise UsageError("all tasks are daemons: there is none whose end is the job's")
        for what, value, least, most in (
                ("memory (MiB)", self.memory_mb, LEAST_MEMORY_MB, MOST_MEMORY_MB),
                ("number of CPUs", self.cpus, 1, MOST_CPUS),
                ("disk (GiB)", self.disk_gb, 1, MOST_DISK_GB)):
            if not least <= value <= most:
                raise UsageError(f"{what}: {value} is not between {least} and {most}")
        for what, seconds in (("time limit", self.time_limit), ("duration", self.duration)):
            if seconds is not None and seconds <= 0:
                raise UsageError(f"the {what} must be more than 0 seconds, not {seconds}")
        for given in self.inputs:
            check_input(given)
        for folder in self.folders:
            if folder.destination:
                check_guest_path(folder.destination)
        names = [folder.name for folder in self.folders]
        for name in names:
            if not FOLDER_NAME.fullmatch(name):
                raise UsageError(f"{name!r} is no name of a folder: {FOLDER_NAMES}")
        if len(set(names)) != len(names):
            raise UsageError("two folders have one name")
        heard = {folder.name for folder in self.folders if folder.live and folder.writable}
        if self.triggers != Triggers() and SHARED not in heard:
            raise UsageError(f"trigger files need a folder named {SHARED!r}, live and writable")
        destinations = [output.destination for output in self.outputs]
        for destination in destinations:
            if destinations.count(destination) > 1:
                raise BadPath(f"two outputs would go to {str(destination)!r}",
                              advice="Give each its own place: --out GUEST:HOST.")
