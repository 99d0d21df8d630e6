"""The documentation says what the code says."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
import pytest

import vmjob
from vmjob.cli.jobrun import run as job_run
from vmjob.cli.main import COMMANDS, cli
from vmjob.cli.run import run
from vmjob.engine.record import Record
from vmjob.errors import VmjobError, all_errors

ROOT = Path(__file__).parents[2]
ERRORS = ROOT / "docs" / "reference" / "errors.md"


def errors_page() -> str:
    """docs/reference/errors.md as it follows from the classes."""
    rows = [f"| `{each.code}` | {each.exit_code} | {'yes' if each.retryable else 'no'} | "
            f"{(each.__doc__ or '').strip().splitlines()[0] if each.__doc__ else ''} | "
            f"{each.standing_advice} |" for each in all_errors() if each is not VmjobError]
    return "\n".join([
        "# Errors", "",
        "Every error has a stable code, says what happened, and gives one line of advice.",
        "\"Retry\": whether the same may work on the same computer later.",
        "Made from `src/vmjob/errors.py`.", "",
        "| code | exit code | retry | what | advice |", "| --- | --- | --- | --- | --- |",
        *rows, ""])


def test_the_page_of_errors_is_that_of_the_classes() -> None:
    """After a change of errors.py: VMJOB_WRITE_DOCS=1 script/test tests/unit/test_docs.py"""
    if os.environ.get("VMJOB_WRITE_DOCS"):
        ERRORS.write_text(errors_page())
    assert ERRORS.read_text() == errors_page()


def test_codes_are_unique_and_advice_is_one_line() -> None:
    found = all_errors()
    assert len({each.code for each in found}) == len(found)
    for each in found:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", each.code)
        assert "\n" not in each.standing_advice
        assert each("x").as_dict()["advice"] == each.standing_advice


@pytest.mark.parametrize("command", [run, job_run], ids=["run", "job run"])
def test_every_option_of_run_is_in_the_reference(command: click.Command) -> None:
    title = {run: "## `vmjob run`", job_run: "## `vmjob job run`"}[command]
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    section = page.partition(f"{title}\n")[2].partition("\n## ")[0]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert all(f"`{name}" in section for name in parameter.opts
                       if name.startswith("--")), parameter.name


@pytest.mark.parametrize("name", ["vbox_job", "job-xml"])
def test_the_tests_that_hold_a_table_are_there(name: str) -> None:
    page = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    files = dict(re.findall(r"^\| `(\w)` \| `(tests/[\w/]+\.py)`", page, re.MULTILINE))
    named = re.findall(r"\b(\w)::(test_\w+)", page)
    assert named
    assert {letter for letter, _ in named} == files.keys()
    for letter, test in named:
        text = (ROOT / files[letter]).read_text()
        assert re.search(rf"^(async )?def {test}\(", text, re.MULTILINE), f"{letter}::{test}"


def test_every_event_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "events.md").read_text()
    for path in ["grid/events.py", "cli/carrying.py"]:
        text = (ROOT / "src" / "vmjob" / path).read_text()
        for event in re.findall(r"\.tell\(\"(\w+)\"", text):
            assert f"| `{event}` |" in page, event


def test_every_field_of_the_record_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "record.md").read_text()
    for field in Record.__struct_fields__:
        assert re.search(rf"^\| .*`{field}(\[\])?`", page, re.MULTILINE), field


def test_every_command_says_what_it_is_for() -> None:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)  # type: ignore[attr-defined]
        assert command.help
        for sub in getattr(command, "commands", {}).values():
            assert sub.help


#: Ours only: what was downloaded lies in directories whose names begin with a dot.
PAGES = sorted(page for place in ROOT.iterdir() if not place.name.startswith(".")
               for page in ([place] if place.suffix == ".md" else place.glob("**/*.md")))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    if ".venv" in page.parts or ".pytest_cache" in page.parts:
        return
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_public_names_are_those_of_the_package() -> None:
    for name in vmjob.__all__:
        assert getattr(vmjob, name).__doc__
    assert set(vmjob.__all__) <= set(dir(vmjob))
    with pytest.raises(AttributeError):
        vmjob.nothing  # noqa: B018


def test_no_module_is_longer_than_six_hundred_lines() -> None:
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        assert len(path.read_text().splitlines()) <= 600, path
