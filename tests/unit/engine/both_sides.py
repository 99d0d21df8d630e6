"""A folder on both sides of a fake machine, for tests."""

from __future__ import annotations

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
