"""Random histories of a folder: both sides become the same, and nothing is ever half."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.engine.local_guest import LocalGuest, fake_clock
from vmjob.engine.folders import Mirror
from vmjob.guest.agent import folders
from vmjob.job.files import Folder

NAMES = ("a", "b", "d", "d/x", "d/y", "d/e/z", "x.xml")
names = st.sampled_from(NAMES)
#: Rounds after which both sides must be the same when nothing changes any more.
ENOUGH = 12


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run something that waits for no event loop, only for threads that are none here."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


class Histories(RuleBasedStateMachine):
    """Both sides write, remove and replace; the guest goes back to a checkpoint now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.clock = fake_clock(self.patches)

        async def at_once(call: Any, *arguments: Any) -> Any:
            return call(*arguments)

        async def no_time(seconds: float) -> None:
            self.clock.now += seconds

        self.patches.setattr("anyio.to_thread.run_sync", at_once)
        self.patches.setattr("vmjob.engine.folders.anyio.sleep", no_time)
        self.patches.setattr("vmjob.engine.folders.anyio.Lock", NoLock)
        self.top = Path(tempfile.mkdtemp())
        self.host = self.top / "host"
        self.guest = LocalGuest(self.top / "guest")
        self.host.mkdir()
        self.guest.root.mkdir()
        self.moment = 10**18
        self.count = 0
        #: Every content that a file ever had when it was whole.
        self.whole: set[bytes] = set()
        self.open: tuple[Any, Path, bytes] | None = None
        self.kept: tuple[object, str] | None = None
        #: What the host wrote when the guest's side of it had come, and nobody touched since.
        self.own: dict[str, bytes] = {}
        self.mirror = self.make()
        finish(self.mirror.fill())

    def make(self, known: dict[str, Any] | None = None) -> Mirror:
        return Mirror(Folder("shared", self.host, "shared"), self.guest,  # type: ignore[arg-type]
                      redact=bytes, warn=lambda text: None, known=known,
                      journal=self.top / "journal")

    def teardown(self) -> None:
        try:
            self.stop_writing()
            self.become_the_same()
        finally:
            self.patches.undo()
            shutil.rmtree(self.top)

    # -- what both sides do --------------------------------------------------------------------

    def content(self) -> bytes:
        self.count += 1
        made = f"content {self.count} ".encode() * (self.count % 5 + 1)
        self.whole.add(made)
        return made

    def touch(self, path: Path) -> None:
        self.moment += 10**9
        os.utime(path, ns=(self.moment, self.moment))

    def write(self, root: Path, name: str, content: bytes) -> None:
        path = root / name
        if self.open is not None and path == self.open[1]:
            return  # two who write to one file at a time do not make it whole
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.rmtree(path)
            path.write_bytes(content)
        except (FileExistsError, NotADirectoryError):
            return  # something above it is a file
        self.touch(path)

    def remove(self, root: Path, name: str) -> None:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()

    def touched(self, name: str) -> None:
        for each in list(self.own):
            if each == name or each.startswith(name + "/") or name.startswith(each + "/"):
                del self.own[each]

    @rule(name=names)
    def guest_writes(self, name: str) -> None:
        self.touched(name)
        self.write(self.guest.root, name, self.content())

    @rule(name=names)
    def host_writes(self, name: str) -> None:
        self.touched(name)
        content = self.content()
        self.write(self.host, name, content)
        known = self.mirror._agreed
        parts = name.split("/")
        if not (self.guest.root / name).is_dir() and text(self.host / name) == content and all(
                self.now(self.guest.root / each) == (known[each].guest if each in known else None)
                for each in ("/".join(parts[:at + 1]) for at in range(len(parts)))):
            self.own[name] = content

    @rule(name=names)
    def guest_removes(self, name: str) -> None:
        self.touched(name)
        self.remove(self.guest.root, name)

    @rule(name=names)
    def host_removes(self, name: str) -> None:
        self.touched(name)
        self.remove(self.host, name)

    @rule(name=names)
    def guest_makes_a_directory(self, name: str) -> None:
        self.touched(name)
        try:
            (self.guest.root / name).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            pass

    @rule(name=names, mode=st.sampled_from([0o644, 0o755, 0o600]))
    def guest_changes_a_mode(self, name: str, mode: int) -> None:
        self.touched(name)
        path = self.guest.root / name
        if path.is_file():
            path.chmod(mode)

    @precondition(lambda self: self.open is None)
    @rule(name=names)
    def guest_begins_to_write(self, name: str) -> None:
        self.touched(name)
        path = self.guest.root / name
        if path.parent.is_dir() and not path.is_dir():
            self.open = (path.open("wb", buffering=0), path, self.content())
            self.open[0].write(self.open[2][:3])
            self.touch(path)

    @precondition(lambda self: self.open is not None)
    @rule()
    def stop_writing(self) -> None:
        if self.open is not None:
            file, path, content = self.open
            self.touched(str(path.relative_to(self.guest.root)))
            file.write(content[3:])
            self.moment += 10**9
            os.utime(file.fileno(), ns=(self.moment, self.moment))
            file.close()
            self.open = None

    # -- what we do ----------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0]))
    def step(self, seconds: float) -> None:
        self.clock.now += seconds
        finish(self.mirror.step())

    @rule(name=names, act=st.sampled_from(["write", "remove"]),
          when=st.sampled_from(["folder", "note", "remove", "put", "get"]))
    def step_while_the_guest_acts(self, name: str, act: str, when: str) -> None:
        done = False

        def meanwhile(request: str) -> None:
            nonlocal done
            if request == when and not done:
                done = True
                if act == "write":
                    self.guest_writes(name)
                else:
                    self.guest_removes(name)

        self.guest.meanwhile = meanwhile
        self.clock.now += 0.5
        finish(self.mirror.step())
        self.guest.meanwhile = lambda request: None

    @precondition(lambda self: self.open is None)
    @rule()
    def keep(self) -> None:
        """A checkpoint."""
        self.kept = (self.guest.snapshot(self.top / "kept"), json.dumps(self.mirror.known()))

    @precondition(lambda self: self.kept is not None and self.open is None)
    @rule()
    def go_back(self) -> None:
        """Our process ends; another one goes on from the checkpoint."""
        assert self.kept is not None
        self.guest.go_back(self.top / "kept", self.kept[0])
        self.mirror = self.make(json.loads(self.kept[1]))

    @rule(name=names)
    def act_on_a_file(self, name: str) -> None:
        self.touched(name)
        version = self.mirror.version(name)
        if version is None:
            return
        newer = {root: found for root, known in ((self.host, version.host),
                                                 (self.guest.root, version.guest))
                 if (found := self.now(root / name)) is not None and found != known}
        finish(self.mirror.remove(name, version))
        for root in (self.host, self.guest.root):
            assert self.now(root / name) == newer.get(root)

    def now(self, path: Path) -> folders.Stamp | None:
        return folders.stamp(path.lstat()) if path.exists() else None

    # -- what must be so -----------------------------------------------------------------------

    @invariant()
    def nothing_on_the_host_is_half(self) -> None:
        for path in self.host.rglob("*"):
            if path.is_file():
                assert path.read_bytes() in self.whole

    def become_the_same(self) -> None:
        """When nothing changes any more, both sides are the same soon, whatever was before."""
        for _ in range(ENOUGH):
            self.clock.now += 0.7
            finish(self.mirror.step())
        if self.kept is None:
            assert self.listed(self.host) == self.listed(self.guest.root)
        for name, content in self.own.items():
            assert text(self.host / name) == text(self.guest.root / name) == content
        self.clock.now += 1
        assert finish(self.mirror.step()) is False, "it does not come to rest"

    def listed(self, root: Path) -> dict[str, object]:
        return {str(path.relative_to(root)): None if path.is_dir() else
                (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode & 0o777)
                for path in root.rglob("*")}


def text(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


class NoLock:
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *exc: object) -> None: ...


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
