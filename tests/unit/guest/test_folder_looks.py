"""How often a folder is looked through, and what of it is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmjob.guest.agent import folders
from vmjob.guest.agent.folders import PERIOD, SETTLE, SHARE, Folder, Folders, open_for_writing


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.used = 0.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        self.used += self.step
        return self.used

    #: Seconds of a processor between two looks at the clock.
    step = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(folders, "time", made)
    return made


def look(folder: Folder) -> int:
    before = folder.looks
    folder.work(1)
    return folder.looks - before


def names(folder: Folder, seen: int = 0) -> list[str]:
    return [entry[0] for entry in folder.changes(seen)["entries"] if entry[1] != "?"]


def test_a_small_folder_is_looked_through_again_and_again(tmp_path: Path, clock: Clock) -> None:
    folder = Folder(str(tmp_path))
    assert look(folder) == 1
    clock.now += PERIOD / 2
    assert look(folder) == 0
    clock.now += PERIOD / 2 + 0.001
    assert look(folder) == 1


def test_looks_that_take_long_are_rare(tmp_path: Path, clock: Clock,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was slow for another reason is not taken for it."""
    monkeypatch.setattr(folders, "ENTRY", 1.0)
    (tmp_path / "a").touch()
    folder = Folder(str(tmp_path))
    clock.step = 0.1
    for _ in range(4):
        assert look(folder) == 1
        clock.now += 0.1 / SHARE - 0.1
        assert look(folder) == 0
        clock.now += 0.2
    clock.step = 0.01
    assert look(folder) == 1
    clock.step = 0.1
    clock.now += 0.01 / SHARE + 0.1
    assert look(folder) == 1
    clock.now += 0.01 / SHARE + 0.1
    assert look(folder) == 1


def test_a_folder_of_few_files_is_never_taken_for_a_large_one(tmp_path: Path,
                                                              clock: Clock) -> None:
    folder = Folder(str(tmp_path))
    (tmp_path / "a").touch()
    clock.step = 10.0
    for _ in range(5):
        assert look(folder) == 1
        clock.now += PERIOD + SETTLE


def test_a_file_is_told_when_it_was_the_same_for_a_while(tmp_path: Path, clock: Clock) -> None:
    folder = Folder(str(tmp_path))
    (tmp_path / "a").write_text("x")
    look(folder)
    assert names(folder) == []
    assert folder.wait() == pytest.approx(SETTLE)
    clock.now += SETTLE
    folder.work(1)
    assert names(folder) == ["a"]
    seen = folder.version
    (tmp_path / "a").write_text("more")
    for _ in range(5):
        clock.now += PERIOD
        with (tmp_path / "a").open("a") as file:
            file.write("still more")
        look(folder)
        assert names(folder, seen) == []
    clock.now += PERIOD
    look(folder)
    assert names(folder, seen) == ["a"]


def test_who_waits_for_a_lease_to_end_is_not_kept_waiting_and_nobody_is_ended(
        tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    fd = os.open(path, os.O_RDONLY)
    assert open_for_writing(fd) is False
    with path.open("a"):
        assert open_for_writing(fd) is True
    assert open_for_writing(fd) is False
    os.close(fd)


def test_a_long_look_lets_others_have_a_turn(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(500):
        (tmp_path / f"{number}").touch()
    monkeypatch.setattr(folders, "SLICE", 0.0001)
    turns: list[object] = []
    calls: dict[object, object] = {}

    def later(key: object, seconds: float, call: object) -> None:
        turns.append(key)
        calls[key] = call

    kept = Folders(later)
    told = kept.changes(str(tmp_path), {"begin": True})
    assert told["looking"]
    while calls:
        calls.popitem()[1]()  # type: ignore[operator]
    assert len(turns) > 3
    told = kept.changes(str(tmp_path), {})
    assert not told["looking"]
    assert len(told["entries"]) == 500


def test_what_does_not_fit_into_one_answer_comes_in_the_next(tmp_path: Path) -> None:
    kept = Folders(lambda key, seconds, call: None)
    for number in range(2500):
        (tmp_path / f"{number:04}").touch()
    (tmp_path / "d").mkdir()
    folder = kept._find(str(tmp_path), {})
    folder.begin(at_once=True)
    folder.work(100)
    first = kept.changes(str(tmp_path), {})
    assert (len(first["entries"]), first["more"]) == (2000, True)
    second = kept.changes(str(tmp_path), {"seen": first["version"]})
    assert (len(second["entries"]), second["more"]) == (501, False)
    third = kept.changes(str(tmp_path), {"seen": second["version"]})
    assert (third["entries"], third["version"]) == ([], second["version"])


def test_a_version_of_another_agent_is_no_version(tmp_path: Path) -> None:
    kept = Folders(lambda key, seconds, call: None)
    (tmp_path / "a").touch()
    told = kept.changes(str(tmp_path), {"begin": True, "seen": 1000})
    assert told["since"] == 0
    assert len(told["entries"]) == 1
