"""The host's side of a folder: what is there, and how files get there whole.

Everything is done by descriptors from the folder down, following no link: the guest decides on
names, and somebody else on this computer may change directories while we are at it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vmjob.errors import HostDiskFull, HostError, InputUnreadable
from vmjob.guest.agent.folders import (
    DIRECTORY,
    STAGED,
    Stamp,
    check_path,
    open_below,
    stamp,
)
from vmjob.guest.agent.tree import TreeError, TreeSender, record
from vmjob.guest.agent.wire import MAX_REQUEST_PIECE
from vmjob.guest.folders import split_names
from vmjob.job.files import INIT_DATA, Folder

__all__ = ["Journal", "Outgoing", "Sent", "batches", "link_target", "make_directories",
           "may_lead_to", "pack", "place", "prepare", "staging", "would_replace"]

#: A file of BOINC's that stands for another: ``<soft_link>PATH</soft_link>`` in its first line.
SOFT_LINK = re.compile(rb"[^\r\n]*<soft_link>([^<\0\r\n]+)")
#: Longest one, bytes.
MAX_SOFT_LINK = 4096
#: Bytes of one parcel, unless one file alone is larger.
PARCEL_BYTES = 64 << 20
#: Longest file whose content goes into the guest otherwise than it is, bytes.
MAX_CONTENT = 16 << 20


def link_target(path: Path, base: Path) -> Path | None:
    """What a BOINC link or a symbolic link stands for, as an absolute path; None for a file.

    BOINC's are relative to ``base``, the directory that a job runs in.
    """
    try:
        if path.is_symlink():
            return Path(os.path.realpath(path))
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        content = os.read(fd, MAX_SOFT_LINK)
    except OSError:
        return None
    finally:
        os.close(fd)
    if found := SOFT_LINK.match(content):
        return Path(os.path.realpath(base / os.fsdecode(found[1].strip())))
    return None


def may_lead_to(folder: Folder, target: Path) -> bool:
    """Whether a link in a folder may stand for a file, given by its real path.

    What a link says may be anybody's: the data of a job reads like one when it wants to.
    """
    def below(those: Iterable[Path]) -> bool:
        return any(target.is_relative_to(os.path.realpath(each)) for each in those)

    return not folder.links_to or (below(folder.links_to) and not below(folder.links_not_to))


def write_new(path: Path, content: bytes | Path, mode: int = 0o600) -> None:
    """A file that appears whole, with some content or that of another file.

    One that is there already is left alone.
    """
    staged = path.with_name(STAGED + os.urandom(8).hex())
    with full_disk():
        try:
            fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, file)
                os.fchmod(fd, mode & 0o777 | 0o600)
            with contextlib.suppress(FileExistsError):
                os.link(staged, path)
        finally:
            staged.unlink(missing_ok=True)


def prepare(folder: Folder, base: Path, redact: Callable[[bytes], bytes]) -> set[str]:
    """Make the directory, and put there what belongs there first; the names of that.

    They are no links, whatever they hold.
    """
    put = set(folder.texts)
    try:
        with full_disk():
            folder.source.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, text in folder.texts.items():
                path = folder.source / check_path(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                write_new(path, text.encode())
            for source in folder.copies:
                target = folder.source / source.name
                if not target.exists() and not target.is_symlink():
                    _copy(folder, source, target, base, redact)
                    put.add(source.name)
    except OSError as error:
        raise InputUnreadable(f"cannot make the folder {folder.name!r} in {folder.source}: "
                              f"{error.filename}: {error.strerror}") from error
    return put


def _copy(folder: Folder, source: Path, target: Path, base: Path,
          redact: Callable[[bytes], bytes]) -> None:
    real = link_target(source, base) or source
    if not may_lead_to(folder, Path(os.path.realpath(real))):
        raise PermissionError(errno.EPERM, "it leads out of the slot and its project", str(source))
    mode = real.stat().st_mode
    if INIT_DATA in (source.name, real.name):
        write_new(target, redact(real.read_bytes()), mode)
    else:
        write_new(target, real, mode)


# -- into the guest --------------------------------------------------------------------------


def batches(names: Iterable[str], side: Mapping[str, Stamp]) -> Iterator[list[str]]:
    """Names in parcels of a bounded size."""
    for some in split_names((name, side[name]) for name in names):
        batch: list[str] = []
        room = PARCEL_BYTES
        for name, _, size, *_ in some:
            if batch and size > room:
                yield batch
                batch, room = [], PARCEL_BYTES
            batch.append(name)
            room -= size
        if batch:
            yield batch


class Outgoing:
    """A file or directory on its way into the guest.

    ``path``: where it is, if not in the folder under its name. ``content``: what to say instead of
    what is there. ``expected``: what the guest has under that name (None: nothing), or 'any'.
    """

    def __init__(self, name: str, expected: Stamp | str | None, path: Path | None = None,
                 content: Callable[[bytes], bytes] | None = None) -> None:
        self.name = name
        self.expected = expected
        self.path = path
        self.content = content


class Sent:
    """One entry of a parcel, in order: what it was here, and is there but for its inode."""

    def __init__(self, name: str, host: Stamp, guest: Stamp) -> None:
        self.name = name
        self.host = host
        self.guest = guest


def pack(folder: Path, outgoing: list[Outgoing], sent: list[Sent], *,
         strict: bool) -> Iterator[bytes | memoryview]:
    """The records of a parcel; what is gone meanwhile is left out. Fills ``sent``.

    With ``strict``, a file that changes while it is read ends the parcel: `TreeError`.
    """
    sender = TreeSender(MAX_REQUEST_PIECE)
    yield record(b"E", {"t": "d", "n": "", "m": 0o755, "mt": 0})
    inside: list[str] = []
    for each in sorted(outgoing, key=lambda each: each.name.split("/")):
        *above, last = each.name.split("/")
        try:
            fd = _open(folder, each)
        except OSError:
            continue
        try:
            found = stamp(os.fstat(fd))
            if found is None:
                continue
            common = 0
            while common < min(len(inside), len(above)) and inside[common] == above[common]:
                common += 1
            for _ in inside[common:]:
                yield b"C"
            inside = inside[:common]
            for name in above[common:] + ([last] if found is DIRECTORY else []):
                inside.append(name)
                sent.append(Sent("/".join(inside), DIRECTORY, DIRECTORY))
                yield record(b"E", {"t": "d", "n": name, "m": 0o755, "mt": 0})
            if found is DIRECTORY:
                continue
            head = {"n": last, "m": found[2], "mt": found[3], "w": each.expected}
            if each.content is None:
                sent.append(Sent(each.name, found, found))
                try:
                    yield from sender.file(fd, head)
                except OSError as error:
                    raise TreeError("io", f"{each.name!r}: {error.strerror}") from error
                if strict and stamp(os.fstat(fd)) != found:
                    raise TreeError("changed", f"{each.name!r} changed while it was read")
            else:
                content = each.content(_read(fd))
                sent.append(Sent(each.name, found, ("f", len(content), *found[2:])))
                yield from _say(head, content)
        finally:
            os.close(fd)
    for _ in inside:
        yield b"C"
    yield b"C"
    yield record(b"Z", {"entries": len(sent) + 1, "bytes": sender.bytes})


def _open(folder: Path, each: Outgoing) -> int:
    if each.path is not None:
        return os.open(each.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return open_below(os.fspath(folder), each.name, os.O_RDONLY | os.O_NONBLOCK)


def _read(fd: int) -> bytes:
    with os.fdopen(os.dup(fd), "rb") as file:
        return file.read(MAX_CONTENT)


def _say(head: dict[str, Any], content: bytes) -> Iterator[bytes]:
    yield record(b"E", {**head, "t": "f", "s": len(content)})
    step = MAX_REQUEST_PIECE - 9
    for at in range(0, len(content), step):
        yield b"D" + at.to_bytes(8, "big") + content[at:at + step]
    yield b"C"


# -- out of the guest ------------------------------------------------------------------------


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[tuple[int, str]]:
    """The folder's descriptor, and a name in it for what is not whole yet; it is removed."""
    name = STAGED + os.urandom(8).hex()
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd, name
    finally:
        os.close(fd)
        shutil.rmtree(folder / name, ignore_errors=True)


