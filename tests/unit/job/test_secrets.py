"""What opens a volunteer's account never reaches a machine; what a guest greps for does."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.job.links import read_bounded, resolved
from vmjob.job.mailbox import mailbox
from vmjob.job.model import MAILBOX_HALF
from vmjob.job.secrets import redacted

KEY = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("name", ["authenticator", "http_user_name", "http_user_passwd",
                                  "socks5_user_name", "socks5_user_passwd", "weak_auth",
                                  "account_key", "proxy_password", "AUTHENTICATOR"])
@pytest.mark.parametrize("form", [
    "<a>1</a>\n<{0}>{1}</{0}>\n<b/>", "<{0}>\n{1}\n</{0}>", "<{0} x='1'>{1}</ {0} >", "<{0}>{1}",
    "<{0}>{1}\n<b/>", "<{0}><![CDATA[{1}]]></{0}>", "<{0}>a<x>{1}</x></{0}>",
    "<{0}>{1}</{0}><{0}>{1}</{0}>", "<x>{1}</x><{0}>{1}</{0}><prefs key={1}>",
    "<{0}>a<{0}>{1}</{0}>", "</{0}><{0}>{1}", "<x>{1}</x><{0}><![CDATA[{1}]]></{0}>"])
def test_no_secret_is_left_however_it_is_written(name: str, form: str) -> None:
    text = redacted(form.format(name, KEY))
    assert KEY not in text
    assert redacted(text) == text


def test_all_else_is_left_and_each_tag_begins_its_line() -> None:
    given = ("<app_init_data>\n<userid>7</userid>\n<authenticator>" + KEY + "</authenticator>\n"
             "<vm_extensions_disabled>0</vm_extensions_disabled><user_total_credit>3.5"
             "</user_total_credit> <x/>\t<user_name>Ada</user_name>\n"
             "<host_info>\n    <timezone>28800</timezone>\n</host_info>\n</app_init_data>\n")
    assert redacted(given) == (
        "<app_init_data>\n<userid>7</userid>\n<authenticator></authenticator>\n"
        "<vm_extensions_disabled>0</vm_extensions_disabled>\n<user_total_credit>3.5"
        "</user_total_credit>\n<x/>\n<user_name>Ada</user_name>\n"
        "<host_info>\n    <timezone>28800</timezone>\n</host_info>\n</app_init_data>\n")


def test_markup_inside_a_secret_is_taken_out_there_and_not_elsewhere() -> None:
    assert redacted("<authenticator>\n<a></a></authenticator>\n<a></a>") == (
        "<authenticator></authenticator>\n<a></a>")


def test_a_password_that_is_the_name_of_a_tag_breaks_no_tag() -> None:
    assert redacted("<http_user_passwd>userid</http_user_passwd>\n<userid>7</userid> userid") == (
        "<http_user_passwd></http_user_passwd>\n<userid>7</userid> ")


@given(st.lists(st.sampled_from(["<authenticator>", "</authenticator>", "<http_user_passwd>", "\n",
                                 "</http_user_passwd>", "<a>", "</a>", "<a/>", "SECRET", "x", " "]),
                max_size=20).map("".join))
def test_what_stands_in_a_secrets_tag_is_gone_and_a_second_call_changes_nothing(text: str) -> None:
    left = redacted(text)
    assert redacted(left) == left
    for found in re.finditer(r"<(authenticator|http_user_passwd)>([^<\n]*)", left):
        assert found[2].strip() == ""


@pytest.mark.parametrize("unit", ["<authenticator>", "</authenticator>", "<", "<a/>", "</a> ",
                                  "<authenticator>abcdef%d</authenticator>", "passwd", "<\t"])
def test_a_file_of_the_largest_size_is_redacted_in_a_moment(unit: str) -> None:
    count = (1 << 20) // len(unit)
    text = "".join(unit % i for i in range(count)) if "%" in unit else unit * count
    begun = time.process_time()
    redacted(text)
    assert time.process_time() - begun < 3


def test_a_name_cannot_add_a_line_to_the_mailbox() -> None:
    text = ("<app_init_data><user_name>A&#10;BOINC_USERID=1</user_name><userid>7</userid>"
            "<user_total_credit>nan</user_total_credit></app_init_data>")
    assert mailbox(text, cern=True).splitlines() == [
        b"BOINC_USERNAME=ABOINC_USERID=1", b"BOINC_AUTHENTICATOR=", b"BOINC_USERID=7",
        b"BOINC_HOSTID=", b"BOINC_USER_TOTAL_CREDIT=0", b"BOINC_HOST_TOTAL_CREDIT=0"]


@given(st.text(), st.booleans())
def test_any_text_fits_the_mailbox(text: str, cern: bool) -> None:
    assert len(mailbox(text * 500, cern=cern)) < MAILBOX_HALF


# -- link files ------------------------------------------------------------------------------


def test_a_link_file_stands_for_the_file_that_it_names(tmp_path: Path) -> None:
    link = tmp_path / "in"
    link.write_text("<soft_link>../../projects/x/in_1</soft_link>\n")
    assert resolved(link) == tmp_path / "../../projects/x/in_1"


@pytest.mark.parametrize("content", ["", "data", "<soft_link></soft_link>", "<soft_link>a",
                                     "x<soft_link>a</soft_link>", "<soft_link>a\nb</soft_link>"])
def test_any_other_file_is_itself(tmp_path: Path, content: str) -> None:
    path = tmp_path / "in"
    path.write_text(content)
    assert resolved(path) == path
    assert resolved(tmp_path) == tmp_path
    assert resolved(tmp_path / "nothing") == tmp_path / "nothing"


def test_no_more_of_a_file_is_read_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"12345")
    assert read_bounded(path, 3) == b"123"
    assert read_bounded(tmp_path, 3) is None
    assert read_bounded(tmp_path / "x\0", 3) is None
