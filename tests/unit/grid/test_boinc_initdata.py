"""What the client writes into ``init_data.xml`` is read, whatever else is in there."""

from __future__ import annotations

import math
import os
import time
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.simulated_client import AUTHENTICATOR, SimulatedClient
from vmjob.grid.boinc import InitData, InitDataInvalid
from vmjob.grid.boinc.initdata import MAX_BYTES, parse, read

#: As a client of 2014 (7.2.42) wrote it, shortened; it indents, and forgets a line's end.
OLD = b"""<app_init_data>
<major_version>7</major_version>
<minor_version>2</minor_version>
<release>42</release>
<app_version>701</app_version>
<hostid>2000002</hostid>
<app_name>setiathome_v7</app_name>
<project_dir>/root/BOINC/projects/setiathome.berkeley.edu</project_dir>
<boinc_dir>/root/BOINC</boinc_dir>
<authenticator>0123456789abcdef</authenticator>
<wu_name>25dc14aa.2864.12.70</wu_name>
<result_name>25dc14aa.2864.12.70_1</result_name>
<shm_key>16778408</shm_key>
<slot>1</slot>
<client_pid>18479</client_pid>
<wu_cpu_time>59.241700</wu_cpu_time>
<starting_elapsed_time>62.273560</starting_elapsed_time>
<vm_extensions_disabled>0</vm_extensions_disabled><user_total_credit>493522.165827</user_total_credit>
<checkpoint_period>60.000000</checkpoint_period>
<fraction_done_start>0.000000</fraction_done_start>
<fraction_done_end>1.000000</fraction_done_end>
<ncpus>1.000000</ncpus>
<rsc_fpops_bound>3016423908046480.000000</rsc_fpops_bound>
<rsc_memory_bound>33554432.000000</rsc_memory_bound>
<computation_deadline>1443485759.000000</computation_deadline>
<vbox_window>0</vbox_window>
<host_info>
    <p_ncpus>2</p_ncpus>
    <p_vendor>AuthenticAMD</p_vendor>
    <m_nbytes>3744915456.000000</m_nbytes>
    <os_name>Linux</os_name>
    <os_version>3.13.0-57-generic</os_version>
    <coprocs>
    </coprocs>
</host_info>
<proxy_info>
    <http_server_name>proxy.example.org</http_server_name>
    <http_server_port>3128</http_server_port>
    <http_user_passwd>hush</http_user_passwd>
</proxy_info>
<global_preferences>
   <max_ncpus_pct>0.000000</max_ncpus_pct>
   <leave_apps_in_memory>1</leave_apps_in_memory>
   <cpu_usage_limit>60.000000</cpu_usage_limit>
   <disk_min_free_gb>0.100000</disk_min_free_gb>
</global_preferences>
</app_init_data>
"""


def of(inside: str) -> InitData:
    return parse(f"<app_init_data>\n{inside}\n</app_init_data>\n".encode())


def test_a_file_of_an_old_client_is_read() -> None:
    found = parse(OLD)
    assert (found.app_name, found.app_version) == ("setiathome_v7", 701)
    assert found.client_version == (7, 2, 42)
    assert found.project_dir == Path("/root/BOINC/projects/setiathome.berkeley.edu")
    assert (found.slot, found.client_pid, found.shm_key) == (1, 18479, 16778408)
    assert (found.wu_cpu_time, found.user_total_credit) == (59.2417, 493522.165827)
    assert found.rsc_fpops_bound == 3016423908046480.0
    assert (found.host.p_ncpus, found.host.os_version) == (2, "3.13.0-57-generic")
    assert found.proxy.http_server_port == 3128
    preferences = found.global_preferences
    assert (preferences.cpu_usage_limit, preferences.niu_cpu_usage_limit) == (60.0, 60.0)
    assert preferences.max_ncpus_pct == 100.0  # 0 is how the client writes "not set"
    assert preferences.leave_apps_in_memory


def test_a_file_of_the_measured_client_is_read(tmp_path: Path) -> None:
    with SimulatedClient(tmp_path, wu_cpu_time=4.5) as client:
        found = read(client.slot / "init_data.xml")
    assert (found.user_name, found.team_name) == ("A & B", "<none>")
    assert (found.slot, found.shm_key, found.wu_cpu_time) == (0, -1, 4.5)
    assert found.project_preferences == "\n<cores>2</cores><slot>99</slot>\n"


