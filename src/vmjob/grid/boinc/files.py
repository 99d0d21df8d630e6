"""The files by which an app and the client talk in a slot, beside the channels."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from vmjob.grid.boinc.messages import one_line, upload_status

__all__ = ["GraphicsState", "forget_the_end", "incoming_trickles", "pending_upload_requests",
           "request_upload", "resolve", "upload_results", "write_finish", "write_graphics",
           "write_temporary_exit", "write_whole"]

FINISH = "boinc_finish_called"
TEMPORARY_EXIT = "boinc_temporary_exit"
TRICKLE_UP = "trickle_up.xml"
TRICKLE_DOWN = "trickle_down_"
UPLOAD_REQUEST = "boinc_ufr_"
UPLOAD_STATUS = "boinc_ufs_"
GRAPHICS = "graphics_status.xml"

#: Seconds that an exit may be for at most; the client takes 300 for anything outside.
MAX_TEMPORARY_EXIT = 86400
#: Bytes of a message line: by reading, the client keeps 256, and would take the rest of a longer
#: reason for the line that says whether it is a notice.
MAX_LINE = 240
#: Bytes of a link file: it holds one path.
MAX_LINK = 4096
#: Names looked at, of each kind, in one look into the slot.
MAX_NAMES = 1000
#: Bytes of a logical name; with the prefix it is one name in a directory.
MAX_NAME = 200

_NOT_INHERITED = getattr(os, "O_CLOEXEC", 0)
_LINK = re.compile(rb"\s*<soft_link>([^<>\0\r\n]+)</soft_link>")


def resolve(logical_name: str | Path, directory: Path = Path()) -> Path:
    """The file that a job's file name stands for; it need not exist. Never raises `OSError`.

    The client leaves text files that name another, ``<soft_link>../../projects/X/Y</soft_link>``,
    whose path is relative to the slot, ``directory``, even when they lie further down. A symbolic
    link, a file without such a line, and what does not exist stand for themselves.
    """
    path = directory / logical_name
    data = _read(path, MAX_LINK)
    match = _LINK.match(data) if data is not None else None
    return directory / os.fsdecode(match[1].strip()) if match else path


# -- the end ---------------------------------------------------------------------------------------


def write_finish(directory: Path, code: int, message: str = "", *, notice: bool = False) -> None:
    """Say that the job has ended; the process exits with ``code`` after that.

    Without the file an exit with 0 only starts the app again. Its *being there* is what counts for
    the client, and not the code in it; so on a full disk, where it cannot be written at once and
    safely, it is made in place, be it empty. Raises `OSError` when not even that is possible.
    """
    # Another instance that found the slot taken says when it is to be tried again: the client would
    # read that first, and postpone a job that has ended.
    with contextlib.suppress(OSError):
        (directory / TEMPORARY_EXIT).unlink()
    data = f"{code}\n".encode()
    if message := one_line(message, MAX_LINE):  # an empty line would be shown as an empty message
        data += f"{message}\n{'notice' if notice else ''}\n".encode()
    try:
        write_whole(directory / FINISH, data, durable=True)
    except OSError:
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _NOT_INHERITED
        fd = os.open(directory / FINISH, flags, 0o644)
        with contextlib.suppress(OSError):
            os.write(fd, data)
        os.close(fd)


def write_temporary_exit(directory: Path, seconds: float, reason: str, *,
                         notice: bool = False) -> None:
    """Ask to be started again after some time; the process exits with 0 after that.

    The client ignores the file when it has no reason, so there is always one. Raises `OSError`.
    """
    delay = int(min(max(seconds, 0), MAX_TEMPORARY_EXIT)) if seconds == seconds else 0
    reason = one_line(reason, MAX_LINE) or "no reason given"
    data = f"{delay}\n{reason}\n{'notice' if notice else ''}\n".encode()
    write_whole(directory / TEMPORARY_EXIT, data, durable=True)


def forget_the_end(directory: Path) -> None:
    """Remove what an earlier run in this slot said at its end; raises `OSError`.

    The client leaves a finish file where it is; it would make a success of any later exit with 0.
    """
    for name in (FINISH, TEMPORARY_EXIT):
        (directory / name).unlink(missing_ok=True)


# -- trickles and uploads --------------------------------------------------------------------------


def incoming_trickles(directory: Path) -> list[tuple[Path, int]]:
    """Messages from the project's server, the oldest first, with what tells one from another."""
    return _named(directory, TRICKLE_DOWN)


