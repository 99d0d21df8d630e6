"""The directory that a job runs in when it is to survive: everything of the job is inside it.

    job.json            the job as it was asked for, and on what kind of machine; in the slot of a
                        machine without a job, machine.json
    stdin               its input, whole
    stdout, stderr      its output so far
    checkpoints/        see `generations`
    machine/            the machine, while one runs
    result.json         the record, once the job has ended; checkpoints are gone then
    lock, owner.json    held by the process that carries the job

A slot has one owner; the kernel frees its lock when the owner dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from vmjob.engine.generations import Generations
from vmjob.engine.record import Record
from vmjob.errors import Busy, HomeUnusable, HostDiskFull, SlotUnusable, UsageError
from vmjob.home import remove_tree
from vmjob.host import durable
from vmjob.job.model import Job, Network, Task

__all__ = ["Asked", "AskedMachine", "Slot", "Streams"]

LOCK, OWNER, JOB, RESULT = "lock", "owner.json", "job.json", "result.json"
MACHINE = "machine.json"
STREAMS = ("stdout", "stderr")
#: The copy of the job's input, which is made before the job is written down.
STDIN = "stdin"
#: What there may be in a slot that has no job: of one who was killed before it had.
BEFORE_JOB = frozenset({LOCK, OWNER, STDIN, f"{JOB}.new", f"{MACHINE}.new",
                        "checkpoints"})
#: Longest file of ours that is read, bytes.
MAX_FILE = 64 << 20

T = TypeVar("T")


class Asked(msgspec.Struct, frozen=True):
    """What a slot's job was asked for with; ``events``: the file that they are appended to."""

    job: Job
    accel: str = "auto"
    cpu: str = "host"
    checkpoint_every: float | None = None
    events: str | None = None
    remote_ports: bool = False
    hypervisor: str = "auto"


class AskedMachine(msgspec.Struct, frozen=True):
    """What a machine without a job was asked for with; see `vmjob.api.AsyncMachine.create`."""

    image: str = "default"
    memory_mb: int = 512
    cpus: int = 1
    disk_gb: int = 10
    network: str = "none"
    accel: str = "auto"
    cpu: str = "host"
    priority: str = "low"
    hypervisor: str = "auto"

    def check(self) -> None:
        """Raise `UsageError` for a machine that cannot be."""
        try:
            network = Network(self.network)
        except ValueError:
            raise UsageError(f"{self.network!r} is not a network: use none or nat") from None
        Job(tasks=(Task(("-",)),), memory_mb=self.memory_mb, cpus=self.cpus, disk_gb=self.disk_gb,
            network=network).check()


class Slot:
    """A slot that is ours. Made by `claim`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.generations = Generations(root / "checkpoints")

    @classmethod
    @contextlib.contextmanager
    def claim(cls, root: Path) -> Iterator[Slot]:
        """Own a slot until the block ends; the directory is made when it is missing.

        What a killed owner left of its machine is removed. Raises `Busy` when another process owns
        it, `HomeUnusable`, `HostDiskFull`; `SlotUnusable` for a directory of something else.
        """
        _check_ours(root)
        try:
            if not root.is_dir():
                root.mkdir(mode=0o700, parents=True, exist_ok=True)
                durable.sync(root.parent)  # or a power cut takes it with all that is in it
            fd = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise (HostDiskFull if error.errno == 28 else HomeUnusable)(
                f"cannot use {root} as a slot: {error.strerror}") from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"the slot {root} belongs to another vmjob process"
                           f"{_owner(root)}") from None
            try:
                try:
                    (root / OWNER).write_text(json.dumps(
                        {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
                    slot = cls(root)
                    slot.clean()
                except OSError as error:
                    raise (HostDiskFull if error.errno == 28 else HomeUnusable)(
                        f"cannot use {root} as a slot: {error.strerror}") from error
                yield slot
            finally:
                (root / OWNER).unlink(missing_ok=True)
        finally:
            os.close(fd)

    def clean(self) -> None:
        """Remove what an owner that was killed had no time to remove; nothing that may be others'.

        Raises `SlotUnusable`; `CheckpointNewer`, and then nothing was removed.
        """
        if self.has_job:
            self.asked()
        elif (self.root / MACHINE).exists():
            self.asked_machine()
        else:
            (self.root / STDIN).unlink(missing_ok=True)
            return
        ended = self.result() is not None
        if not ended:
            self.generations.check()
        remove_tree(self.root / "machine")
        if ended:
            self.generations.clear()
        else:
            self.generations.tidy()

    # -- the job ---------------------------------------------------------------------------------

    @property
    def has_job(self) -> bool:
        return (self.root / JOB).exists()

    def begin(self, asked: Asked) -> None:
        """Write down what is to be done, before any of it is.

        Raises `SlotUnusable`; `UsageError` for words that are not UTF-8 (paths may be anything).
        """
        if self.has_job:
            raise SlotUnusable(f"the slot {self.root} has a job already",
                               advice="Continue it with --resume, or give another directory.")
        job = asked.job  # whoever continues it may be in another directory
        inputs = tuple(replace(given, source=given.source.absolute()) for given in job.inputs)
        asked = msgspec.structs.replace(asked, job=replace(job, inputs=inputs))
        try:
            data = msgspec.json.encode(asked, enc_hook=_encoded)
        except UnicodeEncodeError as error:
            raise UsageError(f"a job in a slot is UTF-8, and {error.object!a:.200} is not"
                             ) from None
        self._write(JOB, data)

    def asked(self) -> Asked:
        """What is to be done; raises `SlotUnusable`."""
        return self._read(JOB, Asked, "job")

    def begin_machine(self, asked: AskedMachine) -> None:
        """The slot is for a machine, a new one; raises `SlotUnusable` when it has a job."""
        if self.has_job:
            raise SlotUnusable(f"the slot {self.root} has a job", advice="Give another directory.")
        self.generations.restart()
        self._write(MACHINE, msgspec.json.encode(asked))

    def asked_machine(self) -> AskedMachine:
        """What its machine was asked for with; raises `SlotUnusable`."""
        return self._read(MACHINE, AskedMachine, "machine")

    def keep_priority(self, priority: str) -> None:
        """Whoever continues its machine gives it this priority."""
        self._write(MACHINE, msgspec.json.encode(
            msgspec.structs.replace(self.asked_machine(), priority=priority)))

    def end(self, record: Record) -> None:
        """The job has ended: keep its record, and nothing that it would be continued with."""
        self._write(RESULT, msgspec.json.encode(record))
        self.generations.clear()

    def result(self) -> Record | None:
        """The record of a job that has ended."""
        if not (self.root / RESULT).exists():
            return None
        return self._read(RESULT, Record, "result")

    @contextlib.contextmanager
    def machine_place(self) -> Iterator[tuple[str, Path]]:
        """A machine's id and directory, as `vmjob.engine.ownership.claim` gives them."""
        directory = self.root / "machine"
        remove_tree(directory)
        try:
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise HostDiskFull(f"cannot make a machine's directory in {self.root}: "
                               f"{error.strerror}") from error
        try:
            yield os.urandom(6).hex(), directory
        finally:
            remove_tree(directory)

    def disk_bytes(self) -> int:
        """What the slot takes on the disk, without the machine that runs in it."""
        return self.generations.disk_bytes() + sum(
            path.lstat().st_blocks * 512 for path in self.root.iterdir() if path.is_file())

    def _write(self, name: str, data: bytes) -> None:
        try:
            durable.write(self.root / f"{name}.new", data)
            durable.replace(self.root / f"{name}.new", self.root / name)
            durable.sync(self.root)
        except OSError as error:
            raise HostDiskFull(f"cannot write {self.root / name}: {error.strerror}") from error

    def _read(self, name: str, kind: type[T], what: str) -> T:
        path = self.root / name
        try:
            with path.open("rb") as file:
                return msgspec.json.decode(file.read(MAX_FILE), type=kind, dec_hook=_decoded)
        except FileNotFoundError:
            raise SlotUnusable(f"there is no {what} in the slot {self.root}") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise SlotUnusable(f"the {what} in the slot {self.root} cannot be read: "
                               f"{error}") from error


