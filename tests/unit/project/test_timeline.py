"""The picture of a job's life shows what was seen, and where nobody could look."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.project.boinccmd import ClientTask
from vmjob.project.timeline import STATES, Timeline, state_of


def task(name: str = "wu_1_0", *, state: str = "downloaded", active: str = "EXECUTING",
         fraction: float = 0.0, cpu: float = 0.0, checkpoint: float = 0.0) -> ClientTask:
    return ClientTask(name, "wu_1", state, active, "", fraction, cpu, checkpoint, 0.0,
                      suspended=False, ready_to_report=False, slot=0, pid=1, fields={})


def parts(svg: str, tag: str) -> list[dict[str, Any]]:
    root = ET.fromstring(svg)
    return [each.attrib for each in root.iter(f"{{http://www.w3.org/2000/svg}}{tag}")]


@pytest.mark.parametrize(("seen", "state"), [
    (task(state="new"), "downloading"), (task(state="downloading"), "downloading"),
    (task(active=""), "waiting"), (task(), "running"), (task(active="SUSPENDED"), "suspended"),
    (task(state="uploading"), "reporting"), (task(state="compute error"), "failed")])
def test_each_state_has_its_colour(seen: ClientTask, state: str) -> None:
    assert state_of(seen) == state
    line = Timeline()
    line.add(0.0, [seen])
    line.add(1.0, [seen])
    assert STATES[state][0] in [each.get("fill") for each in parts(line.svg(), "rect")
                                if each["height"] == "24"]


def test_lines_are_broken_where_there_was_no_client() -> None:
    line = Timeline()
    for second in (0, 1, 2, 10, 11):
        line.add(float(second), [task(fraction=second / 11, cpu=float(second))])
    points = [each["points"].split() for each in parts(line.svg(), "polyline")]
    assert [len(each) for each in points] == [3, 3, 2, 2]
    assert STATES["away"][0] in [each["fill"] for each in parts(line.svg(), "rect")
                                 if each["height"] == "24"]


def test_each_checkpoint_is_drawn_once() -> None:
    line = Timeline()
    for second, known in enumerate((0.0, 0.0, 1.5, 1.5, 3.0, 3.0)):
        line.add(float(second), [task(cpu=float(second), checkpoint=known)])
    diamonds = re.findall(r"l6 8l-6 8l-6 -8z", line.svg())
    assert len(diamonds) == 2 + 1  # and one in the legend


def test_what_was_done_is_written_above_it_whatever_it_says() -> None:
    line = Timeline()
    line.add(0.0, [task("<evil>&")])
    line.mark(1.0, "<script>")
    texts = [each.text for each in ET.fromstring(line.svg()).iter(
        "{http://www.w3.org/2000/svg}text")]
    assert "<script>" in texts
    assert "<evil>&" in texts


@given(st.lists(st.tuples(st.floats(0, 1e9), st.sampled_from(["a", "b"]),
                          st.floats(0, 1e9), st.floats(0, 1e9)), max_size=20))
def test_any_life_is_a_picture(seen: list[tuple[float, str, float, float]]) -> None:
    line = Timeline()
    for at, name, fraction, cpu in sorted(seen):
        line.add(at, [task(name, fraction=fraction, cpu=cpu)])
    ET.fromstring(line.svg())
