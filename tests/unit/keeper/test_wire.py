"""What a keeper and its clients say survives the way, and nonsense is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.errors import MachineStartFailed, VmjobError, all_errors
from vmjob.keeper import wire
from vmjob.keeper.log import MOST, Log, clean, parse

#: Any text that Python can have from a file's name, surrogates included.
names = st.text(st.characters(), max_size=50)
content = st.recursive(st.none() | st.booleans() | st.integers() | names,
                       lambda inner: st.lists(inner, max_size=5)
                       | st.dictionaries(names, inner, max_size=5), max_leaves=20)


@given(st.dictionaries(names, content, max_size=5))
def test_what_is_said_is_heard_on_one_line(said: dict[str, object]) -> None:
    line = wire.encode(said)
    assert line.count(b"\n") == 1
    assert wire.decode(line) == said


@given(st.binary(max_size=300_000))
def test_output_comes_in_bounded_lines_and_whole(data: bytes) -> None:
    lines = list(wire.pieces("stdout", data))
    assert all(len(line) < wire.MAX_LINE for line in lines)
    assert b"".join(wire.unpacked(wire.decode(line)["data"]) for line in lines) == data


@given(st.binary(max_size=200) | content.map(lambda each: json.dumps(each).encode()))
def test_nonsense_is_refused_by_name(line: bytes) -> None:
    """Nothing but `WireError`, whatever comes."""
    for text in (line, line + b"\n"):
        try:
            said = wire.decode(text)
            wire.request_of(said)
        except wire.WireError:
            continue
        assert said["vmjob"] == wire.VERSION


@given(content)
def test_data_and_errors_that_are_none_are_refused(said: object) -> None:
    for hear in (wire.unpacked, wire.error_of):
        try:
            hear(said)
        except wire.WireError:
            continue


def test_a_line_that_is_cut_off_or_too_long_or_deep_is_refused() -> None:
    for line in (b'{"vmjob": 1}', b'{"a": "' + b"x" * wire.MAX_LINE + b'"}\n',
                 b"[" * 100_000 + b"\n"):
        with pytest.raises(wire.WireError):
            wire.decode(line)
    with pytest.raises(wire.WireError):
        wire.encode({"a": "x" * wire.MAX_LINE})


def test_another_version_is_not_understood() -> None:
    with pytest.raises(wire.WireError, match="another version"):
        wire.request_of({"vmjob": wire.VERSION + 1, "do": "stop"})


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_comes_through_as_what_it_was(kind: type[VmjobError]) -> None:
    error = kind("what happened", advice="what to do", console="…", number=3)
    heard = wire.error_of(wire.decode(wire.encode(error.as_dict())))
    assert type(heard) is kind
    assert heard.as_dict() == error.as_dict()


def test_an_error_of_a_newer_version_keeps_its_words() -> None:
    said = {**MachineStartFailed("no luck").as_dict(), "code": "never-heard-of"}
    assert wire.error_of(said).message == "no luck"


def test_the_log_is_bounded_and_keeps_the_newest(tmp_path) -> None:  # type: ignore[no-untyped-def]
    log = Log(tmp_path / "log")
    for number in range(5000):
        log.write("job", f"{number} " + "x" * 100)
    log.write("job", "y" * 3 * MOST)
    log.write("job", "the end")
    lines = (tmp_path / "log").read_text().splitlines()
    assert (tmp_path / "log").stat().st_size <= MOST
    assert parse(lines[-1])["text"] == "the end"
    log.close()


@given(st.text())
def test_what_jobs_say_cannot_reach_the_terminals_controls(text: str) -> None:
    assert "\x1b" not in clean(text)
    assert "\n" not in clean(text)
    assert len(clean(text)) == len(text)


@given(st.text())
def test_any_line_of_a_log_can_be_read(line: str) -> None:
    found = parse(line)
    assert found["text"] in line