class Streams:
    """A job's output in its slot."""

    def __init__(self, slot: Slot, position: dict[str, int]) -> None:
        """Open them and forget all after ``position``, which is done again.

        Raises `HostDiskFull`; `SlotUnusable` when there is less than that.
        """
        self._files: dict[str, BinaryIO] = {}
        self._using = threading.Lock()
        with contextlib.ExitStack() as opened:
            for name in STREAMS:
                path = slot.root / name
                try:
                    file = opened.enter_context(path.open("ab", buffering=0))
                    if file.tell() < position.get(name, 0):
                        raise SlotUnusable(f"{path} is shorter than its checkpoint says")
                    file.truncate(position.get(name, 0))
                except OSError as error:
                    raise HostDiskFull(f"cannot write {path}: {error.strerror}") from error
                self._files[name] = file
            try:
                durable.sync(slot.root)  # their names: a checkpoint is worth nothing without them
            except OSError as error:
                raise HostDiskFull(f"cannot write {slot.root}: {error.strerror}") from error
            opened.pop_all()

    def write(self, stream: str, data: bytes) -> None:
        """Append; raises `HostDiskFull`."""
        try:
            view = memoryview(data)
            while view:
                view = view[self._files[stream].write(view):]
        except OSError as error:
            raise HostDiskFull(f"cannot write the job's {stream}: {error.strerror}") from error

    def sync(self) -> None:
        """Return when all that was written is on the disk; may be called from any thread.

        Raises `HostDiskFull`; `ValueError` when they are closed.
        """
        with self._using:  # once it is dup'ed, a file may be closed while it is being synced
            copies = [os.dup(file.fileno()) for file in self._files.values()]
        try:
            for copy in copies:
                os.fsync(copy)
        except OSError as error:
            raise HostDiskFull(f"cannot write the job's output: {error.strerror}") from error
        finally:
            for copy in copies:
                os.close(copy)

    def close(self) -> None:
        with self._using:
            for file in self._files.values():
                file.close()


def _encoded(value: object) -> object:
    """A path as text; one that is not UTF-8 as its bytes."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return list(os.fsencode(str(value)))
    return str(value)


def _decoded(kind: type, value: object) -> object:
    if issubclass(kind, Path):
        return kind(os.fsdecode(bytes(value)) if isinstance(value, list) else str(value))
    raise NotImplementedError(kind)


def _check_ours(root: Path) -> None:
    """Refuse a directory that has files and no job: somebody's ``checkpoints/`` are not ours."""
    try:
        found = {path.name for path in root.iterdir()}
    except OSError:
        return  # whoever makes or opens it says what is wrong
    # The lock comes first: where it is not, the rest is of somebody else.
    if not found or (LOCK in found and (found <= BEFORE_JOB or found & {JOB, MACHINE})):
        return
    raise SlotUnusable(f"the directory {root} is in use, and not by a job",
                       advice="Give a new or an empty directory.")


def _owner(root: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads((root / OWNER).read_text(encoding="utf-8"))
        return f" (process {int(owner['pid'])})"
    return ""
