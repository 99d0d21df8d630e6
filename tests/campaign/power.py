"""Power cuts that are simulated: what a disk may hold after one, for every moment of one.

A `Recorder` notes what is done to a directory of checkpoints: files made, synced, renamed, removed.
A `Disk` replays that up to a moment and says what may be found after a power cut then: what was
synced is there; of the rest anything may be there or not, in any order, whole or in part.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from vmjob.engine.generations import Draft, Generation, Generations
from vmjob.engine.progress import Progress
from vmjob.home import remove_tree
from vmjob.host import durable
from vmjob.machine.contract import Checkpoint

__all__ = ["Broken", "Cut", "Disk", "Recorder", "campaign", "check", "every_cut", "series"]

#: Bytes that a disk writes at once: what a cut leaves of the last one is anything.
SECTORS = (512, 4096)
#: Sizes of files: around those, and others.
SIZES = (0, 1, 100, 511, 512, 513, 4095, 4096, 4097, 9000)
#: Power cuts of one directory, one after the other, in the campaign.
CHAIN = 3


class Broken(AssertionError):
    """A promise was broken; the message says how."""


@dataclass(frozen=True)
class Op:
    """One thing that was done; ``inode`` tells apart files that had the same name."""

    kind: Literal["make", "sync", "rename", "unlink", "publishes", "published", "undone"]
    name: str = ""
    target: str = ""
    data: bytes = b""
    inode: int = 0
    number: int = 0


class Recorder:
    """Notes what is done to a directory while it is entered."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log: list[Op] = []
        self._inodes = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Patch the few ways in which the disk is changed. Nothing is really synced meanwhile."""
        def write(path: Path, data: bytes) -> None:
            self.make(path.name, data)
            durable.sync(path)

        def sync(path: Path) -> None:
            self.log.append(Op("sync", "" if path == self.directory else path.name))

        def replace(source: Path, target: Path) -> None:
            source.replace(target)
            self.log.append(Op("rename", source.name, target.name))

        def remove(path: Path) -> None:
            path.unlink(missing_ok=True)
            self.log.append(Op("unlink", path.name))

        with contextlib.ExitStack() as patches:
            for each in (write, sync, replace, remove):
                patches.enter_context(mock.patch.object(durable, each.__name__, each))
            yield

    def make(self, name: str, data: bytes) -> None:
        """A new file, as a driver leaves it: complete, but not yet safe."""
        (self.directory / name).write_bytes(data)
        self._inodes += 1
        self.log.append(Op("make", name, data=data, inode=self._inodes))

    def publish(self, made: Generations, number: int, files: dict[str, bytes]) -> None:
        """Publish a generation of these files, which are there."""
        self.log.append(Op("publishes", number=number, data=repr(sorted(files.items())).encode()))
        draft = Draft(number, 0.0, "fake", "", {}, Progress([], 1, {}, {}, 0.0, 0))
        made.publish(draft, Checkpoint(tuple(files), {}, 0.0, 0))
        self.log.append(Op("published", number=number))

    def undo(self, made: Generations, number: int) -> None:
        """Give up a generation, the newest, for what there is before it."""
        self.log.append(Op("undone", number=number))  # from the first thing that it does on
        older = [each.number for each in made.listed() if each.number < number]
        if older:
            made.go_back(older[0])
        else:
            made.restart()


@dataclass
class Disk:
    """What was done to a directory so far, and what of it is safe."""

    names: dict[str, int] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)
    safe_names: dict[str, int] = field(default_factory=dict)
    safe_data: set[int] = field(default_factory=set)
    #: Changes of names since the directory was synced.
    unsafe: list[Op] = field(default_factory=list)
    #: The contents of each generation that was begun, by number; the last one counts.
    begun: dict[int, list[bytes]] = field(default_factory=dict)
    #: Numbers of the generations that must be found, unless a newer one is.
    published: list[int] = field(default_factory=list)

    @classmethod
    def holding(cls, content: dict[str, bytes], begun: dict[int, list[bytes]],
                published: list[int]) -> Disk:
        """A disk with these files, all safe."""
        disk = cls(begun={number: list(each) for number, each in begun.items()},
                   published=list(published))
        for number, (name, data) in enumerate(content.items()):
            disk.names[name], disk.data[-1 - number] = -1 - number, data
        disk.safe_names, disk.safe_data = dict(disk.names), set(disk.data)
        return disk

    def do(self, op: Op) -> None:
        """The next thing."""
        match op.kind:
            case "make":
                self.data[op.inode] = op.data
                self._rename(self.names, op)
                self.unsafe.append(op)
            case "rename":
                op = Op("rename", op.name, op.target, inode=self.names[op.name])
                self._rename(self.names, op)
                self.unsafe.append(op)
            case "unlink":
                self._rename(self.names, op)
                self.unsafe.append(op)
            case "sync" if op.name:
                self.safe_data.add(self.names[op.name])
            case "sync":
                self.safe_names, self.unsafe = dict(self.names), []
            case "publishes":
                self.begun.setdefault(op.number, []).append(op.data)
            case "published":
                self.published.append(op.number)
            case "undone":
                self.published = [each for each in self.published if each != op.number]

    def do_all(self, ops: list[Op]) -> None:
        for op in ops:
            self.do(op)

    @staticmethod
    def _rename(names: dict[str, int], op: Op) -> None:
        if op.kind == "make":
            names[op.name] = op.inode
            return
        names.pop(op.name, None)
        if op.kind == "rename":
            names[op.target] = op.inode

    def all_done(self) -> dict[str, bytes]:
        """Everything reached the disk."""
        return {name: self.data[inode] for name, inode in self.names.items()}

    def only_synced(self) -> dict[str, bytes]:
        """Nothing did but what was synced: a file that never was is empty."""
        return {name: self.data[inode] if inode in self.safe_data else b""
                for name, inode in self.safe_names.items()}

    def anything(self, rng: random.Random) -> dict[str, bytes]:
        """Some of what was not synced did, in some order, whole or in part."""
        ops = [op for op in self.unsafe if rng.random() < 0.6]
        if rng.random() < 0.5:
            rng.shuffle(ops)
        names = dict(self.safe_names)
        for op in ops:
            self._rename(names, op)
        left = {inode: self.data[inode] if inode in self.safe_data else
                spoiled(self.data[inode], rng) for inode in sorted(set(names.values()))}
        return {name: left[inode] for name, inode in names.items()}


def spoiled(data: bytes, rng: random.Random) -> bytes:
    """What may be left of a file that was not synced."""
    how = rng.randrange(6)
    if how == 0:
        return data
    if how == 1:
        return b""
    if how == 2:  # its size was written, and nothing of it
        return bytes(len(data))
    if how == 3:
        return data[:rng.randrange(len(data) + 1)]
    if how == 4:  # a hole
        at = rng.randrange(len(data) + 1)
        return data[:at] + bytes(len(data) - at)
    torn = min(len(data), rng.choice(SECTORS))
    return data[:len(data) - torn] + rng.randbytes(torn)


@dataclass(frozen=True)
class Cut:
    """What is on the disk after a power cut, and what must be found there."""

    content: dict[str, bytes]
    begun: dict[int, list[bytes]]
    published: list[int]


def cut(disk: Disk, content: dict[str, bytes]) -> Cut:
    return Cut(content, disk.begun, disk.published)


def every_cut(log: list[Op]) -> Iterator[Disk]:
    """The disk after each thing that was done, and before the first; always the same object."""
    disk = Disk()
    yield disk
    for op in log:
        disk.do(op)
        yield disk


def check(found: Cut, directory: Path) -> int:
    """Find generations as after a power cut: the number of the one that is used, 0 for none.

    ``directory`` is made, and holds what the disk held. Raises `Broken`.
    """
    directory.mkdir()
    for name, data in found.content.items():
        (directory / name).write_bytes(data)
    with mock.patch.object(durable, "sync"):
        number = _used(found, Generations(directory))
        later = Generations(directory)
        later.tidy()  # as who owns the slot next does first
        if _used(found, later) != number:
            raise Broken("another generation is found after tidying")
        _go_on(later, number)
    return number


def _used(found: Cut, made: Generations) -> int:
    least = found.published[-1] if found.published else 0
    first = next((each for each in made.newest_first() if isinstance(each, Generation)), None)
    if first is None:
        if least:
            raise Broken(f"generation {least} was published, none is found")
        return 0
    if first.number < least:
        raise Broken(f"generation {least} was published, {first.number} is found")
    files = {name: (made.directory / name).read_bytes() for name in first.files}
    written = found.begun.get(first.number, [])
    if first.number == least:
        written = written[-1:]
    if repr(sorted(files.items())).encode() not in written:
        raise Broken(f"generation {first.number} is not what was written")
    return first.number


def _go_on(made: Generations, before: int) -> None:
    """A checkpoint after the power cut is good, and the newest."""
    number = made.next_number()
    if number <= before:
        raise Broken(f"the next number is {number}, after {before}")
    name = f"{number:06}.pages"
    (made.directory / name).write_bytes(b"after")
    draft = Draft(number, 0.0, "fake", "", {}, Progress([], 1, {}, {}, 0.0, 0))
    made.publish(draft, Checkpoint((name,), {}, 0.0, 0))
    first = next(iter(made.newest_first()))
    if not isinstance(first, Generation) or first.number != number:
        raise Broken("a generation that was published after the power cut is not found")


def series(recorder: Recorder, made: Generations, rng: random.Random, count: int) -> None:
    """What a job does to its checkpoints, at random: the recorder must be entered.

    Mostly it publishes one that shares files with the one before; sometimes it fails before that,
    gives the newest up, or is killed and taken up again.
    """
    live = _live(made)
    for _ in range(count):
        what = rng.randrange(10)
        if what == 0:
            made = Generations(made.directory)
            made.tidy()
            live = _live(made)
        elif what == 1 and live:
            newest = next(each for each in made.newest_first() if isinstance(each, Generation))
            recorder.undo(made, newest.number)
            live = _live(made)
        number = made.next_number()
        new = {f"{number:06}.{kind}": rng.randbytes(rng.choice(SIZES))
               for kind in rng.sample(("pages", "index", "devices", "disk"), rng.randint(1, 4))}
        if not live:
            new["root"] = rng.randbytes(rng.choice(SIZES))
        for name, data in new.items():
            recorder.make(name, data)
        if what == 2:
            continue
        shared = {name: data for name, data in live.items() if rng.random() < 0.7}
        live = {**shared, **new}
        recorder.publish(made, number, live)


def _live(made: Generations) -> dict[str, bytes]:
    """The files of the newest good generation."""
    for each in made.newest_first():
        if isinstance(each, Generation):
            return {name: (made.directory / name).read_bytes() for name in each.files}
    made.restart()
    return {}


def campaign(count: int, seed: int) -> dict[str, Any]:
    """So many power cuts at random moments with random outcomes; what was found.

    Each directory survives `CHAIN` cuts: the job goes on from what the one before left.
    """
    began = time.monotonic()
    rng = random.Random(seed)
    tally: Counter[str] = Counter()
    broken: list[str] = []
    done = 0
    while done < count:
        with tempfile.TemporaryDirectory() as place:
            done += _chain(Path(place), rng.randrange(1 << 32), min(CHAIN, count - done), tally,
                           broken)
    return {"seed": seed, "cuts": done, "found": dict(sorted(tally.items())), "broken": broken,
            "seconds": round(time.monotonic() - began, 1)}


def _chain(place: Path, seed: int, cuts: int, tally: Counter[str], broken: list[str]) -> int:
    rng = random.Random(seed)
    after = Cut({}, {}, [])
    for number in range(cuts):
        directory = place / f"job{number}"
        directory.mkdir()
        for name, data in after.content.items():
            (directory / name).write_bytes(data)
        recorder = Recorder(directory)
        begin = Disk.holding(after.content, after.begun, after.published)
        with recorder.recording():
            made = Generations(directory)
            made.tidy()
            series(recorder, made, rng, rng.randint(1, 5))
        moment = rng.randrange(len(recorder.log) + 1)
        disk = begin
        disk.do_all(recorder.log[:moment])
        world = rng.choice(("synced", "done", "anything", "anything", "anything"))
        content = (disk.only_synced() if world == "synced" else
                   disk.all_done() if world == "done" else disk.anything(rng))
        after = cut(disk, content)
        try:
            used = check(after, place / f"cut{number}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the campaign looks for
            broken.append(f"chain {seed}, cut {number}, world {world}: "
                          f"{type(error).__name__}: {error}")
            return number + 1
        least = disk.published[-1] if disk.published else 0
        tally["none was published" if not used else "the newest" if used == least else
              "one that was nearly published"] += 1
        after = Cut(content, disk.begun, [used] if used else [])
        remove_tree(directory)
    return cuts
