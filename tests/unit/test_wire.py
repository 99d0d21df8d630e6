"""The protocol's parsers hold against arbitrary bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.guest.agent import wire
from vmjob.guest.agent.lane import Parser, sync_nonce
from vmjob.guest.agent.request import Request
from vmjob.guest.agent.streams import Window

NONCE = b"0123456789abcdef" * 2


@given(st.binary())
def test_a_head_that_does_not_parse_is_a_protocol_error_and_nothing_else(data: bytes) -> None:
    for parse in (wire.parse_request_line, wire.parse_status_line,
                  lambda d: wire.parse_fields(d.split(b"\r\n")),
                  lambda d: wire.parse_chunk_size(d, 1000)):
        try:
            parse(data)
        except wire.ProtocolError:
            pass


@given(st.text())
def test_a_length_is_a_bounded_number_or_an_error(text: str) -> None:
    try:
        length = wire.parse_length({"content-length": text}, 1000)
    except wire.ProtocolError:
        return
    assert length is not None
    assert 0 <= length <= 1000


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_no_bytes_make_the_agents_parser_fail(pieces: list[bytes]) -> None:
    parser = Parser()
    for piece in pieces:
        for one in parser.feed(piece):
            assert isinstance(one, Request | bytes)


@given(st.binary(max_size=wire.MAX_REQUEST_PIECE), st.integers(0, 5000))
def test_a_resynchronisation_ends_whatever_was_cut_off(body: bytes, cut: int) -> None:
    """Whatever part of a request the agent holds, filler and SYNC bring it back to the start."""
    request = wire.request_head("POST", "/v1/tasks", {"content-length": str(len(body))}) + body
    parser = Parser()
    parser.feed(request[:cut % max(1, len(request))])
    found = parser.feed(wire.RESYNC_FILLER + wire.SYNC + NONCE + b"\n")
    assert found[-1] == NONCE
    after = parser.feed(wire.request_head("GET", "/v1/ping", {"content-length": "0"}))
    assert [one.name for one in after if isinstance(one, Request)] == ["ping"]


def test_requests_split_anywhere_are_the_same_requests() -> None:
    data = wire.request_head("POST", "/v1/x?a=1", {"content-length": "3"}) + b"abc"
    for at in range(len(data)):
        parser = Parser()
        found = parser.feed(data[:at]) + parser.feed(data[at:])
        assert [(r.method, r.path, r.query, r.body) for r in found] == \
            [("POST", ["x"], {"a": "1"}, b"abc")]


def test_a_head_without_end_is_dropped_and_does_not_grow() -> None:
    parser = Parser()
    for _ in range(1000):
        assert parser.feed(b"a" * 16384) == []
    assert len(parser._buffer) <= 2 * wire.MAX_HEAD


@pytest.mark.parametrize("line", [b"SYNC ", b"SYNC " + NONCE[:-1], b"SYNC " + NONCE + b"0", b"x"])
def test_only_a_whole_sync_line_is_one(line: bytes) -> None:
    assert sync_nonce(line) is None


@given(st.lists(st.binary(max_size=50)), st.data())
def test_a_reader_of_a_window_gets_every_byte_once(writes: list[bytes],
                                                   data: st.DataObject) -> None:
    window = Window()
    got = b""
    for piece in writes:
        window.append(piece)
        offset, read = window.read(len(got), data.draw(st.integers(0, 60)))
        assert offset == len(got)
        got += read
        window.acknowledge(data.draw(st.integers(0, len(got))))
    offset, read = window.read(len(got), 1 << 20)
    assert got + read == b"".join(writes)


@pytest.mark.parametrize("length", [0, 1, 1 << 40])
def test_the_head_that_is_written_quickly_is_the_same(length: int) -> None:
    assert wire.plain_head(length) == wire.response_head(200, {"content-length": str(length)})
