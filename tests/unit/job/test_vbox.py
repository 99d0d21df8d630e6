"""vbox_job.xml: each element becomes a field of the job, or a finding says what is done instead."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.errors import UsageError
from vmjob.job import vbox
from vmjob.job.codes import CODES
from vmjob.job.languages import read_bytes
from vmjob.job.model import Forward, Job, Network
from vmjob.job.reading import Level, Reading, Surroundings
from vmjob.job.vbox_elements import FLAGS, FORWARD, KNOWN, OUTDATED

NOWHERE = Surroundings(Path("/nonexistent/slot"), Path("/nonexistent/projects/x"))

INIT_DATA = """<app_init_data>
<userid>7</userid><hostid>8</hostid>
<user_name>Ada &amp; Bob</user_name>
<authenticator>0123456789abcdef</authenticator>
<user_total_credit>364088.384021</user_total_credit>
<host_total_credit>0.1</host_total_credit>
<proxy_info><http_user_name>ada</http_user_name><http_user_passwd>hunter22</http_user_passwd>
</proxy_info>
</app_init_data>
"""


def read(body: str, where: Surroundings = NOWHERE, *, shared: bool = True,
         memory: bool = True) -> Reading:
    """A file with what every job has, one line each, and ``body``, which begins in line 4."""
    head = [" <memory_size_mb>630</memory_size_mb>" if memory else "",
            " <enable_shared_directory/>" if shared else ""]
    return vbox.read("\n".join(["<vbox_job>", *head, body, "</vbox_job>"]).encode(), where)


def job_of(body: str, where: Surroundings = NOWHERE, **more: bool) -> Job:
    reading = read(body, where, **more)
    assert reading.job is not None, reading.findings
    reading.job.check()
    return reading.job


def found(reading: Reading) -> list[tuple[str, int, str]]:
    return [(each.level.value, each.line, each.code) for each in reading.findings]


def instead(reading: Reading, code: str) -> str:
    return next(each.instead for each in reading.findings if each.code == code)


@pytest.fixture
def slot(tmp_path: Path) -> Surroundings:
    """A slot and a project with every disk there can be."""
    project = tmp_path / "projects" / "x"
    directory = tmp_path / "slots" / "0"
    project.mkdir(parents=True)
    directory.mkdir(parents=True)
    (project / "Theory.vdi").write_bytes(b"disk")
    for name in ("vm_image.vdi", "vm_image_2.vdi", "vm_isocontext.iso", "vm_cache.vdi"):
        (directory / name).write_bytes(b"disk")
    (directory / "init_data.xml").write_text(INIT_DATA)
    return Surroundings(directory, project, ("--a", "b c"))


# -- each element ----------------------------------------------------------------------------

#: Element -> what is written, a field of the job that it decides, and its value.
FIELDS: dict[str, tuple[str, str, Any]] = {
    "memory_size_mb": ("<memory_size_mb>1024.2</memory_size_mb>", "memory_mb", 1025),
    "enable_network": ("<enable_network/>", "network", Network.NAT),
    "minimum_checkpoint_interval": (
        "<minimum_checkpoint_interval>900</minimum_checkpoint_interval>", "checkpoint_every", 900),
    "disable_automatic_checkpoints": (
        "<disable_automatic_checkpoints/>", "checkpoint_every", 0),
    "job_duration": ("<job_duration>864000</job_duration>", "duration", 864000),
    "fraction_done_filename": ("<fraction_done_filename>results/progress</fraction_done_filename>",
                               "triggers.fraction_done", "results/progress"),
    "heartbeat_filename": ("<heartbeat_filename>hb</heartbeat_filename>", "triggers.heartbeat",
                           "hb"),
    "minimum_heartbeat_interval": (
        ("<heartbeat_filename>hb</heartbeat_filename>"
        "<minimum_heartbeat_interval>1800</minimum_heartbeat_interval>"),
        "triggers.heartbeat_interval", 1800),
    "completion_trigger_file": ("<completion_trigger_file>shutdown</completion_trigger_file>",
                                "triggers.completion", "shutdown"),
    "temporary_exit_trigger_file": (
        "<temporary_exit_trigger_file>later</temporary_exit_trigger_file>",
        "triggers.temporary_exit", "later"),
    "trickle_trigger_file": (
        ("<trickle_trigger_file>a</trickle_trigger_file>"
        "<trickle_trigger_file>b</trickle_trigger_file>"), "triggers.trickles", ("a", "b")),
    "intermediate_upload_file": (
        ("<intermediate_upload_file>a</intermediate_upload_file>"
        "<intermediate_upload_file>a</intermediate_upload_file>"), "triggers.uploads", ("a",)),
    "pf_guest_port": ("<enable_network/><pf_guest_port>80</pf_guest_port>", "forwards",
                      (Forward(80, web=True),)),
    "pf_host_port": (("<enable_network/><pf_guest_port>80</pf_guest_port>"
                     "<pf_host_port>7859</pf_host_port>"), "forwards",
                     (Forward(80, 7859, web=True),)),
    "port_forward": (("<enable_network/><port_forward><host_port>5000</host_port>"
                     "<guest_port>22</guest_port><nports>2</nports></port_forward>"), "forwards",
                     (Forward(22, 5000), Forward(23, 5001))),
    "enable_remotedesktop": ("<enable_remotedesktop/>", "hardware.display", True),
    "enable_screenshots_on_error": ("<enable_screenshots_on_error/>", "hardware.screenshot",
                                    NOWHERE.directory / "vbox_screenshot.png"),
    "enable_floppyio": ("<enable_floppyio/>", "hardware.mailbox", b""),
}
#: Elements whose effect needs files, or has a test of its own below.
ELSEWHERE = {
    "enable_shared_directory", "share_slot_dir", "enable_scratch_directory", "share_project_dir",
    "copy_to_shared", "copy_cmdline_to_shared", "enable_isocontextualization", "enable_cache_disk",
    "boot_iso", "multiattach_vdi_file", "enable_cern_dataformat"}
#: Element -> what is written, and the findings it causes: nothing of the job depends on it.
ONLY_SAID: dict[str, tuple[str, list[str]]] = {
    "os_name": ("<os_name>Linux26</os_name>", []),
    "enable_graphics_support": ("<enable_graphics_support/>", ["note no-status-file"]),
    "vram_size_mb": ("<vram_size_mb>16</vram_size_mb>", ["note not-needed"]),
    "vm_disk_controller_type": (
        "<vm_disk_controller_type>SATA</vm_disk_controller_type>", ["note not-needed"]),
    "vm_disk_controller_model": (
        "<vm_disk_controller_model>IntelAHCI</vm_disk_controller_model>", ["note not-needed"]),
    "vm_network_driver": ("<vm_network_driver>82540EM</vm_network_driver>", ["note not-needed"]),
    "enable_nat_dns_host_resolver": ("<enable_nat_dns_host_resolver/>", ["note not-needed"]),
    "enable_vm_savestate_usage": ("<enable_vm_savestate_usage/>", ["note not-needed"]),
    "network_bridged_mode": ("<enable_network/><network_bridged_mode/>", ["note bridged"]),
}


def test_every_element_that_vboxwrapper_knows_has_its_test() -> None:
    assert FIELDS.keys() | ELSEWHERE | ONLY_SAID.keys() == KNOWN


def test_the_page_has_every_element_once_with_its_tests() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "vbox_job.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| `v::test_.*` \|$", page, re.MULTILINE)
    assert sorted(rows) == sorted(KNOWN)  # that the tests exist: tests/unit/test_docs.py
    assert all(f"`{name}`" in page for name in OUTDATED)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_an_element_decides_its_field_of_the_job(name: str) -> None:
    written, path, value = FIELDS[name]
    with_it: Any = job_of(written, memory=name != "memory_size_mb")
    without: Any = job_of("")
    for part in path.split("."):
        with_it, without = getattr(with_it, part), getattr(without, part)
    assert with_it == value != without


@pytest.mark.parametrize("name", sorted(ONLY_SAID))
def test_what_vmjob_has_no_use_for_changes_nothing(name: str) -> None:
    written, codes = ONLY_SAID[name]
    reading = read(written)
    assert [f"{each.level.value} {each.code}" for each in reading.findings] == codes
    network = Network.NAT if "enable_network" in written else Network.NONE
    assert reading.job == replace(job_of(""), network=network)


def test_a_job_without_a_word_is_boinc_app_in_the_shared_folder() -> None:
    job = job_of("")
    (task,) = job.tasks
    assert (task.argv[:2], task.cwd, task.user) == (("/bin/sh", "-c"), "/root/shared", "root")
    assert "exec ./boinc_app" in task.argv[2]
    assert (job.network, job.cpus, job.cpu, job.duration) == (Network.NONE, 1, "baseline", None)
    assert job.checkpoint_every == 600
    (folder,) = job.folders
    assert (folder.name, folder.source, folder.destination, folder.live, folder.writable) == (
        "shared", NOWHERE.directory / "shared", "/root/shared", True, True)


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_a_flag_of_0_is_as_if_it_were_not_there(name: str) -> None:
    reading = read(f"<{name}>0</{name}>", shared=False)
    base = read("", shared=False)
    assert (reading.job, [each.code for each in reading.findings]) == (
        base.job, [each.code for each in base.findings])


# -- folders ---------------------------------------------------------------------------------


def test_a_shared_slot_keeps_the_clients_files_to_itself_but_not_boinc_app() -> None:
    (folder,) = job_of("<share_slot_dir/>", shared=False).folders
    assert (folder.name, folder.source, folder.destination, folder.links) == (
        "shared", NOWHERE.directory, "/root/shared", True)
    left_out = {name for name in ("boinc_app", "boinc_lockfile", "boinc_mmap_file", "stderr.txt",
                                  "boinc_ufr_out", "vmjob", "in", "init_data.xml",
                                  "graphics_status.xml", "vm_image_1.vdi", "vbox_job.xml")
                if any(Path(name).match(pattern) for pattern in folder.without)}
    assert left_out == {"boinc_lockfile", "boinc_mmap_file", "stderr.txt", "boinc_ufr_out", "vmjob",
                        "graphics_status.xml", "vm_image_1.vdi", "vbox_job.xml"}


def test_the_projects_folder_is_seen_and_its_scratch_is_written() -> None:
    assert NOWHERE.project is not None
    project = job_of("<share_project_dir/>").folders[1]
    assert (project.name, project.source, project.destination, project.writable) == (
        "project", NOWHERE.project, "/root/project", False)
    scratch = job_of("<enable_scratch_directory/>").folders[1]
    assert (scratch.name, scratch.source, scratch.destination, scratch.writable) == (
        "scratch", NOWHERE.project / "scratch", "/root/scratch", True)


def test_files_and_the_command_line_are_copied_into_the_shared_folder(slot: Surroundings) -> None:
    body = "<copy_to_shared>in</copy_to_shared><copy_cmdline_to_shared/>"
    (folder,) = job_of(body + "<enable_isocontextualization/>", slot).folders
    assert folder.copies == (slot.directory / "in",)
    assert folder.texts == {"cmdline": "--a b c"}


def test_init_data_is_shared_without_the_accounts_key(slot: Surroundings) -> None:
    reading = read("<copy_to_shared>init_data.xml</copy_to_shared>", slot)
    assert reading.job is not None
    (folder,) = reading.job.folders
    assert folder.copies == ()
    text = folder.texts["init_data.xml"]
    assert "\n<user_name>Ada &amp; Bob</user_name>\n" in text
    assert "0123456789abcdef" not in text
    assert "hunter22" not in text
    assert ("note", 4, "redacted") in found(reading)


@pytest.mark.parametrize(("body", "shared"), [
    ("<share_slot_dir/>", True),
    ("<share_slot_dir/><copy_to_shared>a</copy_to_shared>", False),
    ("<share_project_dir/><enable_scratch_directory/>", True)])
def test_what_vboxwrapper_ends_with_206_for_is_an_error(body: str, shared: bool) -> None:
    reading = read(body, shared=shared)
    assert (reading.job, found(reading)) == (None, [("error", 4, "contradiction")])


def test_copies_need_a_shared_folder_and_so_do_triggers() -> None:
    reading = read("<copy_to_shared>a</copy_to_shared>", shared=False)
    assert reading.job is None
    assert ("error", 4, "needs-shared") in found(reading)
    reading = read("<heartbeat_filename>a</heartbeat_filename>", shared=False)
    assert ("warning", 4, "needs-shared") in found(reading)


@pytest.mark.parametrize("name", ["completion_trigger_file", "temporary_exit_trigger_file",
                                  "heartbeat_filename", "fraction_done_filename",
                                  "trickle_trigger_file", "intermediate_upload_file",
                                  "copy_to_shared", "multiattach_vdi_file"])
@pytest.mark.parametrize("value", ["/etc/passwd", "../../x", "a/../..", "a&#10;b", "{name}"])
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str, value: str) -> None:
    reading = read(f"<{name}>{value}</{name}>")
    assert reading.job is None
    assert found(reading)[0] in {("error", 4, "bad-path"), ("error", 4, "placeholder")}


# -- the machine -----------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "memory"), [("256", 512), ("630", 630), ("15000", 15000)])
def test_less_memory_than_512_is_raised_and_more_is_kept(written: str, memory: int) -> None:
    body = f"<memory_size_mb>{written}</memory_size_mb>"
    assert job_of(body, memory=False).memory_mb == memory
    assert (("note", 4, "memory-raised") in found(read(body, memory=False))) == (memory == 512)


def test_the_wrappers_command_line_wins_over_the_file() -> None:
    where = replace(NOWHERE, memory_mb=2000.5, cpus=4)
    job = job_of("", where)
    assert (job.memory_mb, job.cpus) == (2001, 4)
    assert job_of("", replace(where, memory_mb=100)).memory_mb == 512


def test_a_file_without_memory_gets_the_least_and_a_warning() -> None:
    reading = read("", memory=False)
    assert (found(reading), reading.job and reading.job.memory_mb) == (
        [("warning", 0, "memory-missing")], 512)


def test_a_disk_of_its_own_is_booted_and_knows_what_to_do(slot: Surroundings) -> None:
    assert slot.project is not None
    job = job_of("", slot)
    assert (job.hardware.disk, job.tasks) == (slot.directory / "vm_image.vdi", ())
    job = job_of("", replace(slot, image_number=2))
    assert job.hardware.disk == slot.directory / "vm_image_2.vdi"
    job = job_of("<multiattach_vdi_file>Theory.vdi</multiattach_vdi_file>", slot)
    assert job.hardware.disk == slot.project / "Theory.vdi"


def test_a_disk_that_a_link_file_stands_for_is_the_projects(slot: Surroundings) -> None:
    assert slot.project is not None
    link = slot.directory / "vm_image.vdi"
    link.write_text("<soft_link>../../projects/x/Theory.vdi</soft_link>\n")
    disk = job_of("", slot).hardware.disk
    assert disk is not None
    assert disk.resolve() == (slot.project / "Theory.vdi").resolve()


def test_a_cd_is_booted_in_place_of_the_disk_or_before_it(slot: Surroundings) -> None:
    iso, disk = slot.directory / "vm_isocontext.iso", slot.directory / "vm_image.vdi"
    hardware = job_of("<enable_isocontextualization/><enable_cache_disk/>", slot).hardware
    assert (hardware.iso, hardware.disk, hardware.iso_first) == (iso, None, False)
    assert hardware.cache_disk == slot.directory / "vm_cache.vdi"
    hardware = job_of("<boot_iso/>", slot).hardware
    assert (hardware.iso, hardware.disk, hardware.iso_first) == (iso, disk, True)


@pytest.mark.parametrize("body", [
    "<multiattach_vdi_file>Theory.vdi</multiattach_vdi_file>", "<enable_isocontextualization/>",
    "<boot_iso/>", "<enable_isocontextualization/><enable_cache_disk/>"])
def test_without_the_disk_that_it_names_a_job_is_boinc_app_with_a_note(body: str) -> None:
    reading = read(body)
    assert reading.job is not None
    assert reading.job.tasks[0].name == "boinc_app"
    assert set(found(reading)) == {("note", 4, "no-disk-image")}


def test_the_floppy_disk_holds_init_data_without_the_accounts_key(slot: Surroundings) -> None:
    held = job_of("<enable_floppyio/>", slot).hardware.mailbox
    assert held is not None
    assert b"\n<userid>7</userid>\n<hostid>8</hostid>\n" in held
    assert b"0123456789abcdef" not in held
    assert b"hunter22" not in held


def test_the_floppy_disk_in_cerns_format_has_six_lines(slot: Surroundings) -> None:
    body = "<enable_floppyio/><enable_cern_dataformat/>"
    assert job_of(body, slot).hardware.mailbox == (
        b"BOINC_USERNAME=Ada & Bob\nBOINC_AUTHENTICATOR=\nBOINC_USERID=7\nBOINC_HOSTID=8\n"
        b"BOINC_USER_TOTAL_CREDIT=364088.38402100001\nBOINC_HOST_TOTAL_CREDIT=0.10000000000000001\n")


def test_more_init_data_than_the_buffer_holds_is_cut_with_a_note(slot: Surroundings) -> None:
    (slot.directory / "init_data.xml").write_text("<a>" + "x" * 20_000 + "</a>")
    reading = read("<enable_floppyio/>", slot)
    assert ("note", 4, "mailbox-full") in found(reading)
    assert reading.job is not None
    assert reading.job.hardware.mailbox is not None
    assert len(reading.job.hardware.mailbox) == 14334


# -- ports -----------------------------------------------------------------------------------


def forward(*elements: tuple[str, object]) -> str:
    inside = "".join(f"<{name}>{value}</{name}>" for name, value in elements)
    return f"<port_forward>{inside}</port_forward>"


@pytest.mark.parametrize("body", [
    forward(("host_port", 1)), forward(("guest_port", 1)), forward(),
    forward(("host_port", 0), ("guest_port", 1)), forward(("host_port", 65536), ("guest_port", 1)),
    forward(("host_port", 65000), ("guest_port", 1), ("nports", 1000)),
    forward(("host_port", 1), ("guest_port", 1), ("nports", 1025)),
    forward(("host_port", "x"), ("guest_port", 1)), forward(("host_port", ""), ("guest_port", 1)),
    forward(("host_port", 1), ("guest_port", 1), ("nports", 1000)) * 2])
def test_a_forward_that_cannot_be_is_an_error(body: str) -> None:
    reading = read("<enable_network/>" + body)
    assert reading.job is None
    assert {code for level, _, code in found(reading) if level == "error"} <= {
        "incomplete", "out-of-range", "not-a-number"}


def test_a_port_for_other_computers_is_a_warning() -> None:
    reading = read("<enable_network/>" + forward(("host_port", 5000), ("guest_port", 22),
                                                 ("is_remote", 1)))
    assert reading.job is not None
    assert reading.job.forwards == (Forward(22, 5000, remote=True),)
    assert found(reading) == [("warning", 4, "remote-port")]


def test_two_forwards_of_one_port_are_a_warning() -> None:
    body = forward(("host_port", 80), ("guest_port", 1), ("nports", 3)) + forward(
        ("host_port", 82), ("guest_port", 9))
    assert found(read("<enable_network/>" + body)) == [("warning", 4, "port-twice")]


def test_a_wished_port_is_a_note_and_ports_need_a_network() -> None:
    body = "<pf_guest_port>80</pf_guest_port>\n<pf_host_port>7859</pf_host_port>"
    assert found(read("<enable_network/>" + body)) == [("note", 5, "port-taken")]
    reading = read(body)
    assert ("warning", 4, "no-effect") in found(reading)
    assert reading.job is not None
    assert reading.job.forwards == ()


def test_an_unknown_element_of_a_forward_is_reported_with_the_nearest_name() -> None:
    body = forward(("host_port", 80), ("guest_port", 1), ("remote", 1))
    reading = read("<enable_network/>" + body)
    assert found(reading) == [("warning", 4, "unknown-element")]
    assert instead(reading, "unknown-element") == "<is_remote>"
    assert sorted(FORWARD) == ["guest_port", "host_port", "is_remote", "nports"]


# -- traps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "right"), [
    ("vm_minimum_checkpoint_interval", "<minimum_checkpoint_interval>"),
    ("enable_shared_directoy", "<enable_shared_directory>"), ("memory_size", "<memory_size_mb>"),
    ("completely_else", "")])
def test_an_unknown_element_is_reported_with_the_nearest_name(written: str, right: str) -> None:
    reading = read(f"<{written}>600</{written}>")
    assert (found(reading), instead(reading, "unknown-element")) == (
        [("warning", 4, "unknown-element")], right)
    assert reading.job == job_of("")


@pytest.mark.parametrize("name", sorted(OUTDATED))
def test_an_element_of_older_releases_is_reported_with_what_to_write(name: str) -> None:
    written = name.replace("*", "x")
    reading = read(f"<{written}>1</{written}>")
    assert (found(reading), instead(reading, "outdated")) == (
        [("warning", 4, "outdated")], OUTDATED[name])
    assert OUTDATED[name].split(" ")[0] in KNOWN | {"", "nothing:", "a"}


@pytest.mark.parametrize(("element", "written", "right"), [
    ("vm_disk_controller_type", "stata", "sata"), ("vm_disk_controller_type", "stat", "sata"),
    ("vm_disk_controller_model", "IntelAHC1", "IntelAHCI")])
def test_a_controller_that_there_is_not_is_reported_with_the_nearest(element: str, written: str,
                                                                     right: str) -> None:
    reading = read(f"<{element}>{written}</{element}>")
    assert ("warning", 4, "unknown-value") in found(reading)
    assert instead(reading, "unknown-value") == right


def test_a_template_that_was_not_filled_in_is_an_error_at_its_line() -> None:
    reading = read("<memory_size_mb>{memory}</memory_size_mb>\n\n{extra}", memory=False)
    assert (reading.job, found(reading)) == (
        None, [("error", 4, "placeholder"), ("warning", 6, "stray-text")])


def test_an_element_that_is_there_twice_is_reported_and_the_last_counts() -> None:
    reading = read("<memory_size_mb>700</memory_size_mb>")
    assert found(reading) == [("warning", 4, "twice")]
    assert reading.job is not None
    assert reading.job.memory_mb == 700


@pytest.mark.parametrize("body", [
    "<minimum_heartbeat_interval>9</minimum_heartbeat_interval>",
    "<network_bridged_mode/>", "<enable_cern_dataformat/>", "<enable_cache_disk/>",
    "<job_duration>9</job_duration>\n<fraction_done_filename>a</fraction_done_filename>",
    "<pf_host_port>80</pf_host_port>"])
def test_what_does_nothing_by_itself_is_reported(body: str) -> None:
    reading = read(body)
    assert [code for level, _, code in found(reading) if level == "warning"] == ["no-effect"]
    assert found(read("<copy_cmdline_to_shared/>", shared=False))[-1][2] == "no-effect"


def test_a_duration_decides_the_fraction_done() -> None:
    body = "<fraction_done_filename>a</fraction_done_filename>"
    assert job_of(body).triggers.fraction_done == "a"
    assert job_of(body + "<job_duration>9</job_duration>").triggers.fraction_done is None


def test_checkpoints_more_than_a_day_apart_are_worth_a_note() -> None:
    body = "<minimum_checkpoint_interval>1000000</minimum_checkpoint_interval>"
    assert found(read(body)) == [("note", 4, "rare-checkpoints")]
    assert found(read(body + "<disable_automatic_checkpoints/>")) == []
    zero = body.replace("1000000", "0")
    assert job_of(zero).checkpoint_every is None  # as often as the volunteer likes, not never


def test_cerns_jobs_leave_a_file_when_their_duration_is_over(tmp_path: Path) -> None:
    body = "<enable_floppyio/><enable_cern_dataformat/><job_duration>9</job_duration>"
    where = Surroundings(tmp_path)
    assert job_of(body, where).duration_file == tmp_path / "output"
    assert job_of(body.replace("<enable_cern_dataformat/>", ""), where).duration_file is None
    (tmp_path / "output").write_text("<soft_link>../../../etc/output</soft_link>")
    assert "bad-link" in str(found(read(body, where)))


@pytest.mark.parametrize(("data", "code"), [
    (b"", "no-root"), (b"<job_desc/>", "no-root"), (b"hello", "no-root"),
    (b"<vbox_job>", "end-missing"), (b"<vbox_job><memory", "cut-off")])
def test_a_file_without_a_whole_vbox_job_is_refused(data: bytes, code: str) -> None:
    reading = vbox.read(data, NOWHERE)
    assert reading.job is None
    assert [each.code for each in reading.findings if each.level is Level.ERROR] == [code]


def test_a_second_document_is_reported_and_the_first_counts() -> None:
    reading = vbox.read(b"<x/><vbox_job><enable_shared_directory/></vbox_job><vbox_job/>", NOWHERE)
    assert [each.code for each in reading.findings].count("second-root") == 2
    assert reading.job is not None
    assert reading.job.folders


# -- real files ------------------------------------------------------------------------------

#: File -> findings that are more than notes.
REAL: dict[str, list[tuple[str, int, str]]] = {
    "b2d_template.xml": [("error", 3, "placeholder"), ("warning", 10, "stray-text")],
    "sourcefinder_stata.xml": [("warning", 6, "unknown-value")],
    "sourcefinder_stata864000.xml": [("warning", 6, "unknown-value"),
                                     ("warning", 7, "unknown-element")],
    "sourcefinder_vmmin600.xml": [("warning", 7, "unknown-element")],
    "sourcefinder_vmmin_comment.xml": [("warning", 7, "unknown-element")],
}


def test_every_real_file_is_read_or_refused_with_its_line() -> None:
    given = os.environ.get("VMJOB_TEST_INPUTS")
    if given is None or not (directory := Path(given) / "vbox_job").is_dir():
        pytest.skip("VMJOB_TEST_INPUTS names no directory with vbox_job/*.xml")
    for path in sorted(directory.glob("*.xml")):
        reading = read_bytes(path.read_bytes(), Surroundings(directory))
        bad = [each for each in found(reading) if each[0] != "note"]
        assert (path.name, bad) == (path.name, REAL.get(path.name, []))
        assert (reading.job is None) == (path.name == "b2d_template.xml")
        assert all(line > 0 for _, line, _ in found(reading)), path.name
        if reading.job is not None:
            reading.job.check()
            assert reading.job.memory_mb >= 512


# -- anything --------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from(["", "0", "1", "-1", "600", "1e9", "15000", "nan", "{x}", "true", "a", "../a",
                     "a/b", "/a", "sata", "stata", "Theory.vdi", "init_data.xml", "65535", "<b/>",
                     "1</x>", "&lt;", "<!-- -->", "vm_image.vdi", "\u00a0", "\x1b"]),
    st.text(max_size=8))
NAMES = st.sampled_from(sorted(KNOWN | FORWARD | {"vbox_job", "x", "enable_gbac"}))


@st.composite
def elements(draw: st.DrawFn) -> str:
    name = draw(NAMES)
    form = draw(st.sampled_from([
        "<{0}>{1}</{0}>", "<{0}/>", "<{0}>{1}", "<{0}>{1}<{0}>", "{1}", "</{0}>", "<!-- -->", "\n",
        "<port_forward><{0}>{1}</{0}></port_forward>"]))
    return str(form.format(name, draw(VALUES)))


@given(st.lists(elements(), max_size=30))
def test_any_choice_of_real_elements_is_a_job_or_an_error(parts: list[str]) -> None:
    check(f"<vbox_job>{''.join(parts)}</vbox_job>".encode())


@given(st.binary(max_size=300))
def test_any_bytes_are_a_job_or_an_error(data: bytes) -> None:
    check(data)
    check(b"<vbox_job>" + data + b"</vbox_job>")


def check(data: bytes) -> None:
    begun = time.process_time()
    reading = vbox.read(data, NOWHERE)
    assert time.process_time() - begun < 1
    assert (reading.job is None) == any(each.level is Level.ERROR for each in reading.findings)
    for each in reading.findings:
        assert each.code in CODES
        assert each.what.isprintable()
        assert each.instead.isprintable()
    if reading.job is not None:
        for forwarded in reading.job.forwards:
            assert 1 <= forwarded.guest_port <= 65535
            assert 0 <= forwarded.host_port <= 65535
        try:
            reading.job.check()
        except UsageError as error:
            raise AssertionError(data) from error
