"""Whose files a folder's links may stand for, and what no name of a guest's makes give way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine.both_sides import Both, both, rest, session, text, until
from vmjob.errors import InputUnreadable

__all__ = ["both", "session"]
pytestmark = pytest.mark.anyio


@pytest.fixture
def confined(both: Both, tmp_path: Path) -> dict[str, Any]:
    """Options of a folder whose links lead into it and a project, but not to our own files."""
    (tmp_path / "project" / "vmjob").mkdir(parents=True)
    real = Path(os.path.realpath(tmp_path))
    return {"links": True, "links_to": (real / "host", real / "project"),
            "links_not_to": (real / "project" / "vmjob",)}


@pytest.mark.parametrize("target", ["../key", "../project/vmjob/key", "../project/../key"])
@pytest.mark.parametrize("there", [True, False])
async def test_a_link_that_leads_elsewhere_stands_for_nothing(
        both: Both, confined: dict[str, Any], tmp_path: Path, target: str, there: bool) -> None:
    key = tmp_path / "host" / target
    if there:
        key.write_text("secret")
    (both.host / "data").write_text(f"<soft_link>{target}</soft_link>\n")
    (both.host / "by_symlink").symlink_to(target)
    mirror = both.mirror(**confined)
    await mirror.fill()
    assert text(both.guest / "data") == f"<soft_link>{target}</soft_link>\n"
    assert not (both.guest / "by_symlink").exists()
    assert any("'data' is a link out of the slot" in each for each in both.warnings)
    (both.guest / "data").write_text("forged")
    await until(mirror, lambda: text(both.host / "data") == "forged")
    assert (key.read_text() == "secret") if there else not key.exists()


async def test_a_link_with_a_zero_byte_ends_no_job(both: Both, confined: dict[str, Any]) -> None:
    (both.host / "data").write_bytes(b"<soft_link>../project/a\0b</soft_link>\n")
    await both.mirror(**confined).fill()
    assert both.guest.is_dir()


async def test_what_was_copied_into_a_folder_is_no_link_whatever_it_holds(
        both: Both, confined: dict[str, Any], tmp_path: Path) -> None:
    """The data of a job is anybody's."""
    project = tmp_path / "project"
    says = "<soft_link>../project/others_result</soft_link>\n"
    (project / "data_1").write_text(says)
    (tmp_path / "slot").mkdir()
    source = both.host / "data"
    source.write_text("<soft_link>../project/data_1</soft_link>\n")
    source = source.rename(tmp_path / "project" / "data")
    options = {**confined, "copies": (source,), "texts": {"cmdline": says}}
    mirror = both.mirror(**options)
    await mirror.fill()
    assert text(both.guest / "data") == text(both.guest / "cmdline") == says
    again = both.mirror(**options, known=mirror.known())
    for each in (mirror, again):
        said = f"the result of {id(each)}"
        (both.guest / "data").write_text(said)
        await until(each, lambda said=said: text(both.host / "data") == said)  # type: ignore[misc]
        assert not (project / "others_result").exists()


async def test_what_is_to_be_copied_may_not_lead_elsewhere(
        both: Both, confined: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    source = tmp_path / "project" / "data"
    source.write_text("<soft_link>../key</soft_link>\n")
    with pytest.raises(InputUnreadable, match="leads out"):
        await both.mirror(**confined, copies=(source,)).fill()


async def test_no_name_of_a_guests_makes_a_link_or_a_client_s_file_give_way(
        both: Both, confined: dict[str, Any], tmp_path: Path) -> None:
    out = "<soft_link>../project/out_1</soft_link>\n"
    (both.host / "init_data.xml").write_text("the client's")
    (both.host / "out").write_text(out)
    (both.host / "below").mkdir()
    (both.host / "below" / "out").write_text(out)
    mirror = both.mirror(**confined)
    await mirror.fill()
    for name in ("init_data.xml", "out"):
        (both.guest / name).unlink(missing_ok=True)
        (both.guest / name).mkdir()
        (both.guest / name / "x").write_text("x")
    (both.guest / "below").rmdir()
    (both.guest / "below").write_text("x")
    (both.guest / "other").write_text("comes")
    await until(mirror, lambda: text(both.host / "other") == "comes")
    await rest(mirror)
    await mirror.collect()
    assert text(both.host / "init_data.xml") == "the client's"
    assert text(both.host / "out") == text(both.host / "below" / "out") == out
