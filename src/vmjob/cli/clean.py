"""``vmjob clean``: remove what killed processes left behind."""

from __future__ import annotations

import click

from vmjob.cli.main import print_json
from vmjob.engine.ownership import leftovers, sweep
from vmjob.home import Home

__all__ = ["clean"]


@click.command()
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def clean(dry_run: bool, as_json: bool) -> None:
    """Remove what killed processes left behind.

    Every `vmjob run` does this by itself when it starts. What belongs to a living process, to
    another user or to another VMJOB_HOME is never touched.
    """
    home = Home()
    found = list(leftovers(home)) if dry_run else sweep(home)
    if as_json:
        print_json({"home": str(home.root), "removed": not dry_run,
                    "machines": [each.id for each in found]})
        return
    for each in found:
        click.echo(f"{'would remove' if dry_run else 'removed'} {each.directory}")
    if not found:
        click.echo("Nothing was left behind.")
