"""`vmjob job convert`: any job file becomes one in TOML that is the same job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vmjob.cli.job import job
from vmjob.job.languages import read_file

WRAPPER = """<job_desc>
<task><application>./a</application><command_line>1 "b c"</command_line></task>
<zip_output><zipfilename>o.zip</zipfilename><filename>r_.*</filename></zip_output>
</job_desc>"""
VBOX = """<vbox_job><memory_size_mb>600</memory_size_mb><enable_shared_directory/>
<completion_trigger_file>done</completion_trigger_file></vbox_job>"""


def convert(*arguments: str) -> Result:
    return CliRunner().invoke(job, ["convert", "--to", "toml", *arguments])


@pytest.mark.parametrize("content", [WRAPPER, VBOX], ids=["wrapper", "vbox"])
def test_what_was_converted_is_the_same_job(content: str, tmp_path: Path) -> None:
    source, made = tmp_path / "job.xml", tmp_path / "other" / "job.toml"
    source.write_text(content)
    made.parent.mkdir()
    assert convert(str(source), "-o", str(made)).exit_code == 0
    assert read_file(made).job == read_file(source).job
    assert read_file(made).language == "toml"
    beside = tmp_path / "beside.toml"
    assert convert(str(source), "-o", str(beside)).exit_code == 0
    assert str(tmp_path) not in beside.read_text()


def test_without_a_file_it_is_printed_for_the_current_directory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.xml").write_text(WRAPPER)
    result = convert("job.xml")
    assert result.stdout.startswith("# from job.xml\n")
    assert 'source = "."' in result.stdout
    Path("job.toml").write_text(result.stdout)
    assert read_file(Path("job.toml")).job == read_file(Path("job.xml")).job


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    source, made = tmp_path / "job.xml", tmp_path / "job.toml"
    source.write_text(WRAPPER)
    made.write_text("mine")
    result = convert(str(source), "-o", str(made))
    assert result.exception is not None
    assert "job.toml" in str(result.exception)
    assert made.read_text() == "mine"


def test_a_file_without_a_job_gives_none(tmp_path: Path) -> None:
    source, made = tmp_path / "job.xml", tmp_path / "job.toml"
    source.write_text("<job_desc>\n</job_desc>")
    assert convert(str(source), "-o", str(made)).exit_code == 125
    assert not made.exists()


@pytest.mark.skipif(not os.environ.get("VMJOB_TEST_INPUTS"), reason="needs real files")
def test_every_real_file_with_a_job_can_be_converted(tmp_path: Path) -> None:
    count = 0
    for source in sorted(Path(os.environ["VMJOB_TEST_INPUTS"]).glob("*job*/*.xml")):
        found = read_file(source)
        if found.job is None:
            continue
        made = tmp_path / f"{count}.toml"
        assert convert(str(source), "-o", str(made)).exit_code == 0, source.name
        assert read_file(made).job == found.job, source.name
        count += 1
    assert count > 10
