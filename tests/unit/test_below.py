"""A guest's names lead nowhere but into its own folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import open_descriptors
from vmjob.home import remove_tree
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


def test_what_lies_too_deep_to_be_counted_is_too_much(tmp_path: Path) -> None:
    """A guest that moves one deep tree below another has more than can be walked by a path."""
    root = tmp_path / "root"
    for name in ("a", "b"):
        inner = root / name
        for _ in range(12):
            inner /= "d" * 250
        inner.mkdir(parents=True)
        (inner / "file").write_bytes(bytes(1 << 20))
    size, count = below.occupied(root, 1000)
    assert size >= 2 << 20
    assert count < 1000
    end = os.open(inner, os.O_RDONLY)
    try:
        os.rename(root / "a", "a", dst_dir_fd=end)
    finally:
        os.close(end)
    assert below.occupied(root, 1000)[1] > 1000
    remove_tree(root)
    assert not root.exists()