def request_upload(directory: Path, logical_name: str) -> None:
    """Leave the request; raises `ValueError` for what is no file's name, `OSError`."""
    if not _is_name(logical_name):
        raise ValueError("a logical name is that of a file, without a path")
    # The end of an earlier upload is not that of this one.
    (directory / f"{UPLOAD_STATUS}{logical_name}").unlink(missing_ok=True)
    path = directory / f"{UPLOAD_REQUEST}{logical_name}"
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _NOT_INHERITED
    os.close(os.open(path, flags, 0o644))


def pending_upload_requests(directory: Path) -> bool:
    """Whether the client has not taken a request yet."""
    return bool(_named(directory, UPLOAD_REQUEST))


def upload_results(directory: Path) -> list[tuple[str, int, int]]:
    """Logical name, status, and what tells one from another, of each upload that has ended."""
    found = []
    for path, stamp in _named(directory, UPLOAD_STATUS):
        data = _read(path, MAX_LINK)
        status = upload_status(data.decode("utf-8", "replace")) if data is not None else None
        if status is not None:
            found.append((path.name[len(UPLOAD_STATUS):], status, stamp))
    return found


# -- for a graphics program ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GraphicsState:
    """What the client has asked for so far."""

    no_heartbeat: bool = False
    suspended: bool = False
    quit_request: bool = False
    abort_request: bool = False
    network_suspended: bool = False


def write_graphics(directory: Path, state: GraphicsState, *, updated_time: float,
                   cpu_seconds: float, elapsed_seconds: float, fraction_done: float) -> None:
    """``graphics_status.xml``, which graphics programs read in the slot; raises `OSError`."""
    lines = ["<graphics_status>"]
    for name, number in (("updated_time", updated_time), ("cpu_time", cpu_seconds),
                         ("elapsed_time", elapsed_seconds), ("fraction_done", fraction_done)):
        lines.append(f"    <{name}>{number:f}</{name}>")
    lines.append("    <boinc_status>")
    lines += [f"        <{name}>{int(getattr(state, name))}</{name}>"
              for name in GraphicsState.__slots__]
    lines += ["    </boinc_status>", "</graphics_status>", ""]
    write_whole(directory / GRAPHICS, "\n".join(lines).encode(), durable=False)


# -- below -----------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes, *, durable: bool) -> None:
    """Give ``path`` new contents at once: a reader sees the old ones, or all of the new.

    ``durable``: when this returns they survive a power cut. Raises `OSError`, and leaves no part.
    """
    # The client looks for names that begin with, or contain, those of the files: not with this one.
    part = path.with_name(f"part.{path.name}")
    part.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOT_INHERITED | getattr(os, "O_BINARY", 0)
    fd = os.open(part, flags, 0o644)
    try:
        with open(fd, "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            if durable:
                _sync(fd)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    if durable and sys.platform != "win32":
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _sync(fd: int) -> None:
    if sys.platform == "darwin":  # there fsync leaves the bytes in the drive
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def _is_name(name: str) -> bool:
    return (name not in {"", ".", ".."} and name.isprintable() and not {"/", "\\"} & {*name}
            and len(os.fsencode(name)) <= MAX_NAME)


def _named(directory: Path, prefix: str) -> list[tuple[Path, int]]:
    """Regular files of the slot by prefix, sorted by name, with their times of change in ns."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if not entry.name.startswith(prefix) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError):
                found.append((Path(entry.path), entry.stat(follow_symlinks=False).st_mtime_ns))
            if len(found) >= MAX_NAMES:
                break
    return sorted(found)


def _read(path: Path, most: int) -> bytes | None:
    """What a regular file begins with; None where there is none to be read, or a symbolic link."""
    flags = os.O_RDONLY | _NOT_INHERITED | getattr(os, "O_NOFOLLOW", 0) \
        | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError):
        return None
    try:
        return os.read(fd, most) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None
    finally:
        os.close(fd)
