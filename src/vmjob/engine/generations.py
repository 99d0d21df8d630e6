"""A job's checkpoints on disk: two generations, each whole or not there at all.

    checkpoints/NNNNNN.json     the manifest of generation N: what it needs, sizes and checksums
    checkpoints/...             the driver's files; several generations may need the same one
    checkpoints/verified        which files were verified since this computer's start

A generation exists once its manifest has its name. Before that, every file it needs is on the disk;
nothing that it needs is changed afterwards. The generation before it is kept until the next one is
there, so whatever a crash or a power cut spoils, one of the two is good.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import msgspec

from vmjob.engine.progress import Progress
from vmjob.errors import CheckpointFailed, CheckpointNewer, CheckpointUnusable
from vmjob.home import remove_tree
from vmjob.host import durable
from vmjob.host.digest import digest
from vmjob.host.facts import boot_id
from vmjob.host.seal import read_seal, seal_of, write_seal
from vmjob.machine.contract import Checkpoint, Saved

__all__ = ["Draft", "Generation", "Generations"]

#: Raise this when an older vmjob could not continue from what this one writes. It then refuses: the
#: seal around a manifest, and this field in it, are what every vmjob must be able to read.
FORMAT = 1
#: Generations that are kept.
KEPT = 2
#: Digits of a generation's number in its names.
DIGITS = 6
#: Longest manifest, bytes; a longer one is never published. Most of it is what is agreed of shared
#: folders, 100 bytes and a name for each file: 10,000 with the longest names take 40 MiB.
MAX_MANIFEST = 64 << 20
NUMBER = re.compile(rf"\d{{{DIGITS},}}")
MANIFEST = re.compile(rf"(\d{{{DIGITS},}})\.json")
VERIFIED = "verified"


class File(msgspec.Struct, frozen=True):
    """One file that a generation needs; ``sha256`` as `vmjob.host.digest.digest` has it."""

    size: int
    sha256: str


class Generation(msgspec.Struct, frozen=True):
    """The manifest: a checkpoint of the driver's, with what the engine must know to go on.

    ``processor``: what the guest saw of this computer's processor ('' where it is emulated).
    ``shape``: the part of the `MachineSpec` that the machine was made with. ``still_seconds``: how
    long the guest stood still for it; ``written_bytes``: of files that were new then.
    """

    format: int
    number: int
    created: float
    driver: str
    processor: str
    shape: dict[str, Any]
    state: dict[str, Any]
    files: dict[str, File]
    progress: Progress
    still_seconds: float = 0.0
    written_bytes: int = 0


class _Sealed(msgspec.Struct, frozen=True):
    """The manifest's file: its bytes, and their checksum."""

    sha256: str
    generation: msgspec.Raw


class _Format(msgspec.Struct, frozen=True):
    """All that can be said of a manifest before its format is known."""

    format: int


@dataclass(frozen=True)
class Draft:
    """What `Generations.publish` makes a generation of."""

    number: int
    created: float
    driver: str
    processor: str
    shape: dict[str, Any]
    progress: Progress


