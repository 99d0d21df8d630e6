"""What VBoxManage prints is read right, odd as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.machine.virtualbox.test_programs import WARNING
from tests.unit.machine.virtualbox.texts import TEXTS
from vmjob.errors import HypervisorRefused
from vmjob.machine.virtualbox.answers import (
    judge_answer,
    parse_machine_readable,
    uuid_of,
    without_banner,
)
from vmjob.machine.virtualbox.faults import Kind

INFO = r'''name="a \"quoted\" name"
Encryption:     disabled
groups="/"
memory=32
CfgFile="/srv/vm/machines/g/g.vbox"
"SATA-0-0"="none"
"SATA-ImageUUID-0-0"="284e6f64-3331-43da-97bc-fcda705649d3"
 rec_screen0
VMState="running"
description="first line
VMState=\"poweroff\"
VMState=off
a back\\slash"
uart1=0x03f8,4
Forwarding(0)="ssh,tcp,127.0.0.1,28222,,22"
empty=""
'''


def test_keys_and_values_lose_their_quotes_and_odd_lines_are_passed_over():
    found = parse_machine_readable(WARNING + INFO)
    assert found["name"] == 'a "quoted" name'
    assert found["memory"] == "32"
    assert found["SATA-0-0"] == "none"
    assert found["uart1"] == "0x03f8,4"
    assert found["Forwarding(0)"] == "ssh,tcp,127.0.0.1,28222,,22"
    assert found["empty"] == ""
    assert " rec_screen0" not in found


def test_a_description_of_several_lines_is_one_value_and_no_other_key():
    found = parse_machine_readable(INFO)
    assert found["description"] == 'first line\nVMState="poweroff"\nVMState=off\na back\\slash'
    assert found["VMState"] == "running"


def test_a_value_that_is_never_closed_hides_nothing():
    assert parse_machine_readable('a="x\nVMState="running"\nc=1')["c"] == "1"
    assert parse_machine_readable('name="it\nc=1\nd=2') == {"name": '"it', "c": "1", "d": "2"}


def test_the_first_of_two_values_stands():
    assert parse_machine_readable('a="1"\na="2"') == {"a": "1"}


@given(st.text(max_size=300) | st.lists(st.sampled_from(
    [*INFO.splitlines(), '"', 'a="', '\\', '="', '"="', '"a"="\\"'])).map("\n".join))
def test_no_answer_crashes_the_reader(text):
    assert all(isinstance(value, str) for value in parse_machine_readable(text).values())
    without_banner(text)
    judge_answer(1, text, text)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])))
def test_a_quoted_value_comes_back_as_it_was(value):
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    assert parse_machine_readable(f'a="{quoted}"\nb=1') == {"a": value, "b": "1"}


def test_the_warning_before_an_answer_is_no_part_of_it():
    assert without_banner(WARNING + "7.2.22r1\n") == "7.2.22r1\n"
    assert without_banner(WARNING) == ""
    assert without_banner("VM: WARNING: x\n") == "VM: WARNING: x\n"


def test_a_uuid_is_found():
    uuid = "284e6f64-3331-43da-97bc-fcda705649d3"
    assert uuid_of(f"Medium created. UUID: {uuid}\n") == uuid
    assert uuid_of(f"x b89f2f03-d44c-48b6-a72e-8a0e8e0f7301\nUUID:           {uuid}") == uuid
    assert uuid_of(f'"g" {{{uuid}}}') == uuid
    with pytest.raises(HypervisorRefused, match="no UUID"):
        uuid_of("Medium created.")


@pytest.mark.parametrize("text", [each for each in TEXTS if each.asked and each.exit == 0],
                         ids=lambda text: text.name)
def test_exit_code_0_does_not_hide_an_error(text):
    if text.stderr.startswith("VBoxManage: error:"):
        assert judge_answer(0, text.stdout, text.stderr).fault.kind == Kind(text.kind)


@pytest.mark.parametrize("text", [each for each in TEXTS if each.exit], ids=lambda text: text.name)
def test_what_a_refusal_means_is_told(text):
    assert judge_answer(text.exit, text.stdout, text.stderr).fault.kind == Kind(text.kind)


def test_progress_and_warnings_are_no_errors():
    answer = judge_answer(0, "Snapshot taken.\n", "0%...10%...100%\n"
                          'VBoxManage: warning: Interface "nosuch0" doesn\'t seem to exist\n')
    assert answer.fault is None
    assert answer.warnings == ('Interface "nosuch0" doesn\'t seem to exist',)


def test_a_program_that_was_killed_has_not_answered():
    assert "signal 9" in judge_answer(-9, "", "").fault.line
