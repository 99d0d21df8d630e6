"""``vmjob job``: job files of any kind."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from vmjob.cli import jobrun
from vmjob.cli.listing import listing
from vmjob.cli.main import fail, print_json
from vmjob.errors import JobFileInvalid, UsageError, VmjobError
from vmjob.job.languages import read_file
from vmjob.job.markup import shown
from vmjob.job.model import Job
from vmjob.job.reading import Finding, Level, Reading, Surroundings

__all__ = ["finding_as_dict", "job", "say_findings"]

EXIT_WARNINGS, EXIT_ERRORS = 1, 2

MIB = 1 << 20

file_argument = click.Path(path_type=Path)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def job() -> None:
    """Run, check, show and convert job files: vbox_job.xml, BOINC's job.xml, TOML."""


job.add_command(jobrun.run)


@job.command()
@click.argument("files", nargs=-1, required=True, type=file_argument, metavar="FILE...")
@as_json_option
def check(files: tuple[Path, ...], as_json: bool) -> None:
    """Say everything that is odd about job files, with file and line.

    \b
    One line for each finding:  FILE:LINE: level: what (write: instead)
      error    there is no job: nothing would run
      warning  probably not what the author meant
      note     done in another way here than elsewhere, not needed here, or good to know

    \b
    Exit code: 0 no errors and no warnings, 1 warnings only, 2 errors.

    Nothing runs. Disk images and init_data.xml are looked for beside the file, and programs that
    go into the machine are searched for instructions whose results differ between processors.
    """
    readings = [(file, _checked(file)) for file in files]
    if as_json:
        print_json({"files": [_as_dict(file, reading) for file, reading in readings]})
    else:
        for file, reading in readings:
            say_findings(file, reading.findings, err=False)
    levels = {finding.level for _, reading in readings for finding in reading.findings}
    sys.exit(EXIT_ERRORS if Level.ERROR in levels
             else EXIT_WARNINGS if Level.WARNING in levels else 0)


@job.command()
@click.argument("file", type=file_argument)
@as_json_option
def show(file: Path, as_json: bool) -> None:
    """Show the job that a job file describes, as vmjob understands it.

    What is odd about the file goes to stderr. Exit code 125 when there is no job in it.
    """
    reading, found = _job_of(file, as_json=as_json)
    if as_json:
        import msgspec

        print_json({"language": reading.language,
                    "job": msgspec.to_builtins(found, enc_hook=str),
                    "findings": list(map(finding_as_dict, reading.findings))})
    else:
        click.echo(f"# {reading.language}: {click.format_filename(file)}")
        click.echo(listing(found))


@job.command()
@click.argument("file", type=file_argument)
@click.option("--to", "language", type=click.Choice(["toml"]), required=True,
              help="The language to write.")
@click.option("-o", "--output", type=file_argument, metavar="OUT",
              help="Write this file instead of stdout; one that is there is not replaced.")
def convert(file: Path, language: str, output: Path | None) -> None:
    """Write a job file of any kind in vmjob's own language.

    It describes the job as vmjob understands it in this place. Paths are relative to where OUT
    is, or to the current directory. What is odd about FILE goes to stderr.

    \b
    Example:
      vmjob job convert job.xml --to toml -o job.toml
    """
    from vmjob.job.toml import dump

    _, found = _job_of(file, as_json=False)
    directory = (output.absolute().parent if output is not None else Path.cwd())
    text = f"# from {shown(file.name)}\n{dump(found, Surroundings(directory))}"
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        with output.open("x", encoding="utf-8") as target:
            target.write(text)
    except OSError as error:
        raise UsageError(f"cannot write {str(output)!r}: {error.strerror}",
                         advice="Give the name of a file that is not there yet.") from None


def _job_of(file: Path, *, as_json: bool) -> tuple[Reading, Job]:
    """Read a file for its job; where it has none, this ends the command."""
    try:
        reading = read_file(file)
    except VmjobError as error:
        fail(error, as_json=as_json)
    if not as_json:
        say_findings(file, reading.findings, err=True)
    if reading.job is None:
        first = next(each for each in reading.findings if each.level is Level.ERROR)
        fail(JobFileInvalid(f"{click.format_filename(file)}:{first.line}: {first.what}",
                            findings=list(map(finding_as_dict, reading.findings))),
             as_json=as_json)
    return reading, reading.job


def _checked(file: Path) -> Reading:
    """What reading a file gives; one that cannot be read is a finding like any other."""
    try:
        reading = read_file(file)
    except VmjobError as error:
        finding = Finding(Level.ERROR, 0, error.code, error.message)
        return Reading("", (finding,), None)
    if reading.job is None:
        return reading
    from vmjob.job import programs

    here = _memory_here(reading.job) + programs.findings(reading.job)
    return dataclasses.replace(reading, findings=reading.findings + here) if here else reading


def _memory_here(job: Job) -> tuple[Finding, ...]:
    from vmjob.host.facts import memory

    if job.memory_mb * MIB <= (total := memory().total):
        return ()
    return (Finding(Level.WARNING, 0, "memory-here",
                    f"the job wants {job.memory_mb} MiB of memory; "
                    f"this computer has {total // MIB}"),)


def say_findings(file: Path, findings: Iterable[Finding], *, err: bool) -> None:
    """Each finding on a line, for people; ``err``: on stderr."""
    for each in findings:
        place = f"{click.format_filename(file)}:{each.line}" if each.line else (
            click.format_filename(file))
        # Advice that is a sentence says by itself what to do.
        hint = each.instead if each.instead.endswith((".", "?")) else f"write: {each.instead}"
        instead = f" ({hint})" if each.instead else ""
        click.echo(f"{place}: {each.level.value}: {each.what}{instead}", err=err)


def _as_dict(file: Path, reading: Reading) -> dict[str, Any]:
    return {"file": click.format_filename(file), "language": reading.language,
            "is_job": reading.job is not None,
            "findings": list(map(finding_as_dict, reading.findings))}


def finding_as_dict(finding: Finding) -> dict[str, Any]:
    """The form that ``--json`` prints."""
    return {**dataclasses.asdict(finding), "level": finding.level.value}
