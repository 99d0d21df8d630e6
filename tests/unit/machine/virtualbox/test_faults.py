"""VirtualBox's words are understood, and no words of it crash us."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.machine.virtualbox.texts import TEXTS, Text
from vmjob.errors import HostMemoryLow, HypervisorRefused, VmjobError, all_errors
from vmjob.machine.virtualbox import faults
from vmjob.machine.virtualbox.faults import Kind, check_memory, classify, error_lines


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_what_virtualbox_says_is_understood(text: Text) -> None:
    assert classify(text.stdout, text.stderr).kind == Kind(text.kind)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_each_error_says_in_one_line_what_happened_and_what_to_do(text: Text) -> None:
    error = classify(text.stdout, text.stderr).error("VBoxManage " + text.asked)
    assert isinstance(error, VmjobError)
    assert "\n" not in error.message
    assert "\n" not in error.advice
    assert "Details: code" not in error.message
    assert "VBoxManage: error:" not in error.message
    assert error.context["kind"] == text.kind
    assert len(error.message) > len("VBoxManage " + text.asked) + 5


@pytest.mark.parametrize("text", [each for each in TEXTS if each.line], ids=lambda text: text.name)
def test_the_line_that_says_most_is_told(text: Text) -> None:
    assert classify(text.stdout, text.stderr).line == text.line


def test_who_raises_may_say_more_and_other_than_the_text():
    error = classify("VBoxManage: error: x").error("start", text="whole", machine="g")
    assert error.context == {"kind": "unknown", "text": "whole", "machine": "g"}


def test_no_two_texts_have_one_name():
    assert len({text.name for text in TEXTS}) == len(TEXTS)


@pytest.mark.parametrize(("name", "code", "retryable"), [
    ("no-driver-direct", "kernel-module-missing", False),
    ("no-vt-x", "virtualization-off", False),
    ("vmx-locked", "virtualization-off", False),
    ("svm-in-use", "virtualization-in-use", True),
    ("vmx-root-mode", "virtualization-in-use", True),
    ("start-running", "busy", True),
    ("state-flipped", "checkpoint-unusable", True),
    ("hdd-damaged", "disk-unusable", False),
    ("nat-second-rule", "port-taken", True),
    ("ram", "usage", False),
    ("unknown-vm", "hypervisor-refused", True),
    ("registry-not-writable", "home-unusable", False),
    ("service-without-tmp", "virtualbox-broken", False),
])
def test_faults_of_the_job_of_this_computer_and_of_the_moment_are_told_apart(name, code, retryable):
    text = next(text for text in TEXTS if text.name == name)
    fault = classify(text.stderr)
    error = fault.error()
    assert (error.code, error.retryable, fault.retryable) == (code, retryable, retryable)


def test_the_line_that_says_most_is_the_one_that_users_get():
    for name, line in {
            "hdd-damaged":
                "VDI: invalid pre-header in '/srv/vm/a.vdi' (VERR_VD_VDI_INVALID_HEADER).",
            "floppy-gone-direct":
                "VD: error VERR_FILE_NOT_FOUND opening image file '/srv/vm/f.img' "
                "(VERR_FILE_NOT_FOUND).",
            "state-flipped":
                "Failed to load unit 'pgm' (VERR_SSM_INTEGRITY_DECOMPRESSION)",
            "serial-start":
                "RawFile#0 failed to create the raw output file /nosuch/x (VERR_FILE_NOT_FOUND)",
            "medium-dir":
                "Could not create the directory '/proc/nosuch' (VERR_FILE_NOT_FOUND)"}.items():
        text = next(text for text in TEXTS if text.name == name)
        assert classify(text.stdout, text.stderr).line == line


def test_what_nobody_knows_keeps_its_first_error_line():
    fault = classify("0%...10%\nVBoxManage: error: The moon is full\n"
                     "VBoxManage: error: Details: code X (0x1), component Y, interface Z")
    assert fault.kind == Kind.UNKNOWN
    assert fault.line == "The moon is full (X)"
    assert fault.error_class is HypervisorRefused
    assert classify("").line == classify("\n \n").line == "it said nothing"


def test_error_lines_are_those_of_any_program_and_system():
    assert error_lines("VBoxManage.exe: error: a\r\nVBoxHeadless: error: b\nerror: e\n"
                       "VBoxManage: warning: c\nVBoxManage: fatal error: d") == ["a", "b", "d"]
    assert faults.warning_lines("VBoxManage: warning: c\nVBoxManage: error: d") == ["c"]


WORDS = [text.stderr for text in TEXTS] + [rule.pattern.pattern for rule in faults.RULES]


@given(st.lists(st.one_of(st.text(), st.sampled_from(WORDS), st.binary().map(
    lambda data: data.decode("utf-8", "surrogateescape"))), max_size=6))
def test_no_text_crashes_the_reader(texts):
    fault = classify(*texts)
    error = fault.error()
    assert error.code in {each.code for each in all_errors()}
    assert "\n" not in fault.line
    assert len(fault.text) <= faults.TEXT_KEPT


def test_a_huge_text_is_read_in_no_time():
    """No pattern takes more than linear time."""
    began = time.monotonic()
    for piece in ("Snapshot 'x", "Medium '", "Machine settings file '", "VERR_VD_", "0%.", "'" * 9):
        assert classify(piece * (1_000_000 // len(piece))).kind in set(Kind)
    assert time.monotonic() - began < 5


def test_memory_that_cannot_be_had_is_refused_before_the_start():
    check_memory(1000, 1000 + faults.OWN_MEMORY_MB)
    with pytest.raises(HostMemoryLow, match="needs 1001 MB"):
        check_memory(1001, 1000 + faults.OWN_MEMORY_MB)
