# ruff: noqa: E501 (lines of a log)
"""VBox.log tells why a machine ended, and what nobody else tells. Lines are real ones of 7.2.22."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.machine.virtualbox.faults import Kind, classify
from vmjob.machine.virtualbox.log import (
    PIECE,
    Cause,
    Follower,
    cause,
    complaints,
    events,
    port_conflicts,
)

START = """\
00:00:00.018562 Console: Machine state changed to 'Starting'
00:00:00.025025 fHMForced=true - No raw-mode support in this build!
00:00:00.315590 EMR3Init: fIemExecutesAll=true fGuruOnTripleFault=true
00:00:00.346827 Changing the VM state from 'CREATING' to 'CREATED'
00:00:00.351511 Changing the VM state from 'CREATED' to 'POWERING_ON'
00:00:00.351685 Changing the VM state from 'POWERING_ON' to 'RUNNING'
00:00:00.351694 Console: Machine state changed to 'Running'
00:00:00.354654 VBoxHeadless: starting event loop
"""
OFF = """\
00:00:01.445960 Console: Machine state changed to 'Stopping'
00:00:01.448647 Changing the VM state from 'RUNNING' to 'POWERING_OFF'
00:00:01.449997 Changing the VM state from 'POWERING_OFF' to 'OFF'
00:00:01.487800 Changing the VM state from 'DESTROYING' to 'TERMINATED'
00:00:01.487833 Console: Machine state changed to 'PoweredOff'
00:00:01.495534 VBoxHeadless: exiting
"""
SAVE = """\
00:00:01.520298 Console: Machine state changed to 'Saving'
00:00:01.521721 Changing the VM state from 'SUSPENDED' to 'SAVING'
00:00:01.567654 Console::powerDown(): A request to power off the VM has been issued (mMachineState=Saving, InUninit=0)
00:00:01.567819 PDMR3PowerOff: 40 841 ns run time
00:00:01.570838 Console: Machine state changed to 'Saved'
"""
SNAPSHOT = """\
00:00:01.428740 Console: Machine state changed to 'OnlineSnapshotting'
00:00:01.432043 Changing the VM state from 'SUSPENDED' to 'SAVING'
00:00:01.490296 Changing the VM state from 'RESUMING' to 'RUNNING'
00:00:01.490888 Console: Machine state changed to 'Running'
"""
GURU = """\
00:00:01.398202 Changing the VM state from 'RUNNING' to 'GURU_MEDITATION'
00:00:01.398236 Console: Machine state changed to 'Stuck'
00:00:01.398648 !!         VCPU0: Guru Meditation 1155 (VINF_EM_TRIPLE_FAULT)
"""
RESET = """\
00:00:01.393988 Reset initiated by keyboard controller
00:00:01.394033 Changing the VM state from 'RUNNING' to 'RESETTING'
00:00:01.408842 Changing the VM state from 'RESETTING' to 'RUNNING'
"""
PLACE = "/build/virtualbox-7.2.22-dfsg/src/VBox/"
DRIVERLESS = f"""\
00:00:00.053706 VMSetError: {PLACE}VMM/VMMR3/target-x86/HMR3-x86.cpp(679) int HMR3Init(PVM); rc=VERR_SUP_DRIVERLESS
00:00:00.053711 VMSetError: Driverless mode
00:00:00.054355 Console: Machine state changed to 'PoweredOff'
00:00:00.055360 Power up failed (vrc=VERR_SUP_DRIVERLESS, hrc=NS_ERROR_FAILURE (0X80004005))
00:00:00.063028 VBoxHeadless: exiting
"""
PORT = f"""\
00:00:00.334963 VMSetError: {PLACE}Devices/Network/DrvNAT.cpp(991) int drvNATNotifyApplyPortForwardCommand(PDRVNAT, bool, bool, const char*, uint16_t, const char*, uint16_t); rc=VERR_NAT_REDIR_SETUP
00:00:00.334966 VMSetError: NAT#0: configuration error: failed to set up redirection of 28222 to 22. Probably a conflict with existing services or other rules
"""
FULL = """\
00:00:00.425275 PIIX3 ATA: Host disk full
00:00:00.425291 VM: Raising runtime error 'DevATA_DISKFULL' (fFlags=0x6)
00:00:00.425295 Changing the VM state from 'RUNNING' to 'SUSPENDING'
00:00:00.425695 Changing the VM state from 'SUSPENDING' to 'SUSPENDED'
00:00:00.425700 Console: Machine state changed to 'Paused'
00:00:00.425998 Console: VM runtime error: fatal=false, errorID=DevATA_DISKFULL message="Host system reported disk full. VM execution is suspended. You can resume after freeing some space"
"""
S5 = """\
00:00:00.388769 ACPI: Entering S5 power state (power down)
00:00:00.388773 Changing the VM state from 'RUNNING' to 'POWERING_OFF'
00:00:00.389363 Changing the VM state from 'POWERING_OFF' to 'OFF'
00:00:00.389732 Console: Machine state changed to 'Stopping'
00:00:00.389966 Console::powerDown(): A request to power off the VM has been issued (mMachineState=Stopping, InUninit=0)
00:00:00.391864 Changing the VM state from 'OFF' to 'DESTROYING'
00:00:00.393169 Changing the VM state from 'DESTROYING' to 'TERMINATED'
00:00:00.393174 Console: Machine state changed to 'PoweredOff'
"""


@pytest.mark.parametrize(("log", "expected"), [
    (START, None),
    (START + OFF, Cause.ASKED),
    (START + S5, Cause.POWERED_OFF),
    (START + RESET, Cause.RESET),
    (START + RESET + S5, Cause.POWERED_OFF),
    (START + GURU, Cause.CRASHED),
    (START + GURU + OFF, Cause.CRASHED),
    (START + SAVE, Cause.SAVED),
    (START + SNAPSHOT, None),
    (START + FULL, Cause.NO_SPACE),
    (START + FULL + "00:01:09.0 Console: Machine state changed to 'Running'\n", None),
    (DRIVERLESS, Cause.NOT_STARTED),
    ("", None),
])
def test_the_cause_of_an_end_is_told(log, expected):
    found = cause(log)
    assert (found[0] if found else None) == expected
    assert found is None or found[1]


def test_a_full_disk_is_told_in_virtualboxs_own_words():
    found = cause(START + FULL)
    assert found[0] == Cause.NO_SPACE
    assert found[1].startswith("DevATA_DISKFULL: Host system reported disk full. VM execution is")
    assert classify(*complaints(START + FULL)).kind == Kind.DISK_FULL


def test_a_start_that_failed_says_why():
    assert cause(DRIVERLESS) == (Cause.NOT_STARTED, "Driverless mode (VERR_SUP_DRIVERLESS)")
    assert classify(*complaints(DRIVERLESS)).kind == Kind.DRIVERLESS


def test_a_port_that_another_process_has_is_found_though_the_start_succeeded():
    assert port_conflicts(START + PORT) == [28222]
    fault = classify(*complaints(START + PORT))
    assert fault.kind == Kind.PORT_TAKEN
    assert fault.line.startswith("NAT#0: configuration error: failed to set up redirection")
    assert port_conflicts(START) == []


def test_what_is_no_complaint_is_none():
    """A real log names files that do not exist, and errors that are none."""
    assert complaints(START + OFF + "00:00:00.1 VERR_FILE_NOT_FOUND: no matter\n") == []


def test_states_come_in_order_with_their_time():
    states = [(event.seconds, event.text) for event in events(START) if event.kind == "state"]
    assert states == [(0.346827, "CREATED"), (0.351511, "POWERING_ON"), (0.351685, "RUNNING")]


def test_a_log_of_days_has_its_hours():
    (event,) = events("123:04:05.500000 Console: Machine state changed to 'Paused'\n")
    assert event.seconds == 123 * 3600 + 4 * 60 + 5.5


WHOLE = START + PORT + SNAPSHOT + RESET + FULL + GURU + S5 + OFF


@pytest.mark.parametrize("seed", range(20))
def test_a_growing_log_is_read_once_wherever_it_is_cut(tmp_path, seed):
    path = tmp_path / "VBox.log"
    follower = Follower(path)
    assert follower.look() == []
    data, found, chance = WHOLE.encode(), [], random.Random(seed)
    with path.open("wb", buffering=0) as file:
        while data:
            size = chance.randint(1, 400)
            file.write(data[:size])
            data = data[size:]
            found += follower.look()
    assert found == list(events(WHOLE))
    assert follower.look() == []


def test_a_log_that_began_anew_is_read_from_its_beginning(tmp_path):
    path = tmp_path / "VBox.log"
    follower = Follower(path)
    path.write_text(START + OFF)
    assert len(follower.look()) == len(list(events(START + OFF)))
    path.rename(tmp_path / "VBox.log.1")
    path.write_text(START)
    assert follower.look() == list(events(START))


def test_one_look_reads_a_bounded_piece(tmp_path):
    path = tmp_path / "VBox.log"
    path.write_bytes(b"x" * (3 * PIECE) + b"\n" + START.encode())
    follower, looks = Follower(path), 0
    while not (found := follower.look()):
        looks += 1
        assert len(follower._rest) <= PIECE
    assert looks >= 3
    assert found == list(events(START))


@given(st.lists(st.one_of(st.text(max_size=50), st.sampled_from(WHOLE.splitlines()),
                          st.text(max_size=30).map(lambda text: "00:00:01.0 VMSetError: " + text)),
                max_size=30))
def test_no_log_crashes_the_reader(lines):
    text = "\n".join(lines)
    cause(text)
    port_conflicts(text)
    classify(*complaints(text))
