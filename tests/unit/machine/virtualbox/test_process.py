"""Why a machine ended, from its log, its console and how its process went."""

from __future__ import annotations

import signal

import pytest

from vmjob.machine.contract import EndReason
from vmjob.machine.virtualbox.log import Cause
from vmjob.machine.virtualbox.process import explain_end

OFF = "00:00:02.000000 Changing the VM state from 'RUNNING' to 'POWERING_OFF'\n"
RESET = "00:00:01.000000 Reset initiated by keyboard controller\n"
GURU = "00:00:01.000000 !!         VCPU0: Guru Meditation 1155 (VINF_EM_TRIPLE_FAULT)\n"
FULL = ('00:00:01.000000 Console: VM runtime error: fatal=false, errorID=DevAHCI_DISKFULL '
        'message="the host system has no space"\n')
POWERED_OFF = """\
00:00:03.388769 ACPI: Entering S5 power state (power down)
00:00:03.393174 Console: Machine state changed to 'PoweredOff'
"""
ENDED = (Cause.RESET, "the guest restarted the machine")
PANIC = "[ 1.0] Kernel panic - not syncing: no init"
STATISTICS = "00:00:02.000000 /TM/Something 12345 times\n" * 10


@pytest.mark.parametrize(("code", "log", "console", "halted", "reason", "detail"), [
    (-9, "", "", None, EndReason.KILLED, "signal 9"),
    (-11, "", "", None, EndReason.CRASHED, "signal 11"),
    (1, "", "", None, EndReason.CRASHED, "status 1: its last words"),
    (0, "", "", None, EndReason.CRASHED, "status 0"),
    (-9, RESET, "vmjob-init: the agent ended\n", ENDED, EndReason.RESET, "the agent ended"),
    (-9, RESET, "", ENDED, EndReason.RESET, "restarted itself"),
    (-9, RESET, PANIC + "\nmore", ENDED, EndReason.PANIC, "not syncing: no init"),
    # One that may restart went on.
    (-9, RESET, "", None, EndReason.KILLED, "signal 9"),
    (-11, RESET, "", None, EndReason.CRASHED, "signal 11"),
    (0, RESET + POWERED_OFF, PANIC, None, EndReason.POWERED_OFF, "itself"),
    (0, POWERED_OFF, "", None, EndReason.POWERED_OFF, "itself"),
    (-9, GURU, "", None, EndReason.CRASHED, "TRIPLE_FAULT"),
    (-9, FULL, "Kernel panic - not syncing", None, EndReason.NO_SPACE, "no room"),
    # What VirtualBox wrote after it was too long to be read.
    (-9, STATISTICS, "", (Cause.RESET, "x"), EndReason.RESET, "restarted itself"),
    (-9, STATISTICS, "", (Cause.CRASHED, "Guru Meditation"), EndReason.CRASHED, "Guru"),
    (-9, STATISTICS, "", (Cause.NO_SPACE, "x"), EndReason.NO_SPACE, "no room"),
    (-9, STATISTICS, "", (Cause.CRASHED, "its service ended"), EndReason.CRASHED, "service"),
])
def test_the_reason_of_an_end_is_told(code: int, log: str, console: str,
                                      halted: tuple[Cause, str] | None, reason: EndReason,
                                      detail: str) -> None:
    found = explain_end(False, code, log, console, "its last words", halted)
    assert (found.reason, detail in found.detail) == (reason, True), found
    asked = explain_end(True, code, log, console, "its last words", halted)
    assert asked.reason is EndReason.ASKED


def test_a_sentence_is_not_longer_than_a_user_reads() -> None:
    for number in (0, -signal.SIGSEGV):
        assert len(explain_end(False, number, "", "", "x" * 10_000).detail) < 700
    assert len(explain_end(False, -9, RESET, f"vmjob-init: {'x' * 9999}", "", ENDED).detail) < 700