def place(parent: int, staged: str, number: int, name: str, size: int, target: Path | None,
          note: Callable[[Stamp], None], *, no_soft_link: bool) -> Stamp | None:
    """Give a staged file its name (or that of ``target``); what it is now, None for not at all.

    ``note`` is called before it has that name. With ``no_soft_link``, what BOINC would take for a
    link has no place here (`OSError`): its maker would choose which file of this computer is read.
    """
    source = open_below(f"/proc/self/fd/{parent}/{staged}", "", os.O_RDONLY)
    try:
        found = stamp(os.stat(str(number), dir_fd=source, follow_symlinks=False))
        if found is None or found[:2] != ("f", size):
            return None
        if no_soft_link and _is_soft_link(source, str(number)):
            raise OSError(errno.ELOOP, "it would be a link", name)
        with full_disk():
            if target is not None:
                return _write_through(source, str(number), target, note)
            above = make_directories(parent, name.rpartition("/")[0])
            try:
                note(found)
                _give_way(above, name.rpartition("/")[2])
                os.rename(str(number), name.rpartition("/")[2], src_dir_fd=source,
                          dst_dir_fd=above)
            finally:
                os.close(above)
        return found
    finally:
        os.close(source)


def _is_soft_link(directory: int, name: str) -> bool:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        return SOFT_LINK.match(os.read(fd, MAX_SOFT_LINK)) is not None
    finally:
        os.close(fd)


