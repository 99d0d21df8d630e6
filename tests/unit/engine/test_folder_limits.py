"""What a guest can do to a folder's other side: nothing that was not declared."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from tests.unit.deep_tree import deepen
from tests.unit.engine.both_sides import Both, both, rest, session, text, until
from tests.unit.guest.test_transfer import OK, Peer
from vmjob.errors import (
    AgentProtocol,
    FolderFull,
    HostDiskFull,
    HostError,
    InputUnreadable,
    VmjobError,
)
from vmjob.guest.agent.folders import MAX_TOLD
from vmjob.guest.agent.tree import TreeReceiver
from vmjob.guest.agent.wire import MAX_DEPTH
from vmjob.guest.folders import parse_news
from vmjob.guest.transfer import Transfer

__all__ = ["both", "session"]
pytestmark = pytest.mark.anyio

DEADLINE = 60.0


async def until_full(both: Both, make: Callable[[Path], None], **limits: int) -> FolderFull:
    mirror = both.mirror(**limits)
    await mirror.fill()
    make(both.guest)
    with anyio.fail_after(DEADLINE), pytest.raises(FolderFull) as caught:
        await mirror.keep()
    assert "raise the folder's limits" in caught.value.advice
    with pytest.raises(FolderFull):
        await mirror.collect()
    return caught.value


async def test_more_bytes_than_allowed_do_not_come(both: Both) -> None:
    def make(guest: Path) -> None:
        for number in range(5):
            (guest / f"{number}").write_bytes(b"x" * 1000)

    error = await until_full(both, make, max_bytes=3500)
    assert sorted(path.name for path in both.host.iterdir()) == ["0", "1", "2"]
    assert error.code == "folder-full"


async def test_a_file_that_only_looks_large_is_as_large_as_it_looks(both: Both) -> None:
    def make(guest: Path) -> None:
        (guest / "sparse").touch()
        os.truncate(guest / "sparse", 1 << 40)
        (guest / "small").write_text("x")

    await until_full(both, make)
    assert [path.name for path in both.host.iterdir()] == ["small"]


async def test_more_files_than_allowed_do_not_come(both: Both) -> None:
    """As many as one likes: only so many are looked at."""
    def make(guest: Path) -> None:
        for number in range(5000):
            (guest / f"{number}").touch()

    await until_full(both, make, max_files=100)
    assert len(list(both.host.iterdir())) == 100


async def test_more_directories_than_allowed_do_not_come(both: Both) -> None:
    def make(guest: Path) -> None:
        for number in range(50):
            (guest / f"{number}" / "x" / "y").mkdir(parents=True)
            (guest / f"{number}" / "x" / "y" / "z").touch()

    await until_full(both, make, max_files=30)
    assert len(list(both.host.rglob("*"))) <= 30


async def test_a_host_that_has_too_much_itself_is_told_so(both: Both) -> None:
    (both.host / "large").write_bytes(b"x" * 100)
    with pytest.raises(FolderFull, match="has 1 files and 100 bytes"):
        await both.mirror(max_bytes=99).fill()


async def test_ten_thousand_files_come_and_go(both: Both) -> None:
    for number in range(5000):
        (both.host / f"h{number}").write_text(f"{number}")
    mirror = both.mirror()
    await mirror.fill()
    assert len(list(both.guest.iterdir())) == 5000
    for number in range(5000):
        (both.guest / f"g{number}").write_text(f"{number}")
    await mirror.collect()
    assert len(list(both.host.iterdir())) == 10000
    assert text(both.host / "g4999") == "4999"


async def test_odd_names_and_what_is_no_file_stay_in_the_guest(both: Both) -> None:
    mirror = both.mirror()
    await mirror.fill()
    (both.guest / "line\nbreak").write_text("x")
    (both.guest / "tab\there").mkdir()
    (both.guest / "tab\there" / "inside").write_text("x")
    Path(os.fsdecode(os.fsencode(both.guest) + b"/\xff\xfe")).write_text("x")
    os.mkfifo(both.guest / "fifo")
    (both.guest / "link").symlink_to("/etc/passwd")
    (both.guest / "directory").symlink_to("/etc")
    (both.guest / ".vmjob-forged").write_text("x")
    (both.guest / "schön").write_text("fine")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(both.guest, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    await until(mirror, lambda: text(both.host / "schön") == "fine")
    await rest(mirror)
    await mirror.collect()
    assert [path.name for path in both.host.iterdir()] == ["schön"]
    assert len(both.warnings) == 1
    assert "left out" in both.warnings[0]


async def test_a_deep_tree_comes_as_deep_as_trees_may_be(both: Both) -> None:
    mirror = both.mirror()
    await mirror.fill()
    deepen(both.guest, 1000)
    try:
        (both.guest / "beside").write_text("x")
        await until(mirror, lambda: (both.host / "beside").exists())
        await mirror.collect()
        deepest = max(len(path.relative_to(both.host).parts) for path in both.host.rglob("d"))
        assert MAX_DEPTH - 2 <= deepest <= MAX_DEPTH
    finally:
        subprocess.run(["rm", "-rf", both.guest / "d", both.host / "d"], check=True)


async def test_a_full_disk_is_told_as_such(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = both.mirror()
    await mirror.fill()
    (both.guest / "a").write_text("x")

    def no_space(self: TreeReceiver, record: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(TreeReceiver, "_data", no_space)
        with pytest.raises(HostDiskFull):
            await mirror.collect()
    assert list(both.host.iterdir()) == []
    await mirror.collect()
    assert text(both.host / "a") == "x"


async def test_a_link_on_the_way_is_not_followed(both: Both, tmp_path: Path) -> None:
    """A directory of either side becomes a link to another one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    for name in ("here", "there"):
        (both.host / name).mkdir()
        (both.host / name / "a").write_text("a")
    mirror = both.mirror()
    await mirror.fill()
    (both.host / "here" / "a").unlink()
    (both.host / "here").rmdir()
    (both.host / "here").symlink_to(outside)
    (both.guest / "here" / "a").write_text("changed")
    (both.guest / "here" / "mine").write_text("forged")
    (both.guest / "there" / "a").unlink()
    (both.guest / "there").rmdir()
    (both.guest / "there").symlink_to(outside)
    await rest(mirror)
    await mirror.collect()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"mine": "mine"}
    assert not (both.host / "there" / "mine").exists()


