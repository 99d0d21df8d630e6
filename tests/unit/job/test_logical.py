"""What a name in a slot stands for, and that it never stands for the rest of the computer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.errors import BadPath
from vmjob.job.logical import is_there, resolve
from vmjob.job.reading import Surroundings


@pytest.fixture
def slot(tmp_path: Path) -> Surroundings:
    """A slot and a project as the client lays them out."""
    (tmp_path / "slots" / "0").mkdir(parents=True)
    project = tmp_path / "projects" / "example.org_test"
    project.mkdir(parents=True)
    (project / "in_1.0").write_text("data")
    return Surroundings(tmp_path / "slots" / "0", project)


def link(slot: Surroundings, name: str, target: str) -> None:
    (slot.directory / name).write_text(f"<soft_link>{target}</soft_link>\n")


def test_a_link_file_stands_for_what_it_names(slot: Surroundings) -> None:
    assert slot.project is not None
    link(slot, "in", "../../projects/example.org_test/in_1.0")
    assert resolve("in", slot) == slot.project / "in_1.0"
    assert resolve("in", slot).read_text() == "data"
    assert resolve("in", Surroundings(slot.directory)) == slot.project / "in_1.0"


def test_an_output_that_is_not_there_yet_has_its_place(slot: Surroundings) -> None:
    assert slot.project is not None
    link(slot, "out", "../../projects/example.org_test/result_0")
    assert resolve("out", slot) == slot.project / "result_0"


def test_a_file_and_a_symbolic_link_stand_for_themselves(slot: Surroundings) -> None:
    (slot.directory / "in").write_text("<soft_links> are another thing")
    (slot.directory / "sym").symlink_to("../../projects/example.org_test/in_1.0")
    assert resolve("in", slot) == slot.directory / "in"
    (slot.directory / "sym2").symlink_to("in")
    assert resolve("sym", slot) == slot.directory / "sym"
    assert resolve("missing", slot) == slot.directory / "missing"
    assert is_there("in", slot)
    assert is_there("sym", slot)
    assert not is_there("missing", slot)
    (slot.directory / "in").write_text("<soft_link>/etc/passwd</soft_link>")
    assert resolve("sym2", slot) == slot.directory / "sym2"
    assert not is_there("a\0b", slot)


@pytest.mark.parametrize("target", [
    "/etc/passwd", "../../../etc/passwd", "../../projects", "../../projects/example.org_test",
    "../../projects/../x/y", "../../projects/a/../../../etc/passwd", "../1/init_data.xml"])
@pytest.mark.parametrize("with_project", [True, False])
def test_a_link_leads_nowhere_but_into_the_project(
        slot: Surroundings, target: str, with_project: bool) -> None:
    if with_project and target == "../../projects/example.org_test":
        return  # the project itself
    link(slot, "in", target)
    with pytest.raises(BadPath, match="leads out"):
        resolve("in", slot if with_project else Surroundings(slot.directory))


def test_a_link_is_followed_once(slot: Surroundings) -> None:
    link(slot, "a", "b")
    link(slot, "b", "/etc/passwd")
    assert resolve("a", slot) == slot.directory / "b"


@given(st.binary(max_size=60))
def test_no_content_of_a_file_leads_out(tmp_path_factory: pytest.TempPathFactory,
                                        content: bytes) -> None:
    where = Surroundings(tmp_path_factory.getbasetemp())
    (where.directory / "x").write_bytes(b"<soft_link>" + content + b"</soft_link>")
    try:
        found = resolve("x", where)
    except BadPath:
        return
    assert found.is_relative_to(where.directory) or "projects" in found.parts
