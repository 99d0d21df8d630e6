"""The states of a job are those of the page, and nothing else can happen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmjob.engine.life import NEXT, Life, State
from vmjob.engine.record import Record
from vmjob.grid.contract import Quiet

PAGE = Path(__file__).parents[3] / "docs/explanation/life.md"


class Heard(Quiet):
    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)


def test_every_state_is_on_the_page() -> None:
    rows = re.findall(r"^\| `([a-z]+)` \|", PAGE.read_text(), re.MULTILINE)
    assert rows == [str(state) for state in State]
    picture = PAGE.with_name("life.svg").read_text()
    assert set(re.findall(r'text-anchor="middle" fill="#fff">([a-z]+)<', picture)) == set(rows)


def test_every_state_leads_to_the_end() -> None:
    assert set(NEXT) == set(State)
    for state in State:
        seen, ahead = {state}, [state]
        while ahead:
            for each in NEXT[ahead.pop()] - seen:
                seen.add(each)
                ahead.append(each)
        assert State.ENDED in seen


def test_a_way_that_is_not_in_the_table_is_refused() -> None:
    life = Life(Record(), Heard())
    life.enter(State.MACHINE)
    with pytest.raises(AssertionError):
        life.enter(State.RUN)


def test_a_checkpoint_is_part_of_running_and_gives_way_to_suspending() -> None:
    grid = Heard()
    life = Life(Record(), grid)
    for state in (State.MACHINE, State.RESTORE, State.RUN):
        life.enter(state)
    with life.during(State.CHECKPOINT):
        life.enter(State.SUSPENDED)
    assert life.state is State.SUSPENDED
    life.enter(State.RUN)
    with life.during(State.CHECKPOINT):
        pass
    assert grid.phases == ["machine", "restore", "run", "checkpoint", "suspended", "run",
                           "checkpoint", "run"]


def test_each_state_counts_its_seconds_and_a_failure_ends_it() -> None:
    record = Record()
    life = Life(record, Heard())
    life.enter(State.MACHINE)
    life.enter(State.BOOT)
    life.finish()
    assert set(record.phases) == {"machine", "boot", "end", "total"}
    assert life.state is State.ENDED
