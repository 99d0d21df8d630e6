"""What changes in a directory that host and guest keep in step.

A directory is looked through again and again, by whoever asks what is new in it. Only whole files
are told: those that were the same in two looks, and that nobody had open for writing at the second.
Links, devices and the like are left out, and so are names that the other side would not take.

The host uses this for its own side of a folder, too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

from .tree import TreeError, check_name
from .wire import MAX_DEPTH

#: What says whether a file is still the same: kind, size, mode, time of change (ns), inode.
#: Of a directory nothing counts but that it is there.
Stamp = tuple[str, int, int, int, int]
DIRECTORY: Stamp = ("d", 0, 0, 0, 0)
#: A file that was never whole so far.
CHANGING: Stamp = ("?", 0, 0, 0, 0)

#: Names of ours, for what is not whole yet; at no depth are they anybody's files.
STAGED = ".vmjob-"
#: Seconds in which a file must not have changed.
SETTLE = 0.2
#: Seconds between looks; more where looks take long.
PERIOD = 0.4
#: Looks take this share of a processor at most, but those of up to `SMALL` seconds are made anyway.
SHARE = 0.02
SMALL = 0.01
#: Seconds that looking at one entry takes at most; 23 µs under TCG on a computer that is not busy.
ENTRY = 60e-6
#: Seconds that a look may keep others waiting; then they have a turn, for as long as `PAUSE`.
SLICE = 0.01
PAUSE = 0.02
#: Longest path below the directory, bytes.
MAX_PATH = 4095
#: Changes that one answer tells, and their bytes.
MAX_TOLD = 2000
MAX_TOLD_BYTES = 512 * 1024
#: Directories that are kept in step.
MAX_FOLDERS = 32
#: How often a slice looks at the clock: every so many entries.
CLOCK_EVERY = 16


def _matches(name: str, pieces: list[str]) -> bool:
    """Whether a name is these pieces with anything between them."""
    first, *middle, last = pieces
    if not name.startswith(first):
        return False
    at = len(first)
    for piece in middle:
        found = name.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return len(name) - len(last) >= at and name.endswith(last)


def stamp(facts: os.stat_result) -> Stamp | None:
    """What identifies a file or directory as it is now; None for what is neither."""
    mode = facts.st_mode
    if stat.S_ISREG(mode):
        # As a copy gets it: see `TreeReceiver`.
        return ("f", facts.st_size, mode & 0o777 | 0o600, max(0, facts.st_mtime_ns), facts.st_ino)
    return DIRECTORY if stat.S_ISDIR(mode) else None


class Folder:
    """One directory that is looked through.

    ``without``: names at its top that do not count, ``*`` for any characters. Not more than
    ``most`` entries are looked at; `over` says whether there were more. `left_out`: entries of the
    last look that nobody is told.
    """

    def __init__(self, path: str, without: Iterable[str] = (), most: int = 10_000) -> None:
        self.path = path
        self.without = frozenset(without)
        self._patterns = [each.split("*") for each in self.without if "*" in each]
        self.most = most
        #: Grows with each change that is told.
        self.version = 0
        #: How many looks were finished.
        self.looks = 0
        self.over = False
        self._beyond = False
        self.left_out = 0
        #: Symbolic links of the last look.
        self.links: set[str] = set()
        self.known: dict[str, tuple[Stamp, int]] = {}
        self.gone: dict[str, int] = {}
        self._changing: dict[str, tuple[Stamp, float]] = {}
        self._look: Generator[None, None, None] | None = None
        self._visited: set[str] = set()
        self._at_once = False
        #: Seconds of a processor that the look under way took so far, and those before.
        self._cost = 0.0
        self._costs: list[float] = []
        self._full = False
        #: When the next look may begin, and the next at what changes.
        self._due = 0.0
        self._settle_due = 0.0

    def leaves_out(self, name: str) -> bool:
        """Whether a name is one of ``without``, or below one."""
        top = name.partition("/")[0]
        return top in self.without or any(_matches(top, each) for each in self._patterns)

    # -- looking -------------------------------------------------------------------------------

    @property
    def looking(self) -> bool:
        """Whether a look has begun and is not finished."""
        return self._look is not None

    def begin(self, *, at_once: bool = False) -> None:
        """Look again from the beginning; ``at_once`` takes every file for whole."""
        self._close()
        self._at_once = at_once
        self._look = self._walk()
        self._full = True
        self._cost = 0.0

    def work(self, seconds: float) -> None:
        """Look for so many seconds, if it is time for it."""
        begun = time.monotonic()
        if self._look is None:
            if begun >= self._due:
                self.begin()
            elif self._changing and begun >= self._settle_due:
                self._look = self._settle()
        if self._look is None:
            return
        used = time.process_time()
        try:
            while time.monotonic() - begun < seconds:
                next(self._look)
        except StopIteration:
            self._look = None
        self._cost += time.process_time() - used
        if self._look is None:
            self._pay()

    def wait(self) -> float:
        """Seconds until there can be something new to ask for."""
        if self._look is not None:
            return PAUSE
        due = min(self._due, self._settle_due) if self._changing else self._due
        return max(PAUSE, due - time.monotonic())

    def _pay(self) -> None:
        """After a look at everything, wait for the next as long as that is worth."""
        if self._full:
            # The least of some, and no more than it can be: in a guest, what a busy computer's
            # other programs take counts as ours.
            self._costs = [*self._costs[-3:], self._cost]
            cost = min(*self._costs, len(self._visited) * ENTRY)
            if cost > SMALL:
                self._due = max(self._due, time.monotonic() + cost / SHARE)
        self._full = False
        self._cost = 0.0

    def _walk(self) -> Generator[None, None, None]:
        """A look at everything; it is over when this is."""
        self._visited = set()
        self.left_out = 0
        self.links = set()
        self._beyond = False
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            yield from self._directory(fd, "", 0)
        except OSError:
            self._beyond = False  # it is not there, or not any more
        # Where there is too much, who was not visited may well be there.
        if not self._beyond or len(self.known) > self.most:
            for name in [*self.known, *self._changing]:
                if name not in self._visited:
                    self._look_at(name)
                    yield
        self.looks += 1
        self.over = self._beyond  # not before: who asks during a look asks about the last one
        self._at_once = False
        self._due = time.monotonic() + PERIOD
        self._settle_due = time.monotonic() + SETTLE

    def _settle(self) -> Generator[None, None, None]:
        """A look at what was not whole at the last one."""
        for name in list(self._changing):
            self._look_at(name)
            yield
        self._settle_due = float("inf")  # once per look: what changes all the time has to wait

    def _directory(self, fd: int, prefix: str, depth: int) -> Generator[None, None, None]:
        """Look at the entries of an open directory, and close it."""
        try:
            inner = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    if len(self._visited) >= self.most:
                        self._beyond = True
                        return
                    name = prefix + entry.name
                    if entry.name.startswith(STAGED) or (not prefix and self.leaves_out(name)):
                        continue
                    if not _sayable(entry.name, name):
                        self.left_out += 1
                        continue
                    try:
                        found = stamp(entry.stat(follow_symlinks=False))
                    except OSError:
                        continue  # it went away meanwhile
                    if found is None:
                        self.left_out += 1
                        if entry.is_symlink() and len(self.links) < self.most:
                            self.links.add(name)
                        continue
                    self._visited.add(name)
                    if found is not DIRECTORY:
                        self._saw(name, found)
                    elif depth >= MAX_DEPTH - 1:
                        self.left_out += 1
                    else:
                        inner.append(entry.name)
                    if not len(self._visited) % CLOCK_EVERY:
                        yield
            for each in inner:
                try:
                    below = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                                    | os.O_CLOEXEC, dir_fd=fd)
                except OSError:
                    continue
                self._saw(prefix + each, DIRECTORY)
                yield from self._directory(below, prefix + each + "/", depth + 1)
                if self._beyond:
                    return
        finally:
            os.close(fd)

    def _close(self) -> None:
        if self._look is not None:
            self._look.close()
            self._look = None

    def _look_at(self, name: str) -> None:
        """Look at one entry by its name."""
        try:
            found = self.now(name)
        except OSError:
            found = None
        if found is not None:
            self._saw(name, found)
            return
        self._changing.pop(name, None)
        if self.known.pop(name, None):
            self.version += 1
            self.gone[name] = self.version

    def _saw(self, name: str, found: Stamp) -> None:
        before = self.known.get(name)
        if before is not None and before[0] == found:
            if self._changing:
                self._changing.pop(name, None)
            return
        now = time.monotonic()
        if found == DIRECTORY or self._at_once:
            self._tell(name, found)
            return
        seen = self._changing.get(name)
        if seen is None or seen[0] != found:
            self._changing[name] = (found, now)
            if before is None:
                self._tell(name, CHANGING, settled=False)
        elif now - seen[1] >= SETTLE and not self._written(name, found):
            self._tell(name, found)

    def _tell(self, name: str, found: Stamp, *, settled: bool = True) -> None:
        self.version += 1
        self.known[name] = (found, self.version)
        self.gone.pop(name, None)
        if settled:
            self._changing.pop(name, None)

    def _written(self, name: str, found: Stamp) -> bool:
        """Whether a file is open for writing, or another one by now."""
        try:
            fd = self.open(name, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return False  # nobody can tell: two looks must do
        try:
            return stamp(os.fstat(fd)) != found or open_for_writing(fd)
        finally:
            os.close(fd)

    # -- names below it ------------------------------------------------------------------------

    def open(self, name: str, flags: int) -> int:
        """A descriptor of what has this name below the directory; follows no link."""
        return open_below(self.path, name, flags)

    def now(self, name: str) -> Stamp | None:
        """What has this name now; None for nothing that counts. Raises `OSError`."""
        above, _, last = name.rpartition("/")
        fd = open_below(self.path, above, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return stamp(os.stat(last, dir_fd=fd, follow_symlinks=False))
        except FileNotFoundError:
            return None
        finally:
            os.close(fd)

    # -- what the other side asks --------------------------------------------------------------

    def changes(self, seen: int) -> dict[str, Any]:
        """What changed since version ``seen``: at most as much as an answer holds."""
        if seen > self.version:
            seen = 0
        if seen:
            self.gone = {name: at for name, at in self.gone.items() if at > seen}
        told: dict[str, Any] = {"since": seen, "version": self.version, "entries": [],
                                "gone": [], "more": False}
        if seen == self.version:
            return told
        news: list[tuple[int, str, Stamp | None]] = [
            (at, name, found) for name, (found, at) in self.known.items() if at > seen]
        if seen:  # one that knows nothing need not hear what there is not
            news += [(at, name, None) for name, at in self.gone.items()]
        news.sort(key=lambda each: each[0])
        room = MAX_TOLD_BYTES
        for count, (at, name, found) in enumerate(news):
            room -= len(json.dumps(name)) + 100
            if count == MAX_TOLD or room < 0:
                told["more"] = True
                break
            if found is None:
                told["gone"].append(name)
            else:
                told["entries"].append([name, *found])
            told["version"] = at
        else:
            told["version"] = self.version
        return told

    def note(self, name: str, found: Stamp) -> None:
        """The other side put this there; what it became meanwhile is told later."""
        self._visited.add(name)
        self._tell(name, found)
        self._look_at(name)

    def remove(self, name: str, found: Stamp) -> bool:
        """Remove a file or an empty directory, if it is still this one; whether it is gone."""
        above, _, last = name.rpartition("/")
        try:
            fd = open_below(self.path, above, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return True
        try:
            if stamp(os.stat(last, dir_fd=fd, follow_symlinks=False)) != found:
                return False
            if found == DIRECTORY:
                os.rmdir(last, dir_fd=fd)
            else:
                os.unlink(last, dir_fd=fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                return False
            raise
        finally:
            os.close(fd)
        self.known.pop(name, None)
        self.gone.pop(name, None)
        self._changing.pop(name, None)
        return True


def open_below(path: str | bytes, name: str, flags: int) -> int:
    """A descriptor of ``path``/``name``, following no link; '' is the directory itself."""
    directory = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, directory)
    parts = name.split("/") if name else []
    try:
        for at, part in enumerate(parts):
            last = at == len(parts) - 1
            inner = os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC if last else directory,
                            dir_fd=fd)
            os.close(fd)
            fd = inner
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_for_writing(fd: int) -> bool:
    """Whether anybody has a file open for writing, or mapped so; False where nobody can tell.

    A read lease is refused then. Who opens it for writing meanwhile waits until it is released.
    """
    try:
        # What the kernel sends to whoever holds a lease: not SIGIO, which would end us.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def check_path(name: str) -> str:
    """A path below a folder that can be used; raises `ValueError`."""
    try:
        for part in name.split("/"):
            check_name(part)
    except TreeError as error:
        raise ValueError(error.message) from None
    if len(name.encode()) > MAX_PATH:
        raise ValueError("a path that is too long")
    return name


def _sayable(name: str, path: str) -> bool:
    if name.isascii() and name.isprintable():
        return len(path) <= MAX_PATH
    try:
        check_name(name)
    except TreeError:
        return False
    return len(path.encode()) <= MAX_PATH


class Folders:
    """The folders of a machine, by their paths, and what a request asks of them.

    ``later(key, seconds, call)`` is the loop's: a long look goes on between other requests.
    """

    def __init__(self, later: Callable[[object, float, Callable[[], None]], None]) -> None:
        self._later = later
        self._folders: dict[str, Folder] = {}

    def changes(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """What changed; see docs/reference/protocol.md."""
        folder = self._find(path, asked)
        if asked.get("begin"):
            folder.begin(at_once=True)
        folder.work(SLICE)
        if folder.looking:
            self._later(("folder", path), PAUSE, lambda: self._go_on(folder))
        return {**folder.changes(int(asked.get("seen", 0))), "looks": folder.looks,
                "looking": folder.looking, "over": folder.over, "left_out": folder.left_out,
                "again_seconds": folder.wait()}

    def _go_on(self, folder: Folder) -> None:
        if folder.looking:
            folder.work(SLICE)
        if folder.looking:
            self._later(("folder", folder.path), PAUSE, lambda: self._go_on(folder))

    def note(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The host has put these."""
        folder = self._find(path, asked)
        for name, found in _stamps(asked):
            folder.note(name, found)
        return {}

    def remove(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Remove what is still as the host says."""
        folder = self._find(path, asked)
        kept = []
        for name, found in _stamps(asked):
            try:
                if not folder.remove(name, found):
                    kept.append(name)
            except OSError:
                kept.append(name)
        return {"kept": kept}

    def _find(self, path: str, asked: dict[str, Any]) -> Folder:
        without, most = frozenset(asked.get("without") or ()), int(asked.get("most", 10_000))
        folder = self._folders.get(path)
        if folder is None or folder.without != without:
            if len(self._folders) >= MAX_FOLDERS:
                raise ValueError("too many folders")
            folder = self._folders[path] = Folder(path, without, most)
        folder.most = most
        return folder


def _stamps(asked: dict[str, Any]) -> list[tuple[str, Stamp]]:
    return [(check_path(name), (str(kind), int(size), int(mode), int(moment), int(inode)))
            for name, kind, size, mode, moment, inode in asked["names"]]
