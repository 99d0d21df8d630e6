"""Whatever a guest has made in a directory of ours, it can be removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.deep_tree import deepen
from vmjob.home import remove_tree


def test_a_tree_deeper_than_python_calls_itself_is_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    deepen(top, 3000)
    (top / "d" / "file").write_text("x")
    remove_tree(top)
    assert not top.exists()


def test_a_link_is_removed_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    top = tmp_path / "top"
    top.mkdir()
    deepen(top, 1500)  # so that it is not the ordinary way
    (top / "link").symlink_to(tmp_path / "kept")
    (top / "d" / "link").symlink_to(tmp_path / "kept")
    remove_tree(top)
    assert not top.exists()
    assert (tmp_path / "kept" / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter everything")
def test_directories_that_nobody_may_enter_are_removed(tmp_path: Path) -> None:
    inner = tmp_path / "top" / "closed" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").write_text("x")
    inner.chmod(0)
    inner.parent.chmod(0o500)
    remove_tree(tmp_path / "top")
    assert not (tmp_path / "top").exists()


def test_what_is_not_there_and_what_is_a_link_is_left_alone(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "link")
    assert (tmp_path / "kept").is_dir()
