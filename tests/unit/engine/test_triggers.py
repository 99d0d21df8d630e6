"""What the engine does about each trigger file, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmjob.engine.agreement import Pair
from vmjob.engine.clock import RunClock
from vmjob.engine.triggers import Sent, TriggerWatch
from vmjob.engine.work import Verdict
from vmjob.errors import HeartbeatStopped, VmjobError
from vmjob.grid.contract import Quiet
from vmjob.job.model import Triggers
from vmjob.job.triggers import MOST_BYTES, Postponement

pytestmark = pytest.mark.anyio


class Heard(Quiet):
    def __init__(self) -> None:
        self.heard: list[object] = []
        self.busy = False

    def fraction_done(self, fraction: float) -> None:
        self.heard.append(fraction)

    async def trickle(self, variety: str, text: str) -> bool:
        if not self.busy:
            self.heard.append((variety, text))
        return not self.busy

    async def upload(self, name: str) -> None:
        self.heard.append(name)

    def operations(self, floating: float, integer: float) -> None:
        self.heard.append((floating, integer))

    def warning(self, text: str) -> None:
        self.heard.append(text)


class StoppedClock(RunClock):
    now = 0.0

    @property
    def seconds(self) -> float:
        return self.now


class Bench:
    """A folder, what is looked for in it, and what came of it."""

    def __init__(self, root: Path, sent: Path | None = None, **triggers: object) -> None:
        self.root = root
        self.grid = Heard()
        self.clock = StoppedClock()
        self.ends: list[Verdict | VmjobError] = []
        self.waits: list[Postponement] = []
        self.agreed = True
        self.watch = TriggerWatch(root, Triggers(**triggers),  # type: ignore[arg-type]
                                  self.clock, self.grid, Sent(sent), self, self.ends.append,
                                  self._postpone)

    def version(self, name: str) -> Pair | None:
        return Pair(None, None) if (self.root / name).exists() and self.agreed else None

    async def remove(self, name: str, version: Pair) -> bool:
        (self.root / name).unlink()
        return True

    async def look(self) -> None:
        await self.watch.look(self.clock.now)

    async def _postpone(self, said: Postponement) -> None:
        self.waits.append(said)

    def put(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(exist_ok=True)
        (self.root / name).write_text(text)


async def test_a_completion_file_ends_the_job_with_what_it_says(tmp_path: Path) -> None:
    bench = Bench(tmp_path, completion="done")
    await bench.look()
    assert bench.ends == []
    bench.put("done", "3\n1\nno input\n")
    await bench.look()
    assert bench.ends == [Verdict(3, "no input", notice=True)]


async def test_a_job_that_wants_to_wait_is_heard_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, temporary_exit="later")
    bench.put("later", "60\n0\nno work\n")
    await bench.look()
    await bench.look()
    assert bench.waits == [Postponement(60, False, "no work")]
    assert not (tmp_path / "later").exists()


async def test_a_fraction_in_a_sub_directory_is_told_when_it_changes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fraction_done="results/progress")
    bench.put("results/progress", "0.25\n")
    await bench.look()
    await bench.look()
    bench.put("results/progress", "0.25\n0.5\n")
    await bench.look()
    assert bench.grid.heard == [0.25, 0.5]


async def test_a_heart_that_beats_keeps_the_job_alive(tmp_path: Path) -> None:
    bench = Bench(tmp_path, heartbeat="beat", heartbeat_interval=10.0)
    for turn in range(5):
        bench.put("beat", "")
        os.utime(tmp_path / "beat", ns=(turn, turn))  # whatever time the guest thinks it is
        bench.clock.now += 9
        await bench.look()
    assert bench.ends == []


async def test_a_heart_that_stops_ends_the_job(tmp_path: Path) -> None:
    bench = Bench(tmp_path, heartbeat="beat", heartbeat_interval=10.0)
    bench.put("beat", "")
    bench.clock.now = 9
    await bench.look()
    bench.clock.now = 19.5
    await bench.look()
    (end,) = bench.ends
    assert isinstance(end, HeartbeatStopped)


async def test_a_heart_is_not_missed_while_a_large_file_is_copied(tmp_path: Path) -> None:
    bench = Bench(tmp_path, heartbeat="beat", heartbeat_interval=10.0)
    bench.put("beat", "")
    await bench.look()
    bench.clock.now = 25  # the copy was begun at 1
    await bench.watch.look(since=1)
    assert bench.ends == []
    await bench.watch.look(since=25)
    assert len(bench.ends) == 1


async def test_a_job_that_stands_still_need_not_beat(tmp_path: Path) -> None:
    """Its clock stands still as well: that is all the watch goes by."""
    bench = Bench(tmp_path, heartbeat="beat", heartbeat_interval=1e-9)
    await bench.look()
    assert bench.ends == []


async def test_a_trickle_is_sent_once_and_removed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trickles=("t1", "t2"))
    bench.grid.busy = True
    bench.put("t1", "hello")
    await bench.look()
    assert (tmp_path / "t1").exists()  # the grid has not taken it yet
    bench.grid.busy = False
    await bench.look()
    await bench.look()
    assert bench.grid.heard == [("t1", "hello")]
    assert not (tmp_path / "t1").exists()


async def test_a_trickle_that_comes_back_with_a_checkpoint_is_not_sent_again(
        tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    for _ in range(2):
        bench = Bench(tmp_path / "shared", tmp_path / "sent", trickles=("t",))
        bench.put("t", "credit 5")
        os.utime(tmp_path / "shared" / "t", ns=(7, 7))
        await bench.look()
        assert not (tmp_path / "shared" / "t").exists()
    assert bench.grid.heard == []
    bench.put("t", "credit 5")  # another one that says the same
    await bench.look()
    assert bench.grid.heard == [("t", "credit 5")]


async def test_a_trickle_of_a_gigabyte_is_thrown_away_unread(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trickles=("t",))
    bench.put("t", "")
    os.truncate(tmp_path / "t", 1 << 30)
    await bench.look()
    (warning,) = bench.grid.heard
    assert f"longer than {MOST_BYTES} bytes" in str(warning)
    assert not (tmp_path / "t").exists()


async def test_what_only_one_side_has_waits_until_both_have_it(tmp_path: Path) -> None:
    """Else it could not be taken away, and would be acted on again."""
    bench = Bench(tmp_path, trickles=("t",), temporary_exit="later")
    bench.agreed = False
    bench.put("t", "hello")
    bench.put("later", "60")
    await bench.look()
    assert (bench.grid.heard, bench.waits) == ([], [])
    bench.agreed = True
    await bench.look()
    assert (bench.grid.heard, len(bench.waits)) == ([("t", "hello")], 1)


async def test_an_upload_is_asked_for_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, uploads=("part1", "part2"))
    bench.put("part1", "x")
    await bench.look()
    await bench.look()
    assert bench.grid.heard == ["part1"]


async def test_operations_are_told_when_they_change(tmp_path: Path) -> None:
    bench = Bench(tmp_path, credit="ops")
    bench.put("ops", "1e9\n5\n")
    await bench.look()
    await bench.look()
    assert bench.grid.heard == [(1e9, 5.0)]


async def test_links_and_pipes_are_no_triggers(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("0\n")
    root = tmp_path / "shared"
    root.mkdir()
    (root / "done").symlink_to("../outside")
    os.mkfifo(root / "t")
    bench = Bench(root, completion="done", trickles=("t",))
    await bench.look()
    assert bench.ends == []
    assert bench.grid.heard == []


async def test_what_the_guest_has_yet_to_write_again_does_not_count(tmp_path: Path) -> None:
    """After a checkpoint the host has files of the time since: the guest lacks what they mean."""
    bench = Bench(tmp_path, completion="done", uploads=("part",))
    bench.agreed = False
    bench.put("done", "0\n")
    bench.put("part", "x")
    await bench.look()
    assert (bench.ends, bench.grid.heard) == ([], [])