class Generations:
    """The generations in one directory; one process at a time may use it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)
        #: Held while a generation is made: tidying up behind one would take another's files.
        self.turn = anyio.Lock()
        #: What was wrong with those that `tidy` removed, until somebody asks.
        self._lost: list[CheckpointUnusable] = []

    def next_number(self) -> int:
        """A number above every one that was ever used here."""
        used = [NUMBER.match(path.name) for path in self.directory.iterdir()]
        return max((int(each[0]) for each in used if each), default=0) + 1

    def publish(self, draft: Draft, checkpoint: Checkpoint) -> Generation:
        """Make a checkpoint the newest generation; older ones but one are removed.

        Raises `CheckpointFailed`, `OSError`; the older generations are then as they were.
        """
        known: dict[str, File] = {}
        for older in self._manifests():
            with contextlib.suppress(CheckpointUnusable):
                known.update(self._read(older).files)
        files = {}
        for name in checkpoint.files:
            if name not in known:
                durable.sync(self.directory / name)
            files[name] = known.get(name) or self._describe(name)
        generation = Generation(FORMAT, draft.number, draft.created, draft.driver, draft.processor,
                                draft.shape, checkpoint.state, files, draft.progress,
                                checkpoint.still_seconds, checkpoint.written_bytes)
        sealed = _sealed(generation)
        if len(sealed) > MAX_MANIFEST:
            # The driver makes its next checkpoint from this one's files; not from those of others
            # that failed before, which would fill the disk.
            self.tidy(checkpoint.files)
            raise CheckpointFailed(
                f"a checkpoint's manifest would be longer than {MAX_MANIFEST >> 20} MiB: the job "
                "has too many files in its shared folders")
        name = f"{draft.number:0{DIGITS}}.json"
        beside = self.directory / f"{name}.new"
        durable.write(beside, sealed)
        durable.sync(self.directory)  # the names of its files, before the name that needs them
        durable.replace(beside, self.directory / name)
        durable.sync(self.directory)
        self.tidy()
        self._seal(generation, {name for name in files if name not in known})
        return generation

    def check(self) -> None:
        """Raise `CheckpointNewer` when a newer vmjob has been here; changes nothing."""
        for path in self._manifests():
            with contextlib.suppress(CheckpointUnusable):
                self._read(path)

    def newest_first(self) -> Iterator[Generation | CheckpointUnusable]:
        """The generations that can be used, verified, and what is wrong with the others."""
        lost, self._lost = self._lost, []
        yield from lost
        for path in self._manifests():
            try:
                generation = self._read(path)
                self.verify(generation)
            except CheckpointUnusable as error:
                yield error
            else:
                yield generation

    def listed(self) -> list[Generation]:
        """The generations whose manifest can be read, newest first; their files are not verified.

        Needs no ownership: one that is removed meanwhile is left out.
        """
        found = []
        for path in self._manifests():
            with contextlib.suppress(CheckpointUnusable):
                found.append(self._read(path))
        return found

    def bytes_of(self, generation: Generation) -> int:
        """What a generation's files take on the disk; some may be another's as well."""
        total = 0
        for name in generation.files:
            with contextlib.suppress(FileNotFoundError):
                total += (self.directory / name).lstat().st_blocks * 512
        return total

    def verify(self, generation: Generation) -> None:
        """Raise `CheckpointUnusable` unless every file is what it was when it was written.

        What was verified since this computer's start, and not touched since, is not read again.
        """
        parts = self._verified()
        read = set()
        for name, file in generation.files.items():
            path = self.directory / name
            try:
                if "/" in name or path.is_symlink() or path.stat().st_size != file.size:
                    raise CheckpointUnusable(f"checkpoint {generation.number} is damaged: {name}")
                now = seal_of([(path, file.sha256)])["parts"]
                if isinstance(now, dict) and parts.get(name) == now[name]:
                    continue
                found = digest(path)
                read.add(name)
            except OSError as error:
                raise CheckpointUnusable(f"checkpoint {generation.number} cannot be read: "
                                         f"{name}: {error.strerror}") from error
            if found != file.sha256:
                raise CheckpointUnusable(f"checkpoint {generation.number} is damaged: {name}")
        self._seal(generation, read)

    def go_back(self, number: int) -> None:
        """The job goes on from this generation; what was newer is removed, for good.

        Before anything else changes in the slot: a power cut must not bring back a generation
        whose output was given up for an older one's.
        """
        newer = [path for path in self._manifests() if int(path.stem) > number]
        if newer:
            for path in newer:
                _discard(path)
            durable.sync(self.directory)
            self.tidy()

    def saved(self, generation: Generation) -> Saved:
        """What a driver continues from."""
        return Saved(self.directory, generation.state)

    def tidy(self, also: Iterable[str] = ()) -> None:
        """Remove all but the newest generations and the files that are ``also`` needed.

        That is what a crash left half-made, too.
        """
        needed = {VERIFIED, *also}
        kept = 0
        for path in self._manifests():
            if kept < KEPT:
                try:
                    needed |= {path.name, *self._read(path).files}
                except CheckpointUnusable as error:
                    self._lost.append(error)
                else:
                    kept += 1
                    continue
            _discard(path)
        for path in self.directory.iterdir():
            if path.name not in needed:
                _discard(path)

    def restart(self) -> None:
        """Forget all generations: the job begins anew."""
        for path in self._manifests():
            _discard(path)
        self.tidy()

    def clear(self) -> None:
        """Remove everything, the directory too."""
        remove_tree(self.directory)

    def disk_bytes(self) -> int:
        """What all of it takes on the disk."""
        return sum(path.lstat().st_blocks * 512 for path in self.directory.iterdir())

    def _manifests(self) -> list[Path]:
        return sorted((path for path in self.directory.iterdir()
                       if MANIFEST.fullmatch(path.name)),
                      key=lambda path: int(path.stem), reverse=True)

    def _read(self, path: Path) -> Generation:
        try:
            # What is no plain file was not written by us; a pipe must not keep us waiting.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                                   | os.O_NONBLOCK), "rb") as file:
                sealed = msgspec.json.decode(file.read(MAX_MANIFEST), type=_Sealed)
            if _checksum(sealed.generation) != sealed.sha256:
                raise CheckpointUnusable(f"the checkpoint {path.stem} is damaged: its manifest")
            if msgspec.json.decode(sealed.generation, type=_Format).format > FORMAT:
                raise CheckpointNewer(f"the checkpoint {path.stem} in {self.directory} was made by "
                                      "a newer vmjob")
            generation = msgspec.json.decode(sealed.generation, type=Generation)
        except (OSError, msgspec.MsgspecError) as error:
            raise CheckpointUnusable(
                f"the checkpoint {path.stem} cannot be read: {error}") from error
        if generation.format != FORMAT or generation.number != int(path.stem):
            raise CheckpointUnusable(f"the checkpoint {path.stem} is of another version of vmjob")
        return generation

    def _describe(self, name: str) -> File:
        path = self.directory / name
        return File(path.stat().st_size, digest(path))

    def _verified(self) -> dict[str, Any]:
        """What was verified since this computer's start, by name, as it was then."""
        seal = read_seal(self.directory / VERIFIED)
        if isinstance(seal, dict) and seal.get("boot") == boot_id():
            parts = seal.get("parts")
            return parts if isinstance(parts, dict) else {}
        return {}

    def _seal(self, generation: Generation, read: set[str]) -> None:
        """Remember that its files are good: those just ``read``, and those under an older seal."""
        with contextlib.suppress(OSError):  # then it is read again next time
            before = self._verified()
            seal = seal_of((self.directory / name, file.sha256)
                           for name, file in generation.files.items())
            parts = seal["parts"]
            assert isinstance(parts, dict)
            seal["parts"] = {name: part for name, part in parts.items()
                             if name in read or before.get(name) == part}
            write_seal(self.directory / VERIFIED, seal)


def _discard(path: Path) -> None:
    """Remove what is not needed, whatever it is."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        durable.remove(path)


def _sealed(generation: Generation) -> bytes:
    raw = msgspec.json.encode(generation)
    return msgspec.json.encode(_Sealed(_checksum(raw), msgspec.Raw(raw)))


def _checksum(data: bytes | msgspec.Raw) -> str:
    return hashlib.sha256(data).hexdigest()
