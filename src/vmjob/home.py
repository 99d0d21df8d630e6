"""``VMJOB_HOME``: where vmjob keeps everything it owns, and who owns what in it.

The layout is an interface; ``docs/reference/home.md`` describes each file.

    images/NAME/        one image: manifest.json and its parts
    machines/ID/        one machine, gone when its owner is
    templates/KEY/      one frozen machine
    slots/NAME/         one machine that stays between commands (`vmjob machine`)
    cache/              facts that can be found again (proved accelerators)
    locks/              one file per thing that only one process may do
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vmjob.errors import Busy, HomeUnusable

__all__ = ["Home", "locked", "remove_tree"]


class Home:
    """The directories below ``VMJOB_HOME``; made when first asked for, mode 0700.

    ``root`` defaults to ``$VMJOB_HOME``, then ``$XDG_DATA_HOME/vmjob``, then
    ``~/.local/share/vmjob``. Raises `HomeUnusable` when it cannot be made or written.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root) if root is not None else default_root()

    @property
    def images(self) -> Path:
        return self._directory("images")

    @property
    def machines(self) -> Path:
        return self._directory("machines")

    @property
    def templates(self) -> Path:
        return self._directory("templates")

    @property
    def slots(self) -> Path:
        return self._directory("slots")

    @property
    def cache(self) -> Path:
        return self._directory("cache")

    @property
    def locks(self) -> Path:
        return self._directory("locks")

    def _directory(self, name: str) -> Path:
        path = self.root / name
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HomeUnusable(f"cannot make {path}: {error.strerror}") from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise HomeUnusable(f"cannot write to {path}")
        return path


def default_root() -> Path:
    """Where the home is when nobody says otherwise."""
    if given := os.environ.get("VMJOB_HOME"):
        return Path(given).absolute()
    base = os.environ.get("XDG_DATA_HOME") or Path("~/.local/share").expanduser()
    return Path(base).absolute() / "vmjob"


#: Linux only; elsewhere what it opens must be readable.
O_PATH: int = getattr(os, "O_PATH", os.O_RDONLY)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool, what: str) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``; the kernel frees it when we die.

    With ``wait`` false, raises `Busy` at once when another process holds it; ``what``
    is the thing that is locked, for that message.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy(f"{what} is in use by another vmjob process") from None
        yield


def remove_tree(path: Path) -> None:
    """Remove a directory of ours, whatever is in it; a missing one is fine.

    A guest may have made what is there: trees that are deeper than `shutil.rmtree` can call itself,
    directories that nobody may enter.
    """
    with contextlib.suppress(RecursionError):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            _flatten(path)


def _flatten(top: Path) -> None:
    """Remove a tree of any depth: directories move up to the top before they are removed."""
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while names := _names(here):
            # What cannot be removed stays, and ends this.
            if not sum(_one_of_the_top(here, name) for name in names):
                return
    finally:
        os.close(here)
    top.rmdir()


def _names(directory: int) -> list[str]:
    with os.scandir(directory) as found:
        return [entry.name for entry in found]


def _one_of_the_top(here: int, name: str) -> bool:
    """Remove a file, or a directory whose own directories move up; whether it is gone."""
    try:
        inner = _entered(here, name)
    except (NotADirectoryError, FileNotFoundError):
        inner = -1
    except OSError:
        return False
    try:
        if inner < 0:
            os.unlink(name, dir_fd=here)
            return True
        for each in _names(inner):
            try:
                os.close(_entered(inner, each))  # its parent's name is in it: it must be writable
            except NotADirectoryError:
                os.unlink(each, dir_fd=inner)
            else:
                os.rename(each, f"up-{os.urandom(8).hex()}", src_dir_fd=inner, dst_dir_fd=here)
        os.rmdir(name, dir_fd=here)
    except OSError:
        return False
    finally:
        if inner >= 0:
            os.close(inner)
    return True


def _entered(above: int, name: str) -> int:
    """A descriptor of a directory that its owner may change from now on; follows no link."""
    found = os.open(name, O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    try:
        with contextlib.suppress(OSError):  # where there is no such name, it has the rights or not
            Path(f"/proc/self/fd/{found}").chmod(0o700)
    finally:
        os.close(found)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