def make_directories(parent: int, path: str) -> int:
    """A descriptor of a directory below another; what is missing is made, files give way.

    A link on the way is not followed: raises `OSError`.
    """
    fd = os.dup(parent)
    try:
        for part in path.split("/") if path else []:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG(os.stat(part, dir_fd=fd, follow_symlinks=False).st_mode):
                    os.unlink(part, dir_fd=fd)
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                            dir_fd=fd)
            os.close(fd)
            fd = inner
    except BaseException:
        os.close(fd)
        raise
    return fd


def would_replace(name: str, links: Collection[str], host: Mapping[str, Stamp], *,
                  directory: bool) -> bool:
    """Whether a file that is not the guest's to change gives way where ``name`` is written.

    ``links``: names that stand for files elsewhere; ``host``: all that is there. ``directory``:
    whether it is to be one, so that what is below it stays.
    """
    parts = name.split("/")
    if INIT_DATA in parts or any("/".join(parts[:n]) in links
                                 for n in range(1, len(parts) + directory)):
        return True
    return not directory and host.get(name) == DIRECTORY and any(
        each.startswith(name + "/") and (each in links or INIT_DATA in each.split("/"))
        for each in (*links, *host))


def _give_way(above: int, name: str) -> None:
    """Remove a directory where a file is to be; a link there is not ours to replace."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            shutil.rmtree(name, dir_fd=above)
        elif not stat.S_ISREG(mode):
            raise OSError(errno.ELOOP, "it is no file", name)


def _write_through(source: int, name: str, target: Path, note: Callable[[Stamp], None]) -> Stamp:
    staged = target.with_name(STAGED + os.urandom(8).hex())
    try:
        try:
            os.rename(name, staged, src_dir_fd=source)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copy2(f"/proc/self/fd/{source}/{name}", staged)
        found = stamp(staged.lstat())
        assert found is not None
        note(found)
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Turn what the kernel says of a full disk into `HostDiskFull`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HostDiskFull(f"no room for the files of a folder: {error.strerror}") from error
        raise


class Journal:
    """What came from the guest, kept where it outlives this process.

    It tells, after a guest went back to an older state, which files of the host are its own and
    which came from what the guest will do again. A line for each: name, and what it became.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines = 0
        self.came: dict[str, Stamp | None] = {}
        self._read()

    def note(self, name: str, became: Stamp | None) -> None:
        """A file is about to become this; None: to be removed."""
        self.came[name] = became
        if self._path is None:
            return
        with full_disk(), _unusable(self._path):
            if self._lines > 2 * len(self.came) + 1000:
                self._shorten(self._path)
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
                         | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, json.dumps([name, became]).encode() + b"\n")
            finally:
                os.close(fd)
            self._lines += 1

    def _read(self) -> None:
        if self._path is None:
            return
        with contextlib.suppress(FileNotFoundError), _unusable(self._path), \
                self._path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError):  # the last one may be half
                    name, became = json.loads(line)
                    self.came[name] = None if became is None else tuple(became)
                self._lines += 1

    def _shorten(self, path: Path) -> None:
        new = path.with_name(path.name + ".new")
        new.write_text("".join(json.dumps(each) + "\n" for each in self.came.items()))
        new.replace(path)
        self._lines = len(self.came)


@contextlib.contextmanager
def _unusable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise HostError(f"cannot use {path}: {error.strerror}") from error
