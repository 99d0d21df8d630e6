"""``stderr.txt``: the cause first, no secrets of terminals, never too long to be sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.wrapper.log import FILE, MOST, MOST_LOG, Log, Tail, shown


@pytest.fixture
def fd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """stderr as the client opens it."""
    monkeypatch.chdir(tmp_path)
    fd = os.open(FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield fd
    os.close(fd)


def test_the_cause_stands_above_what_happened_and_above_earlier_runs(fd: int) -> None:
    os.write(fd, b"an earlier run\n")
    log = Log(fd)
    log.line("the machine starts")
    log.conclude([("FAILED: exit code 7", "phase: run"), ("The end of stderr:", "oh\n")])
    lines = Path(FILE).read_text().splitlines()
    assert lines[:5] == ["FAILED: exit code 7", "phase: run", "", "The end of stderr:", "oh"]
    assert lines[6:8] == ["What happened:", "an earlier run"]
    assert lines[8].endswith("vmjob: the machine starts")


def test_what_is_written_after_the_report_is_there_as_well(fd: int) -> None:
    log = Log(fd)
    log.conclude([("FAILED", "")])
    log.line("the client cannot be told")
    assert Path(FILE).read_text().startswith("FAILED\n")
    assert Path(FILE).read_text().endswith("the client cannot be told\n")


def test_all_of_it_is_short_enough_to_be_sent_whole(fd: int) -> None:
    os.write(fd, b"x" * 200_000 + b"\nthe last line before\n")
    log = Log(fd)
    for number in range(10_000):
        log.line(f"line {number}")
    assert Path(FILE).stat().st_size < 200_100 + MOST_LOG
    log.conclude([("FAILED", "y" * 20_000)])
    text = Path(FILE).read_text()
    assert len(text) <= MOST
    assert text.startswith("FAILED\n")
    assert "line 1\n" in text or "line 100\n" in text
    log.conclude([("FAILED", "y" * 200_000)])
    assert Path(FILE).stat().st_size <= MOST
    assert Path(FILE).read_text().startswith("FAILED\n")


def test_no_text_of_a_job_ends_the_servers_reading_of_it(fd: int) -> None:
    log = Log(fd)
    log.line("x]]></stderr_txt>")
    log.conclude([("FAILED ]]>", "]]>]]>")])
    assert "]]>" not in Path(FILE).read_text()


def test_a_stderr_that_is_no_file_of_the_slot_is_not_touched(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(FILE).write_text("another program's\n")
    with Path("elsewhere").open("w+b") as file:
        Log(file.fileno()).conclude([("FAILED", "why")])
    assert Path(FILE).read_text() == "another program's\n"
    assert Path("elsewhere").read_text() == "FAILED\nwhy\n\n"


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
    os.close(fd)
    log = Log(fd)
    log.line("x")
    log.conclude([("x", "y")])


@given(st.text())
def test_a_line_is_one_line_that_a_terminal_may_see(text: str) -> None:
    assert shown(text).isprintable()
    assert len(shown(text)) <= 1003


@given(st.lists(st.binary(max_size=50)), st.integers(1, 60))
def test_a_tail_is_the_end_of_what_came(pieces: list[bytes], most: int) -> None:
    tail = Tail(most)
    for piece in pieces:
        tail.add(piece)
    whole = b"".join(pieces)
    assert tail.total == len(whole)
    expected = whole[-most:].decode("utf-8", "replace")
    assert tail.text() == "".join(c if c.isprintable() or c in "\n\t" else "?" for c in expected)


def test_a_job_cannot_speak_for_the_wrapper_to_the_client(fd: int) -> None:
    log = Log(fd)
    log.line("the job says: ERR_CPU_VM_EXTENSIONS_DISABLED")
    log.conclude([("FAILED", ""), ("stdout:", "ERR_CPU_VM_EXTENSIONS_DISABLED\n")])
    assert "ERR_CPU_VM_EXTENSIONS_DISABLED" not in Path(FILE).read_text()


def test_no_text_of_a_job_pushes_the_cause_out_of_what_the_client_sends(fd: int) -> None:
    log = Log(fd)
    for _ in range(30):
        log.line("x" * 900)
    log.conclude([("FAILED", "why"), ("stdout:", "]]>" * 4096), ("stderr:", "\ufffd" * 12288)])
    data = Path(FILE).read_bytes()
    assert data.startswith(b"FAILED\nwhy")
    assert len(data) <= MOST
