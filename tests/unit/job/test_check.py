"""`vmjob job check` and `show`: everything odd about a file, by line, and an exit code for it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from vmjob.cli.job import job
from vmjob.cli.listing import listing
from vmjob.cli.main import cli
from vmjob.errors import InputMissing, InputUnreadable
from vmjob.job import codes, languages
from vmjob.job.files import Folder
from vmjob.job.model import Hardware, Job, Task

GOOD = """<vbox_job>
 <memory_size_mb>512</memory_size_mb>
 <enable_shared_directory/>
</vbox_job>
"""
NOTED = GOOD.replace("</v", "<enable_vm_savestate_usage/></v")
WARNED = GOOD.replace("</v", "<enable_netwrok/></v")
WRONG = GOOD.replace("512", "{memory}")

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "reference" / "job-check.md"


def check(*arguments: str) -> Result:
    return CliRunner().invoke(job, ["check", *arguments])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, content in (("good", GOOD), ("noted", NOTED), ("warned", WARNED), ("wrong", WRONG)):
        Path(f"{name}.xml").write_text(content)
    return tmp_path


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("names", "code"), [
    (["good"], 0), (["noted"], 0), (["good", "noted"], 0), (["warned"], 1), (["wrong"], 2),
    (["warned", "good"], 1), (["wrong", "warned"], 2), (["nothing"], 2)])
def test_the_exit_code_is_that_of_the_worst_finding(names: list[str], code: int) -> None:
    assert check(*(f"{name}.xml" for name in names)).exit_code == code


@pytest.mark.usefixtures("files")
def test_each_finding_is_a_line_with_file_and_line_and_what_to_write() -> None:
    assert check("good.xml").output == ""
    assert check("warned.xml", "wrong.xml", "nothing.xml").output.splitlines() == [
        ("warned.xml:4: warning: <enable_netwrok> is not known, so it sets nothing "
        "(write: <enable_network>)"),
        ("wrong.xml:2: error: <memory_size_mb> holds {memory}: a template that was not filled in "
        "(write: the value itself)"),
        "nothing.xml: error: there is no 'nothing.xml'"]


@pytest.mark.usefixtures("files")
def test_json_has_every_finding_with_its_code() -> None:
    result = check("--json", "good.xml", "warned.xml")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"files": [
        {"file": "good.xml", "language": "vbox_job", "is_job": True, "findings": []},
        {"file": "warned.xml", "language": "vbox_job", "is_job": True, "findings": [
            {"level": "warning", "line": 4, "code": "unknown-element",
             "what": "<enable_netwrok> is not known, so it sets nothing",
             "instead": "<enable_network>"}]}]}


@pytest.mark.usefixtures("files")
def test_more_memory_than_this_computer_has_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.host.facts.memory", lambda: SimpleNamespace(total=512 << 20))
    assert check("good.xml").exit_code == 0
    Path("big.xml").write_text(GOOD.replace("512", "15000"))
    result = check("big.xml")
    assert (result.exit_code, result.output) == (
        1, "big.xml: warning: the job wants 15000 MiB of memory; this computer has 512\n")


@pytest.mark.usefixtures("files")
def test_a_pipe_or_a_directory_is_refused_and_does_not_hang() -> None:
    os.mkfifo("pipe")
    done = subprocess.run([sys.executable, "-m", "vmjob", "job", "check", "pipe", ".", "a\nb"],
                          capture_output=True, text=True, timeout=30)
    assert (done.returncode, len(done.stdout.splitlines())) == (2, 4)
    assert "regular" in done.stdout


@pytest.mark.usefixtures("files")
def test_show_lists_the_job_and_says_what_was_odd_on_the_side() -> None:
    result = CliRunner().invoke(job, ["show", "warned.xml"])
    assert result.exit_code == 0
    assert "memory_mb = 512\n" in result.stdout
    assert "[[tasks]]\nargv = [\"/bin/sh\"" in result.stdout
    assert "warning" in result.stderr
    assert "warning" not in result.stdout


@pytest.mark.usefixtures("files")
def test_show_prints_the_whole_job_as_json() -> None:
    result = CliRunner().invoke(job, ["show", "--json", "noted.xml"])
    content = json.loads(result.stdout)
    assert content["language"] == "vbox_job"
    assert content["job"]["memory_mb"] == 512
    assert content["job"]["folders"][0]["source"].endswith("/shared")
    assert [each["code"] for each in content["findings"]] == ["not-needed"]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_show_of_a_file_without_a_job_names_the_line(options: list[str]) -> None:
    result = CliRunner().invoke(job, ["show", *options, "wrong.xml"])
    assert result.exit_code == 125
    assert "wrong.xml:2: " in result.output
    assert "job-file-invalid" in result.output


def test_a_listing_leaves_out_what_goes_without_saying() -> None:
    made = Job((Task(("a b", '"')),), folders=(Folder("shared", Path("/x"), "/y",
                                                     texts={"k": "v" * 300}),),
               hardware=Hardware(mailbox=b"123"))
    assert listing(made).splitlines() == [
        'image = "default"', "memory_mb = 512", "cpus = 1", 'network = "none"', "", "[[tasks]]",
        'argv = ["a b", "\\""]', "", "[[folders]]", 'name = "shared"', 'source = "/x"',
        'destination = "/y"', 'texts = { "k" = "' + "v" * 200 + '... (300 characters)" }', "",
        "[hardware]", 'mailbox = "(3 bytes)"']


# -- which language --------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "language", "code"), [
    ("<?xml version='1.0'?><!-- --><vbox_job/>", "vbox_job", None),
    ("<input_template/>", "", "no-job"), ("", "", "no-job"), ("hello", "", "no-job"),
    ("<vbox_job", "", "cut-off"), ("\0", "", "not-text")])
def test_the_language_is_seen_from_the_content(tmp_path: Path, content: str, language: str,
                                               code: str | None) -> None:
    path = tmp_path / "job.xml"
    path.write_text(content)
    reading = languages.read_file(path)
    assert reading.language == language
    assert (reading.job is None) == (code is not None)
    assert code is None or code in [each.code for each in reading.findings]


def test_a_file_of_ten_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "job.xml"
    path.write_bytes(b"<vbox_job>" + b" " * 10_000_000)
    assert [each.code for each in languages.read_file(path).findings] == ["too-large"]


def test_a_file_that_cannot_be_read_is_an_error_of_the_request(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        languages.read_file(tmp_path / "nothing")
    with pytest.raises(InputUnreadable):
        languages.read_file(tmp_path)
    with pytest.raises(InputUnreadable):
        languages.read_file(Path("/dev/null"))
    with pytest.raises(InputUnreadable):
        languages.read_file(Path("a\0b"))


# -- the documentation says what the code says -----------------------------------------------


def codes_page() -> str:
    """docs/reference/job-check.md as it follows from the codes: all of it from the table on."""
    text, _, _ = PAGE.read_text().partition("| code |")
    rows = "".join(f"| `{code}` | {what} |\n" for code, what in codes.CODES.items())
    return f"{text}| code | what was found |\n| --- | --- |\n{rows}"


def test_the_page_of_findings_is_that_of_the_codes() -> None:
    """After a change of codes.py: VMJOB_WRITE_DOCS=1 script/test tests/unit/job/test_check.py"""
    if os.environ.get("VMJOB_WRITE_DOCS"):
        PAGE.write_text(codes_page())
    assert PAGE.read_text() == codes_page()


def test_the_codes_are_those_that_the_readers_use() -> None:
    used: set[str] = set()
    for path in [*ROOT.glob("src/vmjob/job/**/*.py"), ROOT / "src/vmjob/cli/job.py"]:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and makes_a_finding(call):
                texts = [each.value for each in call.args if isinstance(each, ast.Constant)
                         and isinstance(each.value, str)]
                used |= set(texts[:1])
    assert used == codes.CODES.keys()
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) for code in codes.CODES)


def makes_a_finding(call: ast.Call) -> bool:
    """Whether a call makes one: it is given a level, or is one of the short cuts of a reader."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name in {"Finding", "_add", "_find", "_give_up", "_refused", "no"} or any(
        isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name)
        and each.value.id == "Level" for each in call.args)


@pytest.mark.parametrize("name", ["check", "show"])
def test_job_commands_are_found_from_the_top(name: str) -> None:
    result = CliRunner().invoke(cli, ["job", name, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
