"""The examples read without a finding, and do what they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

from vmjob.job.languages import read_file
from vmjob.job.model import Job

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted([*ROOT.glob("examples/*/job.toml"), ROOT / "examples/boinc/vmjob.toml"])


def ids(path: Path) -> str:
    return path.parent.name


def example(path: Path) -> Job:
    found = read_file(path)
    assert found.findings == ()
    assert found.job is not None
    return found.job


@pytest.mark.parametrize("path", EXAMPLES, ids=ids)
def test_an_example_reads_without_a_finding(path: Path) -> None:
    example(path).check()


def test_every_example_is_in_the_list_and_no_other() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    listed = re.findall(r"\]\((\w+)/(?:vm)?job\.toml\)", page)
    assert sorted(listed) == sorted(path.parent.name for path in EXAMPLES)
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=ids)
def test_an_example_makes_its_outputs(path: Path, tmp_path: Path) -> None:
    """Its tasks here, without a machine: all but what only a machine gives."""
    job = example(path)
    for given in job.inputs:
        shutil.copy(given.source, tmp_path / given.destination)
    for folder in job.folders:
        shutil.copytree(folder.source, tmp_path / folder.destination)
    daemons = [subprocess.Popen(task.argv, cwd=tmp_path) for task in job.tasks if task.daemon]
    try:
        for task in job.tasks:
            if not task.daemon:
                run_here(task.argv, tmp_path, task.stdin, task.stdout, task.time_limit)
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
    for output in job.outputs:
        assert (tmp_path / output.source).stat().st_size, output.source
    for task in job.tasks:
        if task.fraction_file:
            assert float((tmp_path / task.fraction_file).read_text().split()[-1]) == 1
    for folder in job.folders:
        shared = tmp_path / folder.destination
        assert job.triggers.completion is not None
        assert (shared / job.triggers.completion).read_text().split("\n")[0] == "0"
        assert float((shared / str(job.triggers.fraction_done)).read_text()) == 1


def run_here(argv: tuple[str, ...], directory: Path, stdin: str | None, stdout: str | None,
             time_limit: float | None) -> None:
    # Five seconds of CPU time are for the demonstration; a tenth of one will do.
    argv = tuple("0.1" if word == "5" else word for word in argv)
    with (directory / (stdin or "/dev/null")).open() as source, \
            (directory / (stdout or "/dev/null")).open("a") as target:
        begin = time.monotonic()
        process = subprocess.Popen(argv, cwd=directory, stdin=source, stdout=target)
        limit = min(time_limit or 60, 1.5 if time_limit == 20 else 60)
        try:
            assert process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            assert time_limit, f"{argv} needs more than {time.monotonic() - begin} seconds"
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("path", EXAMPLES, ids=ids)
def test_an_example_names_the_schema_and_fits_it(path: Path) -> None:
    first = path.read_text().split("\n", 1)[0]
    schema = path.parent / first.removeprefix("#:schema ")
    keys = json.loads(schema.read_text())["properties"]
    assert set(tomllib.loads(path.read_text())) <= set(keys)
    assert schema.samefile(ROOT / "docs" / "reference" / "job.schema.json")
