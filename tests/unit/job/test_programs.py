"""`vmjob job check` names the programs whose answers differ between makers of processors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.deep_tree import deepen
from tests.unit.job.elf_files import elf, with_one
from vmjob.cli.job import job
from vmjob.home import remove_tree
from vmjob.job import elf as elf_reader
from vmjob.job import programs
from vmjob.job.files import Folder, Input
from vmjob.job.model import Job, Task
from vmjob.job.reading import Level

SINE = elf(with_one(b"\xd9\xfe"))
ROOTS = elf(with_one(b"\xf3\x0f\x52\xc1") + with_one(b"\xf3\x0f\x53\xc1"))
NEW_ROOTS = elf(with_one(b"\xc5\xfc\x52\xc1"))
PLAIN = elf(with_one(b"\x90"))
VBOX = "<vbox_job><memory_size_mb>512</memory_size_mb><enable_shared_directory/></vbox_job>"
WRAPPER = "<job_desc><task><application>worker</application></task></job_desc>"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "slots" / "0"
    directory.mkdir(parents=True)
    monkeypatch.chdir(directory)
    return directory


def check(name: str, text: str) -> list[dict[str, object]]:
    """What is said of programs."""
    Path(name).write_text(text)
    result = CliRunner().invoke(job, ["check", "--json", name])
    found = json.loads(result.stdout)["files"][0]["findings"]
    return [each for each in found if each["code"] in {"processors-differ", "not-searched"}]


def of(*inputs: str, **more: object) -> Job:
    return Job((Task(("true",)),), inputs=tuple(Input(Path(name), "x") for name in inputs),
               **more)  # type: ignore[arg-type]


def names(found: tuple[programs.Finding, ...]) -> list[tuple[str, str]]:
    return [(each.code, each.what.partition(" has ")[2].partition(":")[0]) for each in found]


def test_a_program_with_such_instructions_is_named_with_what_to_do() -> None:
    Path("sums").write_bytes(ROOTS)
    Path("plain").write_bytes(PLAIN)
    Path("job.toml").write_text('run = "./sums"\ninputs = ["sums", "plain"]\n')
    result = CliRunner().invoke(job, ["check", "job.toml"])
    assert (result.exit_code, len(result.output.splitlines())) == (0, 1)
    assert result.output.startswith("job.toml: note: ")
    assert "sums' has rcpss, rsqrtss: what these give differs between makers" in result.output
    assert "homogeneous redundancy" in result.output
    assert "docs/explanation/processors.md" in result.output


def test_json_has_the_code_and_the_instructions() -> None:
    Path("wave").write_bytes(SINE)
    found, = check("job.toml", 'run = "./wave"\ninputs = ["wave"]\n')
    assert (found["level"], found["line"], found["code"]) == ("note", 0, "processors-differ")
    assert "wave' has fsin: " in str(found["what"])


def test_the_program_of_a_shared_folder_is_looked_into() -> None:
    Path("shared").mkdir()
    Path("shared/boinc_app").write_bytes(SINE)
    assert len(check("vbox_job.xml", VBOX)) == 1
    Path("shared/boinc_app").write_text("#!/bin/sh\n")
    assert check("vbox_job.xml", VBOX) == []


def test_a_link_of_boincs_is_followed_to_the_program(here: Path) -> None:
    project = here.parents[1] / "projects" / "example.org"
    project.mkdir(parents=True)
    (project / "worker_1").write_bytes(SINE)
    Path("worker").write_text("<soft_link>../../projects/example.org/worker_1</soft_link>\n")
    found, = check("job.xml", WRAPPER)
    assert "worker_1' has fsin" in str(found["what"])


def test_what_the_slot_keeps_to_itself_is_not_looked_into() -> None:
    Path("worker").write_bytes(PLAIN)
    Path("vmjob").mkdir()
    Path("vmjob/left").write_bytes(SINE)
    Path("vmjob_1").write_bytes(SINE)
    assert check("job.xml", WRAPPER) == []


def test_libraries_in_a_directory_are_looked_into_once_each() -> None:
    Path("tree/lib").mkdir(parents=True)
    Path("tree/lib/a.so").write_bytes(SINE)
    os.link("tree/lib/a.so", "tree/lib/b.so")
    Path("tree/lib/c.so").symlink_to("a.so")
    assert names(programs.findings(of("tree", "tree/lib/a.so"))) == [("processors-differ", "fsin")]


def test_instructions_that_baseline_hides_are_told_apart() -> None:
    Path("new").write_bytes(NEW_ROOTS)
    Path("old").write_bytes(SINE)
    hidden, shown = programs.findings(of("new", "old"))
    assert "use --cpu baseline" in hidden.instead
    assert "whatever --cpu says" not in hidden.what
    assert "whatever --cpu says" in shown.what
    assert names(programs.findings(of("new", "old", cpu="baseline"))) == [
        ("processors-differ", "fsin")]


def test_they_are_notes_which_fail_no_check() -> None:
    Path("sums").write_bytes(ROOTS)
    assert {each.level for each in programs.findings(of("sums"))} == {Level.NOTE}


def test_more_than_is_looked_into_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        Path(name).write_bytes(SINE)
    with monkeypatch.context() as patched:
        patched.setattr(elf_reader, "MOST_CODE", 10)
        assert [each.code for each in programs.findings(of("a", "b"))] == ["not-searched"] * 2
    monkeypatch.setattr(programs, "MOST_FILES", 2)
    found = programs.findings(of("a", "b", "c"))
    assert [each.code for each in found] == ["processors-differ"] * 2 + ["not-searched"]
    Path("empty/empty/empty").mkdir(parents=True)
    assert [each.code for each in programs.findings(of("empty"))] == ["not-searched"]
    monkeypatch.setattr(programs, "MOST_SECONDS", -1.0)
    assert [each.code for each in programs.findings(of("a"))] == ["not-searched"]


def test_many_programs_are_counted_not_listed() -> None:
    for number in range(programs.MOST_NAMED + 5):
        Path(f"p{number}").write_bytes(SINE)
    found = programs.findings(of(*(f"p{number}" for number in range(programs.MOST_NAMED + 5))))
    assert len(found) == programs.MOST_NAMED + 1
    assert found[-1].what == "5 more programs have such instructions"


@pytest.mark.timeout(30)
def test_a_pipe_or_a_file_that_is_not_there_is_passed_over() -> None:
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    assert programs.findings(of("pipe", "gone", "loop", "x" * 5000, "a\0b")) == ()
    assert programs.findings(Job((Task(("../a\0b",)), Task(("pipe",)),), folders=(
        Folder("job", Path.cwd(), "", links=True), Folder("gone", Path("gone"), "x")))) == ()


def test_what_is_said_can_be_printed() -> None:
    name = "a\n\x1b[1m\udcff"
    Path(name).write_bytes(SINE)
    found, = programs.findings(of(name))
    assert (found.what + found.instead).isprintable()


def test_a_folder_of_any_depth_is_searched(here: Path) -> None:
    at = here / "deep"
    at.mkdir()
    deepen(at, 1500)
    (at / "program").write_bytes(SINE)
    found = programs.findings(of(folders=(Folder("shared", at, "shared"),)))
    assert ("processors-differ", "fsin") in names(found)
    remove_tree(at)
