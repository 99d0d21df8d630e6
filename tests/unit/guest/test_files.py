"""Listings fit into an answer, whatever a job calls its files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmjob.guest.agent import files, wire
from vmjob.guest.agent.request import reply


@pytest.mark.parametrize("name", ["x" * 245, "ü" * 120, '"\\\1' * 80, "\udcff" * 240])
def test_a_listing_fits_into_an_answer(tmp_path: Path, name: str) -> None:
    for number in range(5000):
        os.close(os.open(os.fsencode(f"{tmp_path}/{number}{name}"), os.O_CREAT | os.O_WRONLY))
    found = files.listing(str(tmp_path))
    assert found["truncated"] is True
    size = len(reply(200, found).partition(b"\r\n\r\n")[2])
    assert wire.MAX_RESPONSE_BODY - 4096 < size <= wire.MAX_RESPONSE_BODY


def test_a_listing_has_a_bounded_number_of_entries(tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LISTING", 5)
    for number in range(6):
        (tmp_path / str(number)).touch()
    found = files.listing(str(tmp_path))
    assert ([each["name"] for each in found["entries"]], found["truncated"]) == (
        ["0", "1", "2", "3", "4"], True)
    (tmp_path / "5").unlink()
    assert files.listing(str(tmp_path))["truncated"] is False


def test_a_link_is_listed_and_deleted_as_itself(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to("kept")
    assert [(e["name"], e["type"]) for e in files.listing(str(tmp_path / "link"))["entries"]] == [
        ("link", "link")]
    files.delete(str(tmp_path / "link"))
    assert (tmp_path / "kept" / "file").exists()
