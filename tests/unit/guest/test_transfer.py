"""Transfers against a guest that says what it likes."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from vmjob.errors import (
    AgentLost,
    AgentProtocol,
    AgentSilent,
    GuestRefused,
    InputUnreadable,
    OutputMissing,
    OutputTooLarge,
    OutputUnsafe,
    VmjobError,
)
from vmjob.guest import transfer
from vmjob.guest.agent import wire
from vmjob.guest.agent.tree import OFFSET
from vmjob.guest.transfer import Transfer

pytestmark = pytest.mark.anyio

OK = wire.response_head(200, {"transfer-encoding": "chunked"})


class Peer(threading.Thread):
    """A scripted guest: resynchronises, takes a request's head, then runs ``script``."""

    def __init__(self, sock: socket.socket, script: Callable[[socket.socket], None], *,
                 proper: bool = True) -> None:
        super().__init__()
        self._sock = sock
        self._script = script
        self._proper = proper

    def run(self) -> None:
        with self._sock:
            try:
                if self._proper:
                    file = self._sock.makefile("rb")
                    while not (line := file.readline()).startswith(wire.SYNC):
                        pass
                    self._sock.sendall(wire.SYNC_ACK + line[len(wire.SYNC):])
                    while file.readline() not in (b"\r\n", b""):
                        pass
                self._script(self._sock)
            except OSError:
                pass


async def got(script: Callable[[socket.socket], None], destination: Path, *, limit: int = 1000,
              proper: bool = True) -> int:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs, script, proper=proper)
    peer.start()
    lane = Transfer(ours)
    try:
        with anyio.fail_after(20):
            return await lane.get("out", destination, limit=limit)
    finally:
        lane.close()
        await anyio.to_thread.run_sync(peer.join)


def chunks(*records: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(record), record) for record in records)


def enter(**head: object) -> bytes:
    return b"E" + json.dumps({"n": "", "m": 0o644, "mt": 0, **head}).encode()


def failure(reason: str) -> bytes:
    return b"F" + json.dumps({"error": reason, "message": "so it says"}).encode()


END = b'Z{"entries":1,"bytes":0}'
HALF = OK + chunks(enter(t="f", s=5), b"D" + OFFSET.pack(0) + b"ab")


@pytest.mark.parametrize(("said", "error"), [
    (b"\r\n", AgentProtocol),
    (b"garbage\r\n\r\n", AgentProtocol),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n", AgentProtocol),
    (OK + b"fffffff\r\n", AgentProtocol),
    (OK + b"0\r\n\r\n", AgentProtocol),
    (HALF + b"0\r\n\r\n", AgentProtocol),
    (OK + chunks(enter(t="f", s=0), b"C") + b"0\r\n\r\n", AgentProtocol),
    (HALF, AgentLost),
    (b"", AgentLost),
    (OK + chunks(enter(t="d"), enter(t="f", n="../x", s=0)), OutputUnsafe),
    (OK + chunks(enter(t="l", l="/etc/passwd")), OutputUnsafe),
    (OK + chunks(enter(t="x", k="fifo")), OutputUnsafe),
    (OK + chunks(enter(t="f", s=1001)), OutputTooLarge),
    (OK + chunks(enter(t="f", s=1), failure("changed")), GuestRefused),
    (OK + chunks(failure("too-large")), OutputTooLarge),
    (wire.response_head(404, {"content-length": "21"}) + b'{"error":"not-found"}', OutputMissing),
    (wire.response_head(500, {"content-length": "2"}) + b"{}", GuestRefused),
    (wire.response_head(404, {"content-length": "2"}) + b"no", AgentProtocol),
])
async def test_what_a_guest_says_wrong_is_an_error_and_nothing_appears(
        tmp_path: Path, said: bytes, error: type[VmjobError]) -> None:
    with pytest.raises(error):
        await got(lambda sock: sock.sendall(said), tmp_path / "place" / "out")
    assert {path.name for path in tmp_path.rglob("*")} <= {"place"}


@pytest.mark.parametrize("reason", ["\x1b[2J", "too-large", "malformed", "no-space"])
async def test_words_of_a_failure_cannot_command_the_terminal(tmp_path: Path, reason: str) -> None:
    record = b"F" + json.dumps({"error": reason, "message": "\x1b]0;x\x07a\nb"}).encode()
    with pytest.raises(VmjobError, match="a b") as caught:
        await got(lambda sock: sock.sendall(OK + chunks(record)), tmp_path / "out")
    assert caught.value.message.isprintable()
    assert str(caught.value.context.get("reason", "")).isprintable()


async def test_data_that_is_sent_over_and_over_ends_at_the_limit(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        sock.sendall(OK + chunks(enter(t="f", s=100)))
        while True:
            sock.sendall(chunks(b"D" + OFFSET.pack(0) + b"x" * 100) * 10)

    with pytest.raises(OutputTooLarge):
        await got(script, tmp_path / "out")


async def test_data_without_bytes_is_no_way_to_go_on_for_ever(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        sock.sendall(OK + chunks(enter(t="f", s=100)))
        while True:
            sock.sendall(chunks(b"D" + OFFSET.pack(0)) * 10)

    with pytest.raises(OutputUnsafe):
        await got(script, tmp_path / "out")


async def test_a_flood_instead_of_a_resynchronisation_is_silence(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PATIENCE", 0.3)

    def script(sock: socket.socket) -> None:
        while True:
            sock.sendall(b"x" * 65536)

    with pytest.raises(AgentSilent):
        await got(script, tmp_path / "out", proper=False)


async def test_silence_in_the_middle_is_told(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PATIENCE", 0.1)
    with pytest.raises(AgentSilent):
        await got(lambda sock: (sock.sendall(HALF), sock.recv(1))[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


async def test_an_output_replaces_a_file_but_nothing_that_holds_something(tmp_path: Path) -> None:
    whole = OK + chunks(enter(t="f", s=3), b"D" + OFFSET.pack(0) + b"new", b"C", END) + b"0\r\n\r\n"
    (tmp_path / "file").write_text("old")
    await got(lambda sock: sock.sendall(whole), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(VmjobError, match="cannot put the output"):
        await got(lambda sock: sock.sendall(whole), tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


async def test_an_output_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    whole = OK + chunks(enter(t="f", s=3), b"D" + OFFSET.pack(0) + b"new", b"C", END) + b"0\r\n\r\n"
    (tmp_path / "mine").write_text("keep me")
    (tmp_path / "out").symlink_to("mine")
    await got(lambda sock: sock.sendall(whole), tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "keep me"
    assert not (tmp_path / "out").is_symlink()


async def test_what_is_no_file_is_not_put(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    ours, theirs = socket.socketpair()
    with theirs:
        lane = Transfer(ours)
        with pytest.raises(InputUnreadable):
            await lane.put(tmp_path / "fifo", "x")
        lane.close()
