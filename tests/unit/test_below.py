"""A guest's names lead nowhere but into its own folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import open_descriptors
from vmjob.host import below


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "file").write_text("good")
    (root / "sub" / "file").write_text("inner")
    (root / "link").symlink_to("../secret")
    (root / "linked").symlink_to("../outside")
    os.mkfifo(root / "pipe")
    return root


def content(root: Path, name: str) -> bytes | None:
    found = below.read(root, name, 100)
    return found[1] if found else None


def test_plain_files_are_read(root: Path) -> None:
    assert content(root, "file") == b"good"
    assert content(root, "sub/file") == b"inner"
    assert content(root, "./sub//file") == b"inner"


@pytest.mark.parametrize("name", ["link", "linked/file", "../secret", "sub/../../secret",
                                  "/etc/passwd", "pipe", "sub", "", ".", "none", "a\0b",
                                  "file/x"])
def test_nothing_else_is(root: Path, name: str) -> None:
    before = open_descriptors()
    assert content(root, name) is None
    assert below.look(root, name) is None
    below.remove(root, name)
    assert open_descriptors() == before
    assert (root.parent / "secret").exists()
    assert (root.parent / "outside" / "file").exists()


def test_no_more_is_read_than_was_asked_for(root: Path) -> None:
    found = below.read(root, "file", 2)
    assert found is not None
    assert found[1] == b"go"
    assert found[0].size == 4


def test_a_file_is_seen_to_change(root: Path) -> None:
    before = below.look(root, "file")
    assert before == below.look(root, "file")
    os.utime(root / "file", ns=(1, 1))
    assert below.look(root, "file") != before


def test_a_file_is_removed(root: Path) -> None:
    below.remove(root, "sub/file")
    assert not (root / "sub" / "file").exists()
