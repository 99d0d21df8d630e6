"""The machines of a home that stay between commands, as they are on the disk.

    slots/NAME/machine.json    what it was asked for with (`vmjob.engine.slot`)
    slots/NAME/checkpoints/    what it can go on from
    slots/NAME/keeper.lock     held by its keeper, from before it starts until all of it is gone
    slots/NAME/keeper.sock     where the keeper answers
    slots/NAME/keeper.log      what the keeper did
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vmjob.engine.generations import Generations
from vmjob.engine.slot import AskedMachine, Slot
from vmjob.errors import (
    Busy,
    HomeUnusable,
    HostDiskFull,
    SlotUnusable,
    UnknownMachine,
    UsageError,
    WrongState,
)
from vmjob.home import Home, remove_tree
from vmjob.host.holding import held, holder

__all__ = ["AUTO", "LOG", "SOCKET", "Known", "create", "destroy", "keeper_of", "kept_out", "known",
           "leftovers", "names", "place_of", "sweep"]

LOCK, SOCKET, LOG = "keeper.lock", "keeper.sock", "keeper.log"
NEW, REMOVED = ".new-", ".removed-"
#: The name that makes `create` find one.
AUTO = "auto"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: Seconds for a lock that somebody holds for a moment only: a sweep, a machine's removal.
PATIENCE = 2.0
#: Seconds after which a directory that is still being made was given up.
NEWBORN = 60.0


@dataclass(frozen=True)
class Known:
    """What the disk says of a machine; ``pid`` is its keeper's, None when it has none."""

    name: str
    state: str
    pid: int | None
    since: float
    asked: AskedMachine
    checkpoints: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON-compatible data."""
        shape = msgspec.to_builtins(self.asked)
        return {"name": self.name, "state": self.state, "pid": self.pid, "since": self.since,
                **shape, "checkpoints": self.checkpoints}


def create(home: Home, name: str, asked: AskedMachine) -> str:
    """Make a machine's slot; nothing starts. Returns its name (one is found for `AUTO`).

    Raises `UsageError`, `WrongState` when there is one of that name, `HostDiskFull`.
    """
    asked.check()
    if name != AUTO:
        _check_name(name)
    newborn = home.slots / f"{NEW}{os.urandom(6).hex()}"
    try:
        with Slot.claim(newborn) as slot:
            slot.begin_machine(asked)
        for each in [name] if name != AUTO else _unused(home):
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                return _publish(newborn, home.slots / each)
    finally:
        remove_tree(newborn)
    raise WrongState(f"there is a machine {name} already",
                     advice="Give another name, or remove it with `vmjob machine destroy`.")


def place_of(home: Home, name: str) -> Path:
    """A machine's slot; raises `UsageError`, `UnknownMachine`."""
    _check_name(name)
    root = home.slots.absolute() / name
    if not root.is_dir():
        raise UnknownMachine(f"there is no machine {name}")
    return root


def names(home: Home) -> list[str]:
    """Of all machines."""
    return sorted(each.name for each in home.slots.iterdir() if NAME.fullmatch(each.name))


def keeper_of(root: Path) -> int | None:
    """The process that keeps a machine; None when none does."""
    return holder(root / LOCK)


@contextlib.contextmanager
def kept_out(root: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Be the only one that may start, change or remove a machine; raises `Busy`."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(root / LOCK, patience))
        except BlockingIOError:
            raise Busy(f"the machine {root.name} is in use by another vmjob process") from None
        except FileNotFoundError:
            raise UnknownMachine(f"there is no machine {root.name}") from None
        except OSError as error:
            raise HomeUnusable(f"cannot use {root}: {error.strerror}") from error
        yield


def known(home: Home, name: str) -> Known:
    """Look at a machine; with a keeper, only that one knows whether it runs.

    Raises `UnknownMachine`, `SlotUnusable`.
    """
    root = place_of(home, name)
    pid = keeper_of(root)
    try:
        asked = Slot(root).asked_machine()
        generations = Generations(root / "checkpoints")
        checkpoints = [{"number": each.number, "created": each.created,
                        "bytes": generations.bytes_of(each)} for each in generations.listed()]
        since = (root / "machine.json").stat().st_mtime
    except FileNotFoundError:
        raise UnknownMachine(f"there is no machine {name}") from None
    state = "running" if pid is not None else "kept" if checkpoints else \
        "stopped" if (root / LOG).exists() else "created"
    return Known(name, state, pid, since, asked, checkpoints)


def destroy(home: Home, name: str) -> None:
    """Remove a machine without a keeper, and all that was kept of it; raises `Busy`."""
    root = place_of(home, name)
    gone = home.slots / f"{REMOVED}{name}-{os.urandom(6).hex()}"
    with kept_out(root):
        # A program may have it, by the API; what is damaged can be removed.
        with contextlib.suppress(SlotUnusable), Slot.claim(root):
            pass
        root.rename(gone)
    remove_tree(gone)


def leftovers(home: Home) -> Iterator[Path]:
    """What dead keepers left; nothing of a machine that is kept, by a process or on the disk."""
    for root in sorted(home.slots.iterdir()):
        if root.name.startswith((NEW, REMOVED)):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - root.stat().st_mtime > NEWBORN:
                    yield root
        elif NAME.fullmatch(root.name) and root.is_dir() and keeper_of(root) is None:
            yield from (root / each for each in (SOCKET, "machine") if (root / each).exists())


def sweep(home: Home) -> list[Path]:
    """Remove the `leftovers`; what is being used meanwhile stays."""
    found = []
    for path in leftovers(home):
        with contextlib.suppress(Busy, UnknownMachine, SlotUnusable):
            if path.name.startswith((NEW, REMOVED)):
                remove_tree(path)
            else:
                with kept_out(path.parent, 0), Slot.claim(path.parent):  # which removes the rest
                    (path.parent / SOCKET).unlink(missing_ok=True)
            found.append(path)
    return found


def _publish(newborn: Path, root: Path) -> str:
    try:
        newborn.rename(root)
    except (FileExistsError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno == 39:  # ENOTEMPTY: how rename says that it exists
            raise FileExistsError from None
        raise HostDiskFull(f"cannot make {root}: {error.strerror}") from error
    return root.name


def _unused(home: Home) -> Iterator[str]:
    """Names that nobody has, or had a moment ago."""
    number = 0
    while True:
        number += 1
        if not (home.slots / f"m{number}").exists():
            yield f"m{number}"


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or name == AUTO:
        raise UsageError(f"{name!r} is not a name for a machine", advice="Use up to 63 letters, "
                         "digits, '.', '_' and '-', the first one a letter or digit.")
