"""The job.xml of VMwrapper.py, as its page of 2009 describes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.job.codes import CODES
from vmjob.job.files import Input, Output
from vmjob.job.languages import read_bytes
from vmjob.job.model import Job, Task
from vmjob.job.reading import Level, Reading, Surroundings
from vmjob.job.vmwrapper import ELEMENTS, read

ROOT = Path(__file__).parents[3]
NOWHERE = Surroundings(Path("/nowhere/slot"))

#: The worker example of the page, its slot's links as its table and templates have them.
EXAMPLE = """\
<job_desc>
    <unzip_task>
        <application>tar</application>
        <command_line>-xf ./cctools-2_5_2-i686-linux-2.6.tar</command_line>
        <stdout_filename>stdout_tar</stdout_filename>
        <stderr_filename>stderr_tar</stderr_filename>
    </unzip_task>
    <unzip_task>
        <application>tar</application>
        <command_line>-xf ./apache-activemq-5.2.0.tar</command_line>
        <stdout_filename>stdout_tar</stdout_filename>
        <stderr_filename>stderr_tar</stderr_filename>
    </unzip_task>
    <unzip_task>
        <application>tar</application>
        <command_line>-xf ./boincvm.tar</command_line>
    </unzip_task>
    <VMmanage_task>
        <application>./apache-activemq-5.2.0/bin/activemq</application>
        <stdin_filename></stdin_filename>
        <stdout_filename>stdout_broker</stdout_filename>
        <stderr_filename>stderr_broker</stderr_filename>
        <command_line></command_line>
    </VMmanage_task>
    <VMmanage_task>
        <application>python</application>
        <stdin_filename></stdin_filename>
        <stdout_filename>stdout_HostMain</stdout_filename>
        <stderr_filename>stderr_HostMain</stderr_filename>
        <command_line>./boincvm/HostMain.py ./boincvm/HostConfig.cfg</command_line>
    </VMmanage_task>
    <task>
        <virtualmachine>CernVM</virtualmachine>
        <image></image>
        <app_pathVM></app_pathVM>
        <application>./worker.py</application>
        <copy_app_to_VM>1</copy_app_to_VM>
        <copy_file_to_VM>in</copy_file_to_VM>
        <copy_file_to_VM>stdin_worker</copy_file_to_VM>
        <stdin_filename>stdin_worker</stdin_filename>
        <stdout_filename>stdout_worker</stdout_filename>
        <stderr_filename>stderr_worker</stderr_filename>
        <copy_file_from_VM>out</copy_file_from_VM>
        <command_line>5</command_line>
        <weight>2</weight>
    </task>
