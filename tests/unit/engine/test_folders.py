"""Folders in step, with the real agent as a process of this computer."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from vmjob.engine.folders import Mirror
from vmjob.engine.session import Session, open_session
from vmjob.home import Home
from vmjob.job.files import Folder
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver, FakeMachine

pytestmark = pytest.mark.anyio

#: Seconds in which something must have come; it takes half of one.
DEADLINE = 20.0


@pytest.fixture
async def session(home: Home, fake_shape: MachineSpec) -> AsyncIterator[Session]:
    async with open_session(home, FakeDriver(), fake_shape) as opened:
        yield opened


class Both:
    """A folder on both sides: ``host`` and ``guest`` are where it is."""

    def __init__(self, session: Session, host: Path) -> None:
        assert isinstance(session.machine, FakeMachine)
        self.session = session
        self.host = host
        self.guest = session.machine.workdir / "shared"
        self.folder = Folder("shared", host, "shared")
        self.warnings: list[str] = []

    def mirror(self, **more: object) -> Mirror:
        given = {key: more.pop(key) for key in list(more) if key in Folder.__dataclass_fields__}
        self.folder = replace(self.folder, **given)  # type: ignore[arg-type]
        options = {"redact": lambda content: b"redacted", "warn": self.warnings.append, **more}
        return Mirror(self.folder, self.session.client, **options)  # type: ignore[arg-type]


@pytest.fixture
def both(session: Session, tmp_path: Path) -> Both:
    host = tmp_path / "host"
    host.mkdir()
    return Both(session, host)


async def until(mirror: Mirror, condition: Callable[[], bool]) -> float:
    """Rounds until something is so; the seconds that it took."""
    begun = time.monotonic()
    with anyio.fail_after(DEADLINE):
        while not condition():
            await mirror.step()
            if not condition():
                await anyio.sleep(mirror.pause)
    return time.monotonic() - begun


async def rest(mirror: Mirror) -> None:
    """Rounds until both sides have been looked at and nothing was to do."""
    idle = 0
    with anyio.fail_after(DEADLINE):
        while idle < 6:
            idle = 0 if await mirror.step() else idle + 1
            await anyio.sleep(mirror.pause)


def text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def tree(path: Path) -> dict[str, object]:
    """All that is there, as the folder is to keep it."""
    return {str(each.relative_to(path)): None if each.is_dir() else
            (each.read_bytes(), each.stat().st_mtime_ns, each.stat().st_mode)
            for each in sorted(path.rglob("*"))}


async def test_what_the_host_has_is_there_before_the_first_task(both: Both) -> None:
    (both.host / "a").write_text("a")
    (both.host / "tool").write_text("#!/bin/sh\n")
    (both.host / "tool").chmod(0o755)
    (both.host / "deep" / "er").mkdir(parents=True)
    (both.host / "deep" / "er" / "b").write_text("b")
    os.utime(both.host / "a", ns=(1_000_000_001, 1_000_000_001))
    await both.mirror().fill()
    assert tree(both.guest) == tree(both.host)


async def test_changes_appear_on_the_other_side(both: Both) -> None:
    (both.host / "a").write_text("a")
    mirror = both.mirror()
    await mirror.fill()
    (both.guest / "new").write_text("from the guest")
    await until(mirror, lambda: text(both.host / "new") == "from the guest")
    (both.host / "newer").write_text("from the host")
    await until(mirror, lambda: text(both.guest / "newer") == "from the host")
    (both.guest / "a").write_text("changed there")
    await until(mirror, lambda: text(both.host / "a") == "changed there")
    (both.host / "a").write_text("changed here")
    await until(mirror, lambda: text(both.guest / "a") == "changed here")
    (both.guest / "new").unlink()
    await until(mirror, lambda: not (both.host / "new").exists())
    (both.host / "a").unlink()
    await until(mirror, lambda: not (both.guest / "a").exists())
    (both.guest / "d").mkdir()
    (both.guest / "d" / "x").write_text("x")
    await until(mirror, lambda: text(both.host / "d" / "x") == "x")
    await rest(mirror)
    assert tree(both.guest) == tree(both.host)
    assert not both.warnings


async def test_what_is_not_live_comes_back_after_the_last_task(both: Both) -> None:
    (both.host / "same").write_text("same")
    (both.host / "old").write_text("old")
    (both.host / "gone").write_text("gone")
    mirror = both.mirror(live=False)
    await mirror.fill()
    (both.guest / "old").write_text("new")
    (both.guest / "made").write_text("made")
    (both.guest / "gone").unlink()
    assert await mirror.step() is False
    assert text(both.host / "old") == "old"
    await mirror.collect()
    assert {path.name: path.read_text() for path in both.host.iterdir()} == {
        "same": "same", "old": "new", "made": "made"}