async def test_a_folder_that_was_taken_away_empties_no_guest(both: Both) -> None:
    """A disk that is not mounted any more, for one."""
    (both.host / "a").write_text("a")
    mirror = both.mirror()
    await mirror.fill()
    both.host.rename(both.host.with_name("elsewhere"))
    with pytest.raises(HostError, match="any more"):
        await mirror.step()
    assert text(both.guest / "a") == "a"


# -- an agent that lies ----------------------------------------------------------------------

NEWS = {"since": 0, "version": 3, "entries": [["a", "f", 1, 0o644, 5, 7]], "gone": [],
        "more": False, "looks": 1, "looking": False, "over": False, "left_out": 0,
        "again_seconds": 0.5}


@pytest.mark.parametrize("lie", [
    {"entries": [["../a", "f", 1, 2, 3, 4]]}, {"entries": [["/etc/a", "f", 1, 2, 3, 4]]},
    {"entries": [["a//b", "f", 1, 2, 3, 4]]}, {"entries": [["a\nb", "f", 1, 2, 3, 4]]},
    {"entries": [["\udcff", "f", 1, 2, 3, 4]]}, {"entries": [["a/..", "d", 1, 2, 3, 4]]},
    {"entries": [["x/" * 3000 + "x", "f", 1, 2, 3, 4]]}, {"entries": [["a", "l", 1, 2, 3, 4]]},
    {"entries": [["a", "f", -1, 2, 3, 4]]}, {"entries": [["a", "f", 1 << 63, 2, 3, 4]]},
    {"entries": [["a", "f", 1.5, 2, 3, 4]]}, {"entries": [["a", "f"]]}, {"entries": [[7]]},
    {"entries": [["a", "f", 1, 2, 3, 4]] * (MAX_TOLD + 1)}, {"entries": None}, {"entries": 7},
    {"gone": ["../a"]}, {"gone": [7]}, {"since": 2}, {"version": -1}, {"version": "3"},
    {"more": True, "version": 0}, {"again_seconds": float("nan")}, {"again_seconds": "x"},
    {"again_seconds": -1.0}, {"again_seconds": 10**400},
], ids=lambda lie: json.dumps(lie)[:40])
def test_an_answer_that_cannot_be_is_no_answer(lie: dict[str, object]) -> None:
    parse_news(dict(NEWS), 0)
    with pytest.raises(AgentProtocol):
        parse_news({**NEWS, **lie}, 0)


def record(kind: bytes, content: object) -> bytes:
    return kind + json.dumps(content).encode()


TOP = record(b"E", {"t": "d", "n": "", "m": 0o700, "mt": 0})
END = record(b"Z", {"changed": []})


@pytest.mark.parametrize("records", [
    [TOP, record(b"E", {"t": "l", "n": "0", "m": 0, "mt": 0, "l": "1"}), b"C", END],
    [TOP, record(b"E", {"t": "f", "n": "../0", "m": 0, "mt": 0, "s": 1})],
    [TOP, record(b"E", {"t": "f", "n": "0", "m": 0, "mt": 0, "s": 1 << 40})],
    [TOP, *[record(b"E", {"t": "d", "n": "0", "m": 0, "mt": 0})] * 10],
    [TOP, b"C"], [TOP, b"C", record(b"Z", {})], [TOP, b"C", record(b"Z", {"changed": 7})],
], ids=["link", "name", "size", "count", "half", "no word", "no list"])
async def test_a_parcel_that_was_not_asked_for_is_refused(tmp_path: Path,
                                                         records: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    body = b"".join(b"%x\r\n" % len(each) + each + b"\r\n" for each in records)
    peer = Peer(theirs, lambda sock: sock.sendall(OK + body + b"0\r\n\r\n"))
    peer.start()
    transfer = Transfer(ours)
    parent = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(VmjobError):
            await transfer.get_parcel("shared", [("a", 1, 2, 3)], parent, "staged", 1)
    finally:
        os.close(parent)
        transfer.close()
        peer.join()
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


async def test_a_guest_makes_no_links_of_boincs(both: Both, tmp_path: Path) -> None:
    """It would choose a file of this computer, to be brought to it with the next round."""
    (tmp_path / "private").write_text("private")
    mirror = both.mirror(links=True, journal=tmp_path / "journal")
    await mirror.fill()
    (both.guest / "evil").write_text(f"<soft_link>{tmp_path / 'private'}</soft_link>")
    (both.guest / "evil too").write_text(f"x<soft_link>{tmp_path / 'private'}</soft_link>\n" * 99)
    await rest(mirror)
    await mirror.collect()
    assert list(both.host.iterdir()) == []
    again = both.mirror(links=True, known=mirror.known(), journal=tmp_path / "journal")
    await rest(again)
    assert (text(both.guest / "evil") or "").startswith("<soft_link>")


async def test_an_input_that_is_not_there_is_told(both: Both, tmp_path: Path) -> None:
    with pytest.raises(InputUnreadable, match="missing"):
        await both.mirror(copies=(tmp_path / "missing",)).fill()
