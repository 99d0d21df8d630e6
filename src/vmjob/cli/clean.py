"""``vmjob clean``: remove what killed processes left behind."""

from __future__ import annotations

import click

from vmjob.cli.main import print_json
from vmjob.engine.ownership import leftovers, sweep
from vmjob.engine.templates import TemplateStore
from vmjob.home import Home
from vmjob.image.store import ImageStore
from vmjob.keeper import slots

__all__ = ["clean"]


@click.command()
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--templates", is_flag=True,
              help="Remove all frozen machines; the next start of each kind makes a new one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def clean(dry_run: bool, templates: bool, as_json: bool) -> None:
    """Remove what killed processes left behind, and frozen machines of images that are gone.

    Every `vmjob run` does the first by itself when it starts. What belongs to a living process,
    to another user or to another VMJOB_HOME is never touched. Of machines (`vmjob machine`), what
    dead keepers left is removed, checkpoints never.
    """
    home = Home()
    found = list(leftovers(home)) if dry_run else sweep(home)
    left = list(slots.leftovers(home)) if dry_run else slots.sweep(home)
    store = TemplateStore(home)
    broken = store.unreadable()
    if not dry_run:
        store.sweep()
        ImageStore(home).sweep()
        broken = store.remove_unreadable()
    images = {image.digest for image in ImageStore(home).list()}
    old = [each for each in store.all() if templates or each.manifest.image not in images]
    removed = [each for each in old if dry_run or store.remove(each.key)]
    if as_json:
        print_json({"home": str(home.root), "removed": not dry_run,
                    "machines": [each.id for each in found],
                    "slots": [str(each.relative_to(home.slots)) for each in left],
                    "templates": [*(each.key for each in removed),
                                  *(each.name for each in broken)],
                    "templates_in_use": [each.key for each in old if each not in removed]})
        return
    # What dead owners' VirtualBox has in /tmp: nothing that anybody misses, so it is not told.
    if not dry_run:
        from vmjob.machine.virtualbox.service import sweep_orphans

        sweep_orphans()
    gone = [*(each.directory for each in found), *left, *(each.directory for each in removed),
            *broken]
    for directory in gone:
        click.echo(f"{'would remove' if dry_run else 'removed'} {directory}")
    for each in old:
        if each not in removed:
            click.echo(f"in use, kept: {each.directory}")
    if not found and not left and not old and not broken:
        click.echo("Nothing was left behind.")
