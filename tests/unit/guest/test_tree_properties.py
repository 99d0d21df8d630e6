"""Whatever tree there is arrives the same; whatever is said, nothing taken leads outside."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import open_descriptors
from vmjob.guest.agent.tree import TreeError, TreeReceiver, send_tree

NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="/\x7f"),
                min_size=1, max_size=20).filter(lambda name: name not in (".", ".."))
#: Pieces of a file: bytes, or the length of a hole.
PIECES = st.lists(st.one_of(st.binary(max_size=9000), st.integers(1, 200_000)), max_size=4)
TREES: st.SearchStrategy[Any] = st.recursive(
    st.tuples(PIECES, st.integers(0, 0o7777)),
    lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=12)


@contextmanager
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tree-") as name:
        yield Path(name)


def make(path: Path, tree: Any) -> None:
    if isinstance(tree, dict):
        path.mkdir()
        for name, below in tree.items():
            make(path / name, below)
        return
    pieces, mode = tree
    with path.open("wb") as file:
        for piece in pieces:
            if isinstance(piece, int):
                file.seek(piece, os.SEEK_CUR)
            else:
                file.write(piece)
        file.truncate()
    path.chmod(mode)


def described(path: Path) -> Any:
    facts = path.lstat()
    if path.is_symlink():
        return ("link", str(path.readlink()))
    if path.is_dir():
        return {each.name: described(each) for each in path.iterdir()}
    return (stat.S_IMODE(facts.st_mode) & 0o777 | 0o600, facts.st_mtime_ns, path.read_bytes())


def receive(into: Path, records: list[bytes]) -> None:
    parent = os.open(into, os.O_RDONLY)
    receiver = TreeReceiver(parent, "got", limit=1 << 30, entries=1000)
    try:
        for record in records:
            receiver.feed(record)
        assert receiver.done
    finally:
        receiver.close()
        os.close(parent)


@settings(max_examples=60, deadline=None)
@given(TREES, st.integers(100, 20_000))
def test_a_tree_arrives_as_it_was(tree: Any, piece: int) -> None:
    before = open_descriptors()
    with place() as directory:
        make(directory / "sent", tree)
        receive(directory, [bytes(one) for one in send_tree(str(directory / "sent"), piece)])
        assert described(directory / "got") == described(directory / "sent")
    assert open_descriptors() == before


#: Three directories in one another, and what links in them may say.
DIRECTORIES = ("", "d", "d/d")
TARGETS = st.lists(st.sampled_from(["..", "d", "u", "v"]), min_size=1, max_size=6).map("/".join)


def leads_to(path: Path) -> Path | None:
    """Where the kernel would arrive, even if nothing is there; None for links in a circle."""
    left = [*path.parts[1:]]
    here = Path("/")
    for _ in range(200):
        if not left:
            return here
        part = left.pop(0)
        if part == "..":
            here = here.parent
        elif (here / part).is_symlink():
            left = [*str((here / part).readlink()).split("/"), *left]
        elif part not in ("", "."):
            here /= part
    return None


def entry(kind: str, name: str, **more: object) -> bytes:
    return b"E" + json.dumps({"t": kind, "n": name, "m": 0o755, "mt": 0, **more}).encode()


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from("uv")), TARGETS))
def test_no_links_together_lead_outside(links: dict[tuple[str, str], str]) -> None:
    """One link at a time may look harmless: ``d/u -> ..`` and then ``v -> d/u/..``."""
    with place() as directory:
        parent = os.open(directory, os.O_RDONLY)
        receiver = TreeReceiver(parent, "got", limit=100, entries=1000)
        for each in DIRECTORIES:
            receiver.feed(entry("d", "d" if each else ""))
            for (where, name), target in links.items():
                if where == each:
                    with suppress(TreeError):
                        receiver.feed(entry("l", name, l=target))
        receiver.close()
        os.close(parent)
        top = directory / "got"
        for path in top.rglob("*"):
            if path.is_symlink():
                found = leads_to(path)
                assert found is None or found == top or top in found.parents, \
                    f"{path} leads to {found}"


def test_the_chain_of_links_that_once_led_outside_is_refused() -> None:
    with place() as directory:
        (directory / "in").mkdir()
        parent = os.open(directory / "in", os.O_RDONLY)
        receiver = TreeReceiver(parent, "got", limit=100, entries=1000)
        for record in (entry("d", ""), entry("d", "d"), entry("l", "up", l=".."), b"C"):
            receiver.feed(record)
        with pytest.raises(TreeError) as caught:
            receiver.feed(entry("l", "out", l="d/up/d/up/../../../../etc/passwd"))
        receiver.close()
        os.close(parent)
        assert caught.value.reason == "unsafe-link"


def test_a_file_from_before_1970_can_be_sent() -> None:
    with place() as directory:
        (directory / "old").write_text("x")
        os.utime(directory / "old", ns=(-5, -5_000_000_000))
        receive(directory, [bytes(one) for one in send_tree(str(directory / "old"), 4096)])
        assert (directory / "got").stat().st_mtime_ns == 0
