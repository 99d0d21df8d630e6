"""Trigger files mean what vboxwrapper's documents say, and harm nobody whatever they hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.job.triggers import (
    Completion,
    Postponement,
    parse_completion,
    parse_credit,
    parse_postponement,
)


@pytest.mark.parametrize(("content", "meant"), [
    (b"", Completion(0, False, "")),
    (b"0\n", Completion(0, False, "")),
    (b"3", Completion(3, False, "")),
    (b"206\n206\nCondor ended\n", Completion(206, True, "Condor ended")),
    (b"1\r\n0\r\ntwo\r\nlines\r\n", Completion(1, False, "two\nlines")),
    (b"-148\n1\n", Completion(-148, True, "")),
    (b"done\n", Completion(0, False, "")),
    (b"1\n\n\x1b[31mred", Completion(1, False, "?[31mred"))])
def test_a_completion_is_code_notice_and_message(content: bytes, meant: Completion) -> None:
    assert parse_completion(content) == meant


@pytest.mark.parametrize(("code", "process"), [(0, 0), (1, 1), (255, 255), (256, 1), (-148, 108),
                                               (512, 1)])
def test_what_failed_never_looks_like_success(code: int, process: int) -> None:
    assert Completion(code, False, "").process_exit_code == process


@pytest.mark.parametrize(("content", "meant"), [
    (b"60\n1\nno work\n", Postponement(60.0, True, "no work")),
    (b"", Postponement(300.0, False, "")),
    (b"86401", Postponement(300.0, False, "")),
    (b"-5", Postponement(300.0, False, ""))])
def test_a_postponement_has_a_delay_that_the_client_takes(content: bytes,
                                                          meant: Postponement) -> None:
    assert parse_postponement(content) == meant


def test_a_credit_report_is_two_numbers() -> None:
    assert parse_credit(b"1.5e12\n2e9\n") == (1.5e12, 2e9)
    assert parse_credit(b"7") == (7.0, 0.0)
    assert parse_credit(b"many\n2") is None
    assert parse_credit(b"-1") is None


@pytest.mark.parametrize("content", [b"1e999", b"1e999\n2", b"1\n1e999", b"1e308\n1.5e308"])
def test_a_credit_report_without_end_is_none(content: bytes) -> None:
    """Whatever it would be added to, and shown as, cannot hold it."""
    assert parse_credit(content) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_an_error(content: bytes) -> None:
    assert parse_completion(content).process_exit_code in range(256)
    assert 0 <= parse_postponement(content).delay <= 86400
    parse_credit(content)


def test_a_huge_file_is_read_no_further_than_its_beginning() -> None:
    assert len(parse_completion(b"1\n0\n" + b"x" * (1 << 24)).message) == 4096
