"""A guest of this process with one folder: the agent's code, without a machine or a clock."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from vmjob.guest.agent import folders, parcels
from vmjob.guest.agent.folders import Folders, Stamp
from vmjob.guest.agent.tree import TreeReceiver
from vmjob.guest.agent.wire import MAX_RESPONSE_PIECE
from vmjob.guest.folders import News, parse_news, split_names

#: What stands for every inode: a guest that goes back has those of then, a copy has others.
INODE = 1


class Clock:
    """Time that passes when it is told to; put in place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 0.0


class LocalGuest:
    """Stands for an `AgentClient`; its folder is ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.later: dict[object, Callable[[], None]] = {}
        self.folders = Folders(self._later)
        #: Called before each request, with its name: a guest does not wait for us.
        self.meanwhile: Callable[[str], None] = lambda name: None

    def _later(self, key: object, seconds: float, call: Callable[[], None]) -> None:
        self.later[key] = call

    # -- going back ----------------------------------------------------------------------------

    def snapshot(self, where: Path) -> object:
        """Everything that the guest is now; its files are kept in ``where``."""
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(self.root, where, symlinks=True)
        for each in self.folders._folders.values():
            each._close()
        return copy.deepcopy(self.folders._folders)

    def go_back(self, where: Path, state: object) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(where, self.root, symlinks=True)
        self.folders._folders = copy.deepcopy(state)  # type: ignore[assignment]

    # -- what a client does --------------------------------------------------------------------

    async def mkdir(self, path: str) -> None:
        self.root.mkdir(exist_ok=True)

    async def folder(self, path: str, seen: int, *, without: Iterable[str] = (),
                     most: int = 10_000, begin: bool = False) -> News:
        self.meanwhile("folder")
        return parse_news(self.folders.changes(str(self.root), {
            "seen": seen, "without": sorted(without), "most": most, "begin": begin}), seen)

    async def folder_note(self, path: str, stamps: Mapping[str, Stamp], *,
                          without: Iterable[str] = (), most: int = 10_000) -> None:
        self.meanwhile("note")
        for names in split_names(stamps.items()):
            self.folders.note(str(self.root), {"without": sorted(without), "most": most,
                                               "names": names})

    async def folder_remove(self, path: str, stamps: Mapping[str, Stamp], *,
                            without: Iterable[str] = (), most: int = 10_000) -> set[str]:
        self.meanwhile("remove")
        kept: set[str] = set()
        for names in split_names(stamps.items()):
            kept |= set(self.folders.remove(str(self.root), {
                "without": sorted(without), "most": most, "names": names})["kept"])
        return kept

    async def put_parcel(self, records: Iterator[bytes | memoryview],
                         destination: str) -> list[int]:
        self.meanwhile("put")
        parent = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        receiver = parcels.ParcelReceiver(parent, ".vmjob-in", limit=1 << 40, entries=100_000)
        try:
            for record in records:
                receiver.feed(bytes(record))
            assert receiver.done
            inodes = parcels.unpack(parent, ".vmjob-in", receiver.contents, None)
        finally:
            receiver.close()
            os.close(parent)
            shutil.rmtree(self.root / ".vmjob-in", ignore_errors=True)
        return [INODE if each else 0 for each in inodes]

    async def get_parcel(self, source: str, names: list[Any], parent: int, staged: str,
                         limit: int) -> set[int]:
        self.meanwhile("get")
        receiver = TreeReceiver(parent, staged, limit=limit, entries=len(names) + 1)
        last = b""
        for record in parcels.send_parcel(str(self.root), names, MAX_RESPONSE_PIECE):
            last = bytes(record)
            receiver.feed(last)
        assert receiver.done
        return set(folders.json.loads(last[1:])["changed"])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return fake_clock(monkeypatch)


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Nobody waits, and every file has one inode."""
    made = Clock()
    real = folders.stamp

    def stamp(facts: os.stat_result) -> Stamp | None:
        found = real(facts)
        return found if found is None or found[0] == "d" else (*found[:4], INODE)

    monkeypatch.setattr("vmjob.guest.agent.folders.time", made)
    monkeypatch.setattr("vmjob.engine.folders.time", made)
    for module in ("guest.agent.folders", "guest.agent.parcels", "engine.folderside",
                   "engine.folders"):
        monkeypatch.setattr(f"vmjob.{module}.stamp", stamp)
    return made