</job_desc>
"""
ONE = "<task><virtualmachine>V</virtualmachine>"
LINKS = {
    "job.xml": "job_1.12.xml", "stdin": "stdin", "stdout": "worker_nodelete_1",
    "stderr": "worker_nodelete_2", "worker.py": "worker_1.13_i686-pc-linux-gnu.py",
    "VMwrapper_1.13_i686-pc-linux-gnu.py": "VMwrapper_1.13_i686-pc-linux-gnu.py",
    "boincvm.tar": "boincvm_0.01.tar", "apache-activemq-5.2.0.tar": "apache-activemq-5.2.0.tar",
    "cctools-2_5_2-i686-linux-2.6.tar": "cctools-2_5_2-i686-linux-2.6.tar"}


@pytest.fixture
def slot(tmp_path: Path) -> Surroundings:
    """A slot with the links of the example, and its project."""
    directory, project = tmp_path / "slots" / "0", tmp_path / "projects" / "example.org_worker"
    directory.mkdir(parents=True)
    project.mkdir(parents=True)
    (directory / "in").write_text("copied, as <copy_file/> says\n")
    for name, physical in LINKS.items():
        (directory / name).write_text(
            f"<soft_link>../../projects/example.org_worker/{physical}</soft_link>\n")
        if name not in {"stdout", "stderr"}:
            (project / physical).write_text(f"{name}\n")
    (project / LINKS["worker.py"]).chmod(0o755)
    return Surroundings(directory, project)


def reading(content: str, where: Surroundings = NOWHERE) -> Reading:
    found = read(f"<job_desc>\n{content}\n</job_desc>".encode(), where)
    assert {one.code for one in found.findings} <= CODES.keys()
    return found


def job(content: str, where: Surroundings = NOWHERE) -> Job:
    found = reading(content, where)
    assert found.job is not None, found.findings
    return found.job


def codes(content: str, where: Surroundings = NOWHERE) -> list[tuple[str, str]]:
    """What is said of one task with this in it."""
    found = reading("<task><virtualmachine>V</virtualmachine><application>tool</application>"
                    f"{content}</task>", where)
    return [(one.level.value, one.code) for one in found.findings
            if one.code != "machines-program"]


def test_the_worker_example_gives_its_three_outputs(slot: Surroundings) -> None:
    found = read_bytes(EXAMPLE.encode(), slot)
    assert found.language == "vmwrapper"
    assert found.job is not None
    project = slot.project
    assert project is not None
    assert found.job.tasks == (
        *(Task(("tar", "-xf", f"./{name}"), stdout=stream and f"stdout{stream}",
               stderr=stream and f"stderr{stream}", weight=0, time_limit=60, may_fail=True)
          for name, stream in (("cctools-2_5_2-i686-linux-2.6.tar", "_tar"),
                               ("apache-activemq-5.2.0.tar", "_tar"), ("boincvm.tar", None))),
        Task(("./worker.py", "5"), stdin="stdin_worker", stdout="stdout_worker",
             stderr="stderr_worker", weight=2))
    assert set(found.job.outputs) == {
        Output("out", slot.directory / "out"),
        Output("stdout_worker", project / LINKS["stdout"]),
        Output("stderr_worker", project / LINKS["stderr"])}
    assert Input(slot.directory / "in", "in") in found.job.inputs
    assert Input(project / "stdin", "stdin_worker") in found.job.inputs
    assert Input(project / LINKS["worker.py"], "worker.py") in found.job.inputs
    assert Input(project / "boincvm_0.01.tar", "boincvm.tar") in found.job.inputs
    assert found.job.image == "default"
    assert not found.job.folders
    found.job.check()
    said = [(one.level.value, one.code) for one in found.findings]
    assert said.count(("note", "superseded")) == 2
    assert said.count(("warning", "stream-name")) == 3
    assert not any(level == "error" for level, _ in said)


def test_the_arguments_of_the_wrapper_follow_those_of_each_task() -> None:
    where = Surroundings(NOWHERE.directory, arguments=("--seed", "7"))
    one = "<task><virtualmachine>V</virtualmachine><application>/bin/a</application>"
    found = job(f"{one}<command_line>x</command_line></task>{one}</task>", where)
    assert [task.argv for task in found.tasks] == [
        ("/bin/a", "x", "--seed", "7"), ("/bin/a", "--seed", "7")]


def test_a_word_with_a_dot_and_a_slash_is_a_logical_name(slot: Surroundings) -> None:
    found = job("<task><virtualmachine>V</virtualmachine><application>cat</application>"
                "<command_line>./stdin ./not-here ./../x</command_line></task>", slot)
    assert slot.project is not None
    assert found.inputs == (Input(slot.project / "stdin", "stdin"),)
    assert found.tasks[0].argv == ("cat", "./stdin", "./not-here", "./../x")


def test_a_program_that_is_not_copied_is_the_machines() -> None:
    found = job("<task><virtualmachine>V</virtualmachine><application>awk</application>"
                "<copy_app_to_VM>0</copy_app_to_VM></task>")
    assert (found.tasks[0].argv, found.inputs) == (("awk",), ())


def test_a_program_that_lost_its_mode_gets_it_back(slot: Surroundings) -> None:
    assert slot.project is not None
    (slot.project / LINKS["worker.py"]).chmod(0o644)
    found = job("<task><virtualmachine>V</virtualmachine><application>worker.py</application>"
                "<copy_app_to_VM>1</copy_app_to_VM><command_line>5</command_line></task>", slot)
    assert found.tasks[0].argv[:2] == ("/bin/sh", "-c")
    assert found.tasks[0].argv[3:] == ("./worker.py", "5")
    assert found.tasks[0].title == "worker.py"


def test_stdin_goes_in_when_asked_for_and_when_forgotten(slot: Surroundings) -> None:
    asked = "<stdin_filename>stdin</stdin_filename><copy_stdin_to_VM>1</copy_stdin_to_VM>"
    assert codes(asked, slot) == []
    assert codes("<stdin_filename>stdin</stdin_filename>", slot) == [("note", "stdin-copied")]
    assert codes("<stdin_filename>gone</stdin_filename>", slot) == []


def test_a_task_for_the_computer_runs_in_the_machine_with_the_slot_around_it(
        slot: Surroundings) -> None:
    found = read(b"<job_desc><unzip_task><application>tar</application></unzip_task><task>"
                 b"<application>./worker.py</application><stdout_filename>stdout_worker"
                 b"</stdout_filename></task></job_desc>", slot)
    assert found.job is not None
    assert [folder.name for folder in found.job.folders] == ["job"]
    assert (found.job.inputs, found.job.outputs) == ((), ())
    assert found.job.tasks[1] == Task(("./worker.py",), stdout="stdout")
    assert [one.code for one in found.findings].count("in-machine") == 2


@pytest.mark.parametrize(("content", "expected"), [
    ("<image>science</image>", []),
    ("<image>My Image.vdi</image>", [("note", "own-image")]),
    ("<image>in</image>", [("note", "own-image")]),
    ("<app_pathVM>/x</app_pathVM>", [("note", "not-needed")]),
    ("<copy_file_to_VM>gone</copy_file_to_VM>", [("note", "input-missing")]),
    ("<copy_file_to_VM>../x</copy_file_to_VM>", [("error", "bad-path")]),
    ("<weight>x</weight>", [("error", "not-a-number")]),
    ("<waight>1</waight>", [("warning", "unknown-element")]),
    ("<command_line>a*</command_line>", [("note", "no-shell")]),
    ("<copy_file_to_VM></copy_file_to_VM><weight></weight><checkpoint_filename/>", []),
    ("<stdout_filename>o</stdout_filename><stderr_filename>o</stderr_filename>",
     [("warning", "stream-name")]),
    ("<copy_file_from_VM>stdout</copy_file_from_VM><stdout_filename>x</stdout_filename>",
     [("warning", "stream-name"), ("error", "two-outputs")]),
])
def test_what_is_odd_in_a_task_is_told(slot: Surroundings, content: str,
                                       expected: list[tuple[str, str]]) -> None:
    assert codes(content, slot) == expected


def test_a_link_out_of_the_slot_is_refused(slot: Surroundings) -> None:
    (slot.directory / "evil").write_text("<soft_link>../../../etc/shadow</soft_link>")
    for element in ("copy_file_to_VM", "copy_file_from_VM", "stdin_filename", "stdout_filename"):
        assert ("error", "bad-link") in codes(f"<{element}>evil</{element}>", slot)


def test_the_image_is_that_of_the_first_task_that_names_one() -> None:
    one = ("<task><virtualmachine>V</virtualmachine><application>/a</application>"
           "<image>{}</image></task>")
    found = reading(one.format("") + one.format("science") + one.format("other"))
    assert found.job is not None
    assert found.job.image == "science"
    assert ("warning", "several-images") in [(one.level.value, one.code) for one in found.findings]


def test_what_cannot_be_a_job_is_told() -> None:
    for content, code in (("<unzip_task><application>tar</application></unzip_task>", "no-task"),
                          (f"{ONE}</task>", "incomplete"),
                          (f"{ONE}<application>a.exe</application></task>", "windows-program")):
        found = reading(content)
        assert found.job is None
        assert code in {one.code for one in found.findings}


PIECES = [*(f"<{name}>" for name in sorted(ELEMENTS)), *(f"</{name}>" for name in sorted(ELEMENTS)),
          "<task>", "</task>", "<unzip_task>", "</unzip_task>", "<VMmanage_task>",
          "</VMmanage_task>", "x", "./x", "1", "../y", "{a}", "a.exe", "in", "stdin", " ", "&#1;",
          "<!-- -->", "/x", "''"]


@given(st.one_of(st.binary(max_size=200),
                 st.lists(st.sampled_from(PIECES), max_size=60).map(
                     lambda pieces: ("<job_desc>" + "".join(pieces) + "</job_desc>").encode())),
       st.booleans())
def test_no_file_crashes_the_reader(data: bytes, closed: bool) -> None:
    found = read(data if closed else data[:-7], NOWHERE)
    assert (found.job is None) == any(one.level is Level.ERROR for one in found.findings)
    assert {one.code for one in found.findings} <= CODES.keys()
    assert all((one.what + one.instead).isprintable() for one in found.findings)


@pytest.mark.skipif(not os.environ.get("VMJOB_TEST_INPUTS"), reason="needs real files")
def test_real_files_read_as_the_example_does() -> None:
    files = sorted(Path(os.environ["VMJOB_TEST_INPUTS"], "job_vmwrapper").glob("*.xml"))
    assert files
    for file in files:
        found = read_bytes(file.read_bytes(), NOWHERE)
        assert found.language == "vmwrapper"
        assert found.job == read_bytes(EXAMPLE.encode(), NOWHERE).job, file.name
        assert {one.level for one in found.findings} == {Level.NOTE}, file.name


def test_every_element_is_on_the_page() -> None:
    page = (ROOT / "docs" / "reference" / "job-xml.md").read_text()
    for name in ELEMENTS:
        assert f"`{name}`" in page, name
