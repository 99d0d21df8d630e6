"""Whenever the power goes, and whatever the disk made of what was not synced: a generation is
found that is whole, and none that was finished is lost."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.campaign import power
from tests.campaign.power import Broken, Disk, Recorder
from vmjob.engine.generations import Generations

#: Publishes in a row: enough for two generations to be given up.
PUBLISHES = 4


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[power.Op]:
    return recorded(tmp_path_factory.mktemp("recorded"))


def recorded(directory: Path) -> list[power.Op]:
    """Some publishes with files that stay, files that are shared by two, and files that go."""
    recorder = Recorder(directory)
    live: dict[str, bytes] = {}
    with recorder.recording():
        made = Generations(directory)
        for number in range(1, PUBLISHES + 1):
            new = {"root": b"root" * 300} if number == 1 else {}
            for kind, size in (("pages", 9000), ("index", 513), ("disk", 4096)):
                new[f"{number:06}.{kind}"] = bytes([number]) * size
            live = {name: data for name, data in live.items()
                    if name == "root" or name.endswith("disk")}
            for name, data in new.items():
                recorder.make(name, data)
            live |= new
            recorder.publish(made, number, live)
    return recorder.log


def survives(log: list[power.Op], place: Path, world: Callable[[Disk], dict[str, bytes]]) -> int:
    """Cut the power after everything that was done; how often that was."""
    cuts = 0
    for disk in power.every_cut(log):
        power.check(power.cut(disk, world(disk)), place / f"{cuts}")
        cuts += 1
    assert cuts > PUBLISHES * 10
    return cuts


def test_a_generation_is_found_when_only_what_was_synced_is_there(
        log: list[power.Op], tmp_path: Path) -> None:
    survives(log, tmp_path, Disk.only_synced)


def test_a_generation_is_found_when_everything_reached_the_disk(
        log: list[power.Op], tmp_path: Path) -> None:
    survives(log, tmp_path, Disk.all_done)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow,
          HealthCheck.function_scoped_fixture])
@given(moment=st.floats(0, 1), rng=st.randoms(use_true_random=False))
def test_a_generation_is_found_whatever_became_of_the_rest(
        log: list[power.Op], moment: float, rng: random.Random) -> None:
    disk = Disk()
    disk.do_all(log[:round(moment * len(log))])
    with tempfile.TemporaryDirectory() as place:
        power.check(power.cut(disk, disk.anything(rng)), Path(place) / "checkpoints")


def test_a_job_survives_one_power_cut_after_the_other() -> None:
    """With failed checkpoints, generations that are given up, and processes that are killed."""
    found = power.campaign(count=100, seed=1)
    assert found["broken"] == []
    assert found["cuts"] == 100
    assert len(found["found"]) == 3


# -- the simulation itself would notice --------------------------------------------------------


@pytest.mark.parametrize("left_out", ["files", "the manifest's name"])
def test_a_sync_that_is_left_out_is_noticed(left_out: str, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    log = []
    after_rename = False
    for op in recorded(tmp_path / "made"):
        if op.kind == "sync" and (
                after_rename if left_out != "files" else op.name.endswith("pages")):
            continue
        after_rename = op.kind == "rename"
        log.append(op)
    with pytest.raises(Broken):
        survive_often(log, tmp_path)


def survive_often(log: list[power.Op], place: Path) -> None:
    rng = random.Random(1)
    for attempt in range(20):
        (place / f"{attempt}").mkdir()
        survives(log, place / f"{attempt}", lambda disk: disk.anything(rng))
