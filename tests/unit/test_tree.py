"""Trees of files arrive whole, sparse and safe, whatever the sender says."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmjob.guest.agent.tree import OFFSET, TreeError, TreeReceiver, inside_tree, send_tree


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "in").mkdir()
    fd = os.open(tmp_path / "in", os.O_RDONLY)
    yield fd
    os.close(fd)


def receive(parent: int, records: list[bytes], *, limit: int = 1 << 40,
            entries: int = 1000) -> TreeReceiver:
    receiver = TreeReceiver(parent, "got", limit=limit, entries=entries)
    try:
        for record in records:
            receiver.feed(record)
    finally:
        receiver.close()
    return receiver


def enter(kind: str, name: str = "", **more: object) -> bytes:
    return b"E" + json.dumps({"t": kind, "n": name, "m": 0o644, "mt": 0, **more}).encode()


def data(offset: int, content: bytes) -> bytes:
    return b"D" + OFFSET.pack(offset) + content


def copies(path: Path) -> list[bytes]:
    return [bytes(record) for record in send_tree(str(path), 4096)]


END = b'Z{"entries":1,"bytes":0}'


def test_a_tree_arrives_as_it_was_sent(tmp_path: Path, parent: int) -> None:
    top = tmp_path / "top"
    (top / "empty").mkdir(parents=True)
    (top / "a b").write_bytes(os.urandom(100_000))
    (top / "run.sh").write_bytes(b"#!/bin/sh\n")
    (top / "run.sh").chmod(0o755)
    (top / "empty" / "übung").write_bytes(b"")
    (top / "link").symlink_to("a b")
    os.utime(top / "a b", ns=(5, 7_000_000_001))
    assert receive(parent, copies(top)).done
    got = tmp_path / "in" / "got"
    assert (got / "a b").read_bytes() == (top / "a b").read_bytes()
    assert (got / "a b").stat().st_mtime_ns == 7_000_000_001
    assert stat.S_IMODE((got / "run.sh").stat().st_mode) == 0o755
    assert (got / "empty" / "übung").read_bytes() == b""
    assert (got / "link").readlink() == Path("a b")


def test_holes_stay_holes(tmp_path: Path, parent: int) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.seek(1 << 32)
        file.write(b"end")
    records = copies(sparse)
    assert sum(map(len, records)) < 100_000
    receive(parent, records)
    got = tmp_path / "in" / "got"
    assert got.stat().st_size == (1 << 32) + 3
    assert got.stat().st_blocks * 512 < 1_000_000
    with got.open("rb") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"end"


def test_two_hundred_directories_deep_is_fine_and_three_hundred_is_refused(
        tmp_path: Path, parent: int) -> None:
    def nested(depth: int) -> list[bytes]:
        return [enter("d", "d")] * depth + [b"C"] * depth + [END]

    assert receive(parent, nested(200)).done
    (tmp_path / "in" / "got").rename(tmp_path / "in" / "first")
    with pytest.raises(TreeError) as caught:
        receive(parent, nested(300))
    assert caught.value.reason == "too-deep"


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc/passwd", "../x", "new\nline", "nul\0",
                                  "\udc80raw", "x" * 256, "esc\x1b[31m", "del\x7f"])
def test_a_name_that_is_no_file_name_is_refused(parent: int, tmp_path: Path, name: str) -> None:
    with pytest.raises(TreeError) as caught:
        receive(parent, [enter("d"), enter("f", name, s=0)])
    assert caught.value.reason == "unsafe-name"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["got", "in"]


@pytest.mark.parametrize(("depth", "target", "inside"), [
    (0, "a", True), (0, "./a/b", True), (1, "../a", True), (2, "../../a/b", True), (0, "..", False),
    (0, "a/../b", False), (3, "../a/..", False), (0, "d/up/../x", False),
    (1, "../../a", False), (0, "/etc/passwd", False), (0, "a/../../b", False), (0, "a\0b", False)])
def test_a_link_is_taken_only_when_it_stays_inside(depth: int, target: str, inside: bool) -> None:
    assert inside_tree(depth, target) is inside


def test_a_link_that_leaves_the_output_is_refused(parent: int) -> None:
    with pytest.raises(TreeError) as caught:
        receive(parent, [enter("d"), enter("l", "x", l="../../etc/passwd")])
    assert caught.value.reason == "unsafe-link"


def test_the_output_itself_is_never_a_link(parent: int) -> None:
    with pytest.raises(TreeError) as caught:
        receive(parent, [enter("l", "", l="a"), END])
    assert caught.value.reason == "unsafe-link"


@pytest.mark.parametrize("kind", ["fifo", "character device", "block device", "socket", 7])
def test_what_has_no_bytes_is_refused(parent: int, kind: object) -> None:
    with pytest.raises(TreeError) as caught:
        receive(parent, [enter("x", "", k=kind)])
    assert caught.value.reason == "unsafe-type"


def test_special_bits_do_not_arrive(parent: int, tmp_path: Path) -> None:
    receive(parent, [enter("f", s=0, m=0o6755), b"C", END])
    assert stat.S_IMODE((tmp_path / "in" / "got").stat().st_mode) == 0o755


@pytest.mark.parametrize("records", [
    [data(0, b"x")], [enter("f", s=1), data(1, b"x")], [enter("f", s=-1)], [enter("f", s=1.5)],
    [enter("f", s=True)], [b"C"], [END], [enter("d"), END], [b"Q"], [b""], [b"E[]"], [b"Enull"],
    [b"E" + b"[" * 100_000], [enter("f", s=0), enter("f", "a", s=0)],
    [enter("f", s=0), b"C", enter("f", s=0)], [enter("f", s=0), b"C", END, enter("f", "a", s=0)],
    [b"E" + json.dumps({"t": "f", "s": 0}).encode(), b"C"]])
def test_records_out_of_order_are_refused(parent: int, records: list[bytes]) -> None:
    with pytest.raises(TreeError):
        receive(parent, records)


def test_the_size_limit_counts_holes_too(parent: int) -> None:
    with pytest.raises(TreeError) as caught:
        receive(parent, [enter("f", s=1001)], limit=1000)
    assert caught.value.reason == "too-large"


def test_the_number_of_entries_is_limited(parent: int) -> None:
    records = [enter("d")] + [enter("d", f"d{n}") for n in range(10)]
    with pytest.raises(TreeError) as caught:
        receive(parent, records, entries=5)
    assert caught.value.reason == "too-many"


RECORD = st.one_of(
    st.binary(max_size=60),
    st.builds(enter, st.sampled_from("fdlx?"), st.sampled_from(["a", "b", "..", "a/b", ""]),
              s=st.integers(-1, 100), l=st.sampled_from(["a", "../..", "/etc"])),
    st.builds(data, st.integers(0, 120), st.binary(max_size=30)),
    st.sampled_from([b"C", END, b"F{}"]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.lists(RECORD, max_size=12))
def test_no_records_write_outside_or_leave_anything_open(tmp_path: Path,
                                                         records: list[bytes]) -> None:
    place = tmp_path / os.urandom(8).hex()
    (place / "in").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    fd = os.open(place / "in", os.O_RDONLY)
    try:
        receive(fd, records)
    except TreeError:
        pass
    finally:
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    assert [p.name for p in place.iterdir()] == ["in"]
    assert {p.name for p in (place / "in").iterdir()} <= {"got"}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TreeError) as caught:
        copies(tmp_path / "missing")
    assert caught.value.reason == "not-found"
    assert "missing" in caught.value.message
