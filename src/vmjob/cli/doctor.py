"""``vmjob doctor``: what this computer can do, what is wrong, and what to do about it."""

from __future__ import annotations

import sys

import click

from vmjob.cli.main import print_json
from vmjob.host.checkup import Finding

__all__ = ["doctor"]

MARKS = {"ok": "✓", "note": "·", "problem": "✗"}


@click.command()
@click.option("--fresh", is_flag=True, help="Prove the accelerators again, not from the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(fresh: bool, as_json: bool) -> None:
    """Say what this computer can do, what is wrong, and what to do about it.

    Accelerators are proved by booting a small guest, which takes some seconds the first time.
    Exit code 0 only when a plain `vmjob run` can run a job; 1 when not.
    """
    from vmjob.diagnosis import INTERPRETED, INTERPRETER, diagnose
    from vmjob.home import Home

    findings = diagnose(Home(), fresh=fresh)
    able = not any(finding.state == "problem" for finding in findings)
    if as_json:
        print_json({"can_run_jobs": able, "findings": [f.as_dict() for f in findings]})
    else:
        for finding in findings:
            _show(finding)
        click.echo("\n" + ("A job can run here." if able else
                           f"A job can run here only with {INTERPRETED}, slowly."
                           if any(finding.what == INTERPRETER for finding in findings) else
                           "No job can run here yet."))
    sys.exit(0 if able else 1)


def _show(finding: Finding) -> None:
    click.echo(f"{MARKS[finding.state]} {finding.what}: {finding.found}")
    if finding.advice:
        click.echo(f"  → {finding.advice}")