def test_what_is_missing_has_a_usable_value() -> None:
    found = parse(b"<app_init_data>\n<gpu_type>ATI</gpu_type>\n</app_init_data>")
    assert found == InitData()
    assert (found.checkpoint_period, found.ncpus, found.shm_key) == (300.0, 1.0, -1)
    assert of("<checkpoint_period>0</checkpoint_period><ncpus>0</ncpus>") == found


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    with SimulatedClient(tmp_path) as client:
        assert read(client.slot / "init_data.xml").authenticator == AUTHENTICATOR
        assert AUTHENTICATOR not in repr(read(client.slot / "init_data.xml"))
    found = parse(OLD)
    for shown in (repr(found), str(found), repr(found.proxy), f"{found}"):
        assert "hush" not in shown
        assert "0123456789abcdef" not in shown
        assert "proxy.example.org" not in shown


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "-5", "abc", "", "0x", "1e", "٣"])
def test_nonsense_for_a_number_is_as_if_it_were_not_there(text: str) -> None:
    found = of(f"<wu_cpu_time>{text}</wu_cpu_time><ncpus>{text}</ncpus>"
               f"<client_pid>{text}</client_pid><process_priority>{text}</process_priority>")
    assert found.wu_cpu_time in {0.0, 1.0}
    assert found.ncpus == 1.0
    assert found.client_pid in {0, 1}
    assert found.process_priority in {-1, 0, 1}


def test_no_process_but_one_can_be_meant() -> None:
    """`kill` takes 0 and below for groups of processes."""
    for text in ("-1", "0", "-18479", str(1 << 31), "9" * 30):
        assert of(f"<client_pid>{text}</client_pid>").client_pid == 0


def test_preferences_of_the_project_set_nothing() -> None:
    found = of("<project_preferences><slot>7</slot><host_info><p_ncpus>9</p_ncpus></host_info>"
               "<project_dir>/etc</project_dir></project_preferences><slot>2</slot>")
    assert (found.slot, found.host.p_ncpus, found.project_dir) == (2, 1, Path())
    assert "<p_ncpus>9</p_ncpus>" in found.project_preferences


def test_a_file_without_some_ends_is_read() -> None:
    found = parse(b"junk <app_init_data> text <slot>3\n<ncpus>4</ncpus more='1'> text\n"
                  b"<vbox_window/>\n<host_info>\n<p_ncpus>8</p_ncpus>\n<user_name>a&b&#38;&bad;")
    assert (found.slot, found.ncpus, found.vbox_window) == (3, 4.0, True)
    assert found.user_name == "a&b&&bad;"


def test_a_path_of_any_bytes_leads_to_its_file(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 &amp; b"))
    odd.mkdir()
    found = parse(b"<app_init_data><project_dir>%b</project_dir><user_name>caf\xe9</user_name>"
                  % os.fsencode(odd))
    assert found.project_dir.is_dir()
    found.user_name.encode()  # fit to be written somewhere
    assert of("<project_dir>/a\0b</project_dir>").project_dir == Path()


@pytest.mark.parametrize("data", [b"", b"<app_init>", b"\0" * 100, b"<app_init_data" * 10,
                                  b"<app_init_data>" + b" " * MAX_BYTES])
def test_what_is_no_such_file_is_refused(data: bytes) -> None:
    with pytest.raises(InitDataInvalid):
        parse(data)


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(OLD)
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="symbolic"):
        read(tmp_path / "link")
    with pytest.raises(InitDataInvalid):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("piece", [b"<", b"<a", b"<a ", b"<a>", b"</a>", b"<host_info>", b"&#1",
                                   b"<project_preferences>", b"<a b", b"a<a/"])
def test_no_text_takes_long(piece: bytes) -> None:
    data = b"<app_init_data>" + piece * ((MAX_BYTES - 100) // len(piece))
    start = time.process_time()
    parse(data)
    assert time.process_time() - start < 5.0


#: Pieces of real files in any order, and any bytes between them.
pieces = st.lists(st.sampled_from([each + b"\n" for each in OLD.split(b"\n")])
                  | st.binary(max_size=20)
                  | st.builds(lambda name, value: f"<{name}>{value}</{name}>".encode(
                      "utf-8", "surrogatepass"),
                      st.sampled_from([each.name for each in fields(InitData)]),
                      st.text(max_size=20) | st.floats() | st.integers()), max_size=30)


@given(st.binary(max_size=300) | pieces.map(b"".join)
       | pieces.map(lambda each: b"<app_init_data>" + b"".join(each)))
def test_any_bytes_give_sound_values_or_are_refused(data: bytes) -> None:
    try:
        found = parse(data)
    except InitDataInvalid:
        return
    assert_sound(found)
    assert found.ncpus > 0
    assert found.checkpoint_period > 0
    assert 0 <= found.client_pid < 1 << 31
    assert 0 <= found.fraction_done_start < found.fraction_done_end <= 1
    assert 0 < found.global_preferences.cpu_usage_limit <= 100


def assert_sound(record: object) -> None:
    assert is_dataclass(record)
    for each in fields(record):
        value = getattr(record, each.name)
        if is_dataclass(value):
            assert_sound(value)
        elif isinstance(value, str):
            value.encode()
        elif isinstance(value, float):
            assert math.isfinite(value)
            assert value >= 0
