"""The job.xml of BOINC's generic wrapper: what becomes of each element, and of each odd file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.job.codes import CODES
from vmjob.job.files import Folder
from vmjob.job.job_desc import NOT_THE_JOBS, words
from vmjob.job.model import Job, Task
from vmjob.job.reading import Finding, Level, Reading, Surroundings
from vmjob.job.wrapper import ELEMENTS, PROJECT, read
from vmjob.job.wrapper_scripts import LIST, LOCAL_FIRST, UNZIP, ZIP, python_pattern

ROOT = Path(__file__).parents[3]
NOWHERE = Surroundings(Path("/nowhere/slot"))


def reading(content: str, where: Surroundings = NOWHERE) -> Reading:
    found = read(f"<job_desc>\n{content}\n</job_desc>".encode(), where)
    assert found.language == "wrapper"
    assert {one.code for one in found.findings} <= CODES.keys()
    return found


def job(content: str, where: Surroundings = NOWHERE) -> Job:
    found = reading(content, where)
    assert found.job is not None, found.findings
    return found.job


def task(content: str, where: Surroundings = NOWHERE) -> Task:
    (one,) = job(f"<task><application>./a</application>{content}</task>", where).tasks
    return one


def said(found: Reading) -> list[tuple[str, str]]:
    return [(one.level.value, one.code) for one in found.findings]


def codes(content: str, where: Surroundings = NOWHERE) -> list[tuple[str, str]]:
    """What is said of one task with this in it."""
    return said(reading(f"<task><application>./a</application>{content}</task>", where))


# -- tasks ------------------------------------------------------------------------------------


def test_each_element_of_a_task_has_its_meaning() -> None:
    assert task("""<command_line>-n 5 "a b"</command_line><exec_dir>sub</exec_dir>
        <setenv>A=1=2</setenv><setenv>B=</setenv><stdin_filename>in</stdin_filename>
        <stdout_filename>out</stdout_filename><stderr_filename>err</stderr_filename>
        <checkpoint_filename>state</checkpoint_filename><weight>2.5</weight>
        <fraction_done_filename>done</fraction_done_filename><time_limit>60</time_limit>
        """) == Task(
            ("/job/a", "-n", "5", "a b"), cwd="sub", env={"A": "1=2", "B": ""}, stdin="in",
            stdout="out", stderr="err", checkpoint_file="state", fraction_file="done", weight=2.5,
            time_limit=60)
    assert task("") == Task(("./a",))


def test_the_slot_goes_in_without_what_is_the_clients_and_comes_back() -> None:
    assert job("<task><application>./a</application></task>").folders == (
        Folder("job", NOWHERE.directory, "", live=False, links=True, without=NOT_THE_JOBS),)
    assert {"init_data.xml", "stderr.txt", "boinc_lockfile", "wrapper_checkpoint.txt",
            "vmjob"} <= set(NOT_THE_JOBS)


@pytest.mark.parametrize(("line", "split"), [
    ("", []), ("  a\tb\nc ", ["a", "b", "c"]), ("'a b' \"c 'd\"", ["a b", "c 'd"]),
    ('-x"a b"', ['-x"a', 'b"']), ('"a"b', ["a", "b"]), ("'never ends", ["never ends"]),
    (r'"a\" b"', ["a\\", "b\""]), ('a "" b', ["a", "", "b"]), ("$(x) `y` *", ["$(x)", "`y`", "*"]),
])
def test_a_command_line_is_split_as_boinc_does(line: str, split: list[str]) -> None:
    assert words(line) == split


@given(st.text(st.sampled_from("ab \t'\"\\"), max_size=40))
def test_splitting_keeps_every_letter_but_blanks_and_quotes(line: str) -> None:
    kept = re.sub(r"[\s'\"]", "", "".join(words(line)))
    assert kept == re.sub(r"[\s'\"]", "", line)


def test_macros_have_their_values_in_the_machine(tmp_path: Path) -> None:
    where = Surroundings(tmp_path, tmp_path / "p", cpus=3)
    found = job("""<task><application>$PROJECT_DIR/bin/a</application>
        <command_line>$PWD/x -j$NTHREADS $PROJECT_DIR $GPU_DEVICE_NUM. boinc_resolve(in)
        </command_line>
        <exec_dir>$PROJECT_DIR/d</exec_dir><setenv>P=$PWD:$NTHREADS</setenv></task>""", where)
    assert found.tasks[0] == Task(
        (f"{PROJECT}/bin/a", "/job/x", "-j3", PROJECT, ".", "/job/in"), cwd=f"{PROJECT}/d",
        env={"P": "/job:3"})
    assert found.cpus == 3
    assert found.folders[1] == Folder("project", tmp_path / "p", PROJECT, live=False,
                                      writable=False)


def test_the_project_goes_in_only_where_it_is_named(tmp_path: Path) -> None:
    where = Surroundings(tmp_path, tmp_path / "p")
    assert len(job("<task><application>./a</application></task>", where).folders) == 1
    assert ("warning", "no-project") in codes("<command_line>$PROJECT_DIR</command_line>")
    assert task("<command_line>$PROJECT_DIR/x</command_line>").argv == ("./a", "/job/x")
    (tmp_path / "project").mkdir()  # as a job is tried without a client
    alone = job("<task><application>$PROJECT_DIR/a</application></task>", Surroundings(tmp_path))
    assert alone.folders[1].source == tmp_path / "project"


def test_a_gpu_is_missed() -> None:
    assert ("warning", "no-gpu") in codes("<command_line>$GPU_DEVICE_NUM</command_line>")


def test_a_program_is_the_jobs_where_it_is_there_else_the_machines(tmp_path: Path) -> None:
    where = Surroundings(tmp_path)
    (tmp_path / "worker").write_text("<soft_link>../../projects/x/worker_1</soft_link>")

    def first(name: str) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
        found = reading(f"<task><application>{name}</application></task>", where)
        assert found.job is not None
        return found.job.tasks[0].argv, said(found)

    assert first("worker") == (("./worker",), [])
    assert first("./echo") == (("./echo",), [])
    assert first("bin/tool") == (("bin/tool",), [])
    assert first("/usr/bin/java") == (("/usr/bin/java",), [("note", "machines-program")])
    assert first("awk") == (("awk",), [("note", "machines-program")])


def test_a_program_that_a_task_may_bring_is_looked_for_when_its_turn_comes(tmp_path: Path) -> None:
    found = reading("<task><application>./a</application></task>"
                    "<task><application>b</application><command_line>x y</command_line></task>")
    assert found.job is not None
    later = found.job.tasks[1]
    assert (later.title, said(found)) == ("b", [("note", "machines-program")])
    (tmp_path / "b").write_text("#!/bin/sh\necho $2 $1\n")
    (tmp_path / "b").chmod(0o755)
    assert subprocess.run(later.argv, cwd=tmp_path, capture_output=True).stdout == b"y x\n"
    machines = ("/bin/sh", "-c", LOCAL_FIRST, "echo", "a  b")
    assert subprocess.run(machines, cwd=tmp_path, capture_output=True).stdout == b"a  b\n"


@pytest.mark.parametrize("name", ["worker.exe", r"C:\x\y", "cmdline.BAT", r"bin\tool", "C:/x",
                                  "$PROJECT_DIR/p/python.exe", "run.ps1"])
def test_a_program_of_windows_is_refused(name: str) -> None:
    found = reading(f"<task>\n<application>{name}</application></task>")
    assert found.job is None
    assert (found.findings[0].line, found.findings[0].code) == (3, "windows-program")


def test_what_a_program_holds_counts_more_than_its_name(tmp_path: Path) -> None:
    where = Surroundings(tmp_path)
    for name, content, fits in (("a.exe", b"\x7fELF", True), ("b.exe", b"#!/bin/sh", True),
                                ("c", b"MZ\x90\0", False), ("d.exe", b"text", False)):
        (tmp_path / name).write_bytes(content)
        found = reading(f"<task><application>{name}</application></task>", where)
        assert (found.job is not None) == fits, name


def test_arguments_of_the_wrapper_reach_the_tasks_that_want_them() -> None:
    where = Surroundings(NOWHERE.directory, arguments=("--x", "a b"))
    assert task("<command_line>1</command_line><append_cmdline_args/>", where).argv == (
        "./a", "1", "--x", "a", "b")
    assert ("warning", "arguments-unused") in codes("<command_line>1</command_line>", where)


def test_a_daemon_is_one_and_the_last_task_is_none() -> None:
    tasks = job("<task><application>./a</application></task>"
                "<task><application>./d</application><daemon/></task>").tasks
    assert [(one.argv, one.daemon) for one in tasks] == [(("./d",), True), (("./a",), False)]
    found = reading("<task><application>./d</application><daemon/></task>")
    assert said(found) == [("error", "no-task")]


def test_weights_that_are_all_zero_count_the_same() -> None:
    block = "<task><application>./a</application><weight>0</weight></task>"
    found = reading(block * 2)
    assert found.job is not None
    assert [one.weight for one in found.job.tasks] == [1, 1]
    assert said(found) == [("warning", "weights-zero")]
    mixed = job(block + "<task><application>./b</application></task>")
    assert [one.weight for one in mixed.tasks] == [0, 1]


@pytest.mark.parametrize(("content", "expected"), [
    ("<priority>3</priority>", ("note", "not-needed")),
    ("<multi_process/>", ("note", "not-needed")),
    ("<forward_slashes/>", ("note", "not-needed")),
    ("<setenv>A=1</setenv>", ("note", "environment-kept")),
    ("<setenv>A</setenv>", ("warning", "no-effect")),
    ("<command_line>*.zip</command_line>", ("note", "no-shell")),
    ("<command_line>boinc_resolve(x</command_line>", ("error", "incomplete")),
    (f"<command_line>{'x' * 5000}</command_line>", ("warning", "long-command")),
    ("<weigth>1</weigth>", ("warning", "unknown-element")),
    ("<weight>1</weight><weight>2</weight>", ("warning", "twice")),
    ("<weight>-1</weight>", ("error", "out-of-range")),
    ("<stdout_filename>../x</stdout_filename>", ("error", "bad-path")),
    ("<time_limit>soon</time_limit>", ("error", "not-a-number")),
])
def test_what_is_odd_in_a_task_is_told(content: str, expected: tuple[str, str]) -> None:
    assert codes(content) == [expected]


@pytest.mark.parametrize(("content", "expected"), [
    ("", ("error", "no-task")),
    ("<task></task><task><application>./a</application></task>", ("error", "incomplete")),
    ("<task><application>./a</application></task><tusk/>", ("warning", "unknown-element")),
    ("<task><application>./a</application></task><enable_graphics_support/>",
     ("note", "not-needed")),
    ("<task><application>./a</application></task></job_desc><job_desc>",
     ("warning", "second-root")),
])
def test_what_is_odd_in_a_file_is_told(content: str, expected: tuple[str, str]) -> None:
    assert expected in said(reading(content))


def test_a_file_that_is_no_job_is_told() -> None:
    found = read(b"<something/>", NOWHERE)
    assert said(found) == [("error", "no-root")]


def test_devices_may_be_streams() -> None:
    assert task("<stdout_filename>/dev/null</stdout_filename>").stdout == "/dev/null"
    assert task("<stdin_filename></stdin_filename>").stdin is None


def test_the_wrappers_own_options_replace_what_is_usual() -> None:
    found = job("<task><application>./a</application></task>",
                Surroundings(NOWHERE.directory, cpus=2, memory_mb=100.5))
    assert (found.cpus, found.memory_mb, found.cpu) == (2, 128, "baseline")


# -- zips -------------------------------------------------------------------------------------

ZIPS = """<task><application>./make</application></task>
<unzip_input><zipfilename>in.zip</zipfilename><zipfilename>more.zip</zipfilename></unzip_input>
<zip_output><zipfilename>out.zip</zipfilename><filename>res_.*</filename>
<filename>README.txt</filename></zip_output>"""


def test_zips_are_unpacked_before_and_packed_after() -> None:
    tasks = job(ZIPS).tasks
    assert [one.title for one in tasks] == ["unzip in.zip", "unzip more.zip", "list of files",
                                            "make", "zip out.zip"]
    assert [one.weight for one in tasks] == [0, 0, 0, 1, 0]
    assert tasks[-1].argv[2:] == (ZIP, "out.zip", "res_.*", "README.txt")


def test_the_zip_holds_what_is_new_and_matches(tmp_path: Path) -> None:
    def run(script: str, *arguments: str) -> None:
        subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, check=True)

    with zipfile.ZipFile(tmp_path / "in.zip", "w") as packed:
        program = zipfile.ZipInfo("bin/tool")
        program.external_attr = 0o100755 << 16
        packed.writestr(program, "#!/bin/sh\n")
        packed.writestr("res_old", "came in")
    run(UNZIP, "in.zip")
    run(UNZIP, "not-there.zip")
    assert not (tmp_path / "in.zip").exists()
    assert os.access(tmp_path / "bin" / "tool", os.X_OK)
    run(LIST)
    (tmp_path / "res_1").write_text("new")
    (tmp_path / "other").write_text("new")
    (tmp_path / "res_d").mkdir()
    (tmp_path / "res_d" / "deep").write_text("new")
    run(ZIP, "out.zip", "res_.*", "^READ")
    with zipfile.ZipFile(tmp_path / "out.zip") as packed:
        assert sorted(packed.namelist()) == ["res_1", "res_d/", "res_d/deep"]
        assert packed.read("res_d/deep") == b"new"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"bin", "res_old", "res_1", "other", "res_d", "out.zip"}


@pytest.mark.parametrize(("pattern", "name", "fits"), [
    ("killerbeez_result_.*", "killerbeez_result_7", True), ("README.txt", "README.txt", True),
    ("out", "routes.txt", True), ("^out$", "routes.txt", False), (r"a\.b", "axb", False),
    (r"\d", "5", False), (r"\d", "d", True), ("a{2}", "aa", False), ("a{2}", "a{2}", True),
    ("[]x]", "]", True), ("[^a-c]", "b", False), ("[^a-c]", "d", True), (r"[\d]", "\\", True),
    ("(a|b)+c", "abc", True), ("[[]", "[", True),
])
def test_patterns_mean_what_they_mean_to_the_wrapper(pattern: str, name: str, fits: bool) -> None:
    assert (re.search(python_pattern(pattern), name) is not None) == fits


@pytest.mark.parametrize("pattern", ["(", "[a", "*a", "a**"])
def test_a_pattern_that_is_none_is_an_error(pattern: str) -> None:
    found = reading(f"<task><application>./a</application></task><zip_output>"
                    f"<zipfilename>o</zipfilename>\n<filename>{pattern}</filename></zip_output>")
    assert ("error", "bad-pattern") in said(found)
    assert found.findings[0].line == 3


def test_a_zip_without_a_name_and_one_of_the_log_are_told() -> None:
    one = "<task><application>./a</application></task>"
    assert said(reading(f"{one}<unzip_input></unzip_input>")) == [("warning", "incomplete")]
    assert said(reading(f"{one}<zip_output><zipfilename>o.zip</zipfilename>"
                        "<filename>stderr.txt</filename></zip_output>")) == [
        ("note", "log-not-zipped")]


# -- any file ---------------------------------------------------------------------------------

PIECES = [*(f"<{name}>" for name in sorted(ELEMENTS)), *(f"</{name}>" for name in sorted(ELEMENTS)),
          "<task>", "</task>", "<unzip_input>", "</unzip_input>", "<zip_output>", "</zip_output>",
          "<zipfilename>", "</zipfilename>", "<filename>", "</filename>", "<daemon/>", "x", "0",
          "[", "(", "a.zip", "$PROJECT_DIR", "boinc_resolve(", ")", "../y", "\\", "'", "{a}", " ",
          "&#1;", "<!-- -->", "A=1", "1e308"]


@given(st.one_of(st.binary(max_size=200),
                 st.lists(st.sampled_from(PIECES), max_size=60).map(
                     lambda pieces: ("<job_desc>" + "".join(pieces) + "</job_desc>").encode())),
       st.booleans())
def test_no_file_crashes_the_reader(data: bytes, closed: bool) -> None:
    found = read(data if closed else data[:-7], NOWHERE)
    assert (found.job is None) == any(one.level is Level.ERROR for one in found.findings)
    assert {one.code for one in found.findings} <= CODES.keys()
    assert all((one.what + one.instead).isprintable() for one in found.findings)
    assert [one.line for one in found.findings] == sorted(one.line for one in found.findings)
    if found.job is not None:
        found.job.check()


#: What is to be said of the files that have something special: their errors, their warnings.
SPECIAL: dict[str, tuple[set[str], set[str]]] = {
    "ddah_autodock_batch.xml": ({"windows-program"}, set()),
    "ddah_autodock_ga10.xml": ({"windows-program"}, set()),
    "ddah_mdrun_openmm.xml": ({"windows-program"}, set()),
    "ddah_projectdir.xml": ({"windows-program"}, {"no-project"}),
    "ddah_seed.xml": ({"windows-program"}, set()),
    "ddah_weight0.xml": ({"windows-program"}, {"second-root"}),
    "eternity_gpu.xml": (set(), {"no-gpu"}),
    "killerbeez_linux.xml": (set(), {"no-project"}),
    "killerbeez_win_old.xml": ({"windows-program"}, {"no-project"}),
}


@pytest.mark.skipif(not os.environ.get("VMJOB_TEST_INPUTS"), reason="needs real files")
def test_real_files_read_as_they_should() -> None:
    files = sorted(Path(os.environ["VMJOB_TEST_INPUTS"], "job_wrapper").glob("*.xml"))
    assert files
    for file in files:
        found = read(file.read_bytes(), NOWHERE)

        def at(level: Level, findings: tuple[Finding, ...] = found.findings) -> set[str]:
            return {one.code for one in findings if one.level is level}

        errors, warned = SPECIAL.get(file.name, (set(), set()))
        assert (at(Level.ERROR), at(Level.WARNING)) == (errors, warned), file.name
        text = file.read_text()
        if found.job is None:
            continue
        assert len([one for one in found.job.tasks if one.weight]) == text.count("<task>")
        if file.name == "boinc_worker_timelimit.xml":
            assert found.job.tasks[0].time_limit == 5
        if file.name == "magphys_many.xml":
            assert {one.stdout for one in found.job.tasks} == {"stdout_file"}
        if file.name == "boinc_echo_zip.xml":
            assert [one.title for one in found.job.tasks] == [
                "unzip in.zip", "list of files", "echo", "zip out.zip"]
        if file.name == "killerbeez_linux.xml":
            assert found.job.tasks[1].argv == ("unpack_killerbeez.sh", "/job/killerbeez.zip",
                                               "/job")


def test_every_element_is_on_the_page() -> None:
    page = (ROOT / "docs" / "reference" / "job-xml.md").read_text()
    for name in ELEMENTS:
        assert f"`{name}`" in page, name
