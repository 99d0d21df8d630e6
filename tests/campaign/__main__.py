"""``script/campaign kills``, ``long``, ``power``, ``steps`` and ``throttle``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tests.campaign import kills as killing
from tests.campaign import power as cutting
from tests.campaign import steps as stepping
from tests.campaign import throttle as throttling
from tests.campaign.long import survive
from tests.conftest import lend
from vmjob.home import Home, remove_tree
from vmjob.image.recipe import Recipe
from vmjob.image.store import ImageStore


@contextlib.contextmanager
def _fields(jobs: int) -> Iterator[tuple[Path, list[killing.Field]]]:
    """A place of its own for each of so many jobs at a time, with the default image; then gone."""
    store = ImageStore(Home())
    recipe = Recipe()
    image = store.current(recipe) or store.build(recipe, lambda fraction, text: None)
    place = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        fields = []
        for number in range(jobs):
            below = place / f"{number}"
            below.mkdir()
            home = Home(below / "home")
            lend(image, home)
            fields.append(killing.Field(below, home))
        yield place, fields
    finally:
        remove_tree(place)


@click.group()
def main() -> None:
    """Crash vmjob by the hundred and look at what becomes of its jobs."""


@main.command()
@click.option("--count", default=100, show_default=True, help="Kills and signals.")
@click.option("--seed", type=int, help="The same seed strikes at the same steps.")
@click.option("--jobs", default=2, show_default=True, help="Jobs at a time.")
@click.option("--minutes", type=float, help="End earlier, after so many minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def kills(count: int, seed: int | None, jobs: int, minutes: float | None, as_json: bool) -> None:
    """Kill real jobs at random steps, continue them, compare every byte."""
    with _fields(jobs) as (_, fields):
        found = killing.campaign(fields, count, _seed(seed), minutes and minutes * 60)
    if as_json:
        _print(json.dumps(found, indent=1))
    else:
        _print(f"{'step':28} {'struck':>6} {'wrong':>6} {'seconds':>8}  codes")
        for kind, row in found["steps"].items():
            codes = ", ".join(f"{code}: {n}" for code, n in row["codes"].items())
            _print(f"{kind:28} {row['strikes']:6} {row['wrong']:6} {row['seconds']:8.1f}  {codes}")
        modes = ", ".join(f"{mode} {n}" for mode, n in found["modes"].items())
        _print(f"struck {found['strikes']} times ({modes}) in {found['jobs']} jobs, "
               f"{found['runs']} runs, of which {found['continued']} went on from a checkpoint; "
               f"{found['checkpoints']} checkpoints")
        _print(f"wrong answers {found['wrong_answers']}, leftovers {found['leftovers']}, anything "
               f"else wrong {len(found['wrong'])}; {found['seconds']:.0f} seconds, an undisturbed "
               f"job takes {found['undisturbed_seconds']:.1f}; seed {found['seed']}")
        for each in found["wrong"]:
            _print(f"WRONG: {each}")
    sys.exit(1 if found["wrong"] else 0)


@main.command()
@click.option("--jobs", default=2, show_default=True, help="Jobs at a time.")
@click.option("--only", default="", help="Only steps whose name has this in it.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def steps(jobs: int, only: str, as_json: bool) -> None:
    """Kill vmjob, QEMU and both at every step there is, one after the other."""
    with _fields(jobs) as (place, fields):
        kept = place / "0" / "golden"
        stepping.golden(fields[0], kept)
        known = stepping.numbered(fields[0], kept)
        found = stepping.campaign(fields, kept, [each for each in known if only in each.kind])
    if as_json:
        _print(json.dumps(found, indent=1))
    else:
        _print(f"{'no':>4} {'run':8} {'step':52} {'vmjob killed':16} {'QEMU killed':16} both")
        for row in found["steps"]:
            name = f"{row['step']} ({row['at']})" if row["at"] > 1 else row["step"]
            _print(f"{row['number']:4} {row['part']:8} {name:52} {row['self']:16} "
                   f"{row.get('hypervisor', '-'):16} {row.get('both', '-')}")
        _print(f"{len(found['steps'])} steps, {found['strikes']} strikes, "
               f"{found['not_reached']} not reached, wrong {len(found['wrong'])}; "
               f"{found['seconds']:.0f} seconds")
        for each in found["wrong"]:
            _print(f"WRONG: {each}")
    sys.exit(1 if found["wrong"] else 0)


@main.command()
@click.option("--minutes", default=10.0, show_default=True, help="Length of the job.")
@click.option("--count", default=100, show_default=True, help="Mishaps.")
@click.option("--seed", type=int, help="The same seed chooses the same mishaps.")
def long(minutes: float, count: int, seed: int | None) -> None:
    """Let mishaps of all kinds happen to one long job, and compare its answer."""
    store = ImageStore(Home())
    store.current(Recipe()) or store.build(Recipe(), lambda fraction, text: None)
    place = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        found = survive(Home(), place, minutes, count, _seed(seed))
    finally:
        remove_tree(place)
    _print(json.dumps(found, indent=1))
    sys.exit(0 if found["right"] and not found["processes"] else 1)


@main.command()
@click.option("--count", default=10000, show_default=True, help="Power cuts.")
@click.option("--seed", type=int, help="The same seed cuts at the same moments.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def power(count: int, seed: int | None, as_json: bool) -> None:
    """Cut the power in simulation, and look for a generation in what is left."""
    found: dict[str, Any] = cutting.campaign(count, _seed(seed))
    if as_json:
        _print(json.dumps(found, indent=1))
    else:
        for what, times in found["found"].items():
            _print(f"{times:8}  {what}")
        _print(f"{found['cuts']} power cuts, {len(found['broken'])} broken promises, "
               f"{found['seconds']:.0f} seconds; seed {found['seed']}")
        for each in found["broken"]:
            _print(f"BROKEN: {each}")
    sys.exit(1 if found["broken"] else 0)


@main.command()
@click.option("--minutes", default=2.0, show_default=True, help="How long.")
@click.option("--on", default=1.0, show_default=True, help="Seconds for which the job runs.")
@click.option("--off", default=1.0, show_default=True, help="Seconds for which it stands still.")
def throttle(minutes: float, on: float, off: float) -> None:
    """Suspend and resume a job all the time; look at its clocks, timers, streams and limit."""
    store = ImageStore(Home())
    recipe = Recipe()
    image = store.current(recipe) or store.build(recipe, lambda fraction, text: None)
    place = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        home = Home(place / "home")
        lend(image, home)
        found = asyncio.run(throttling.throttle(home, image, place, minutes, on, off))
    finally:
        remove_tree(place)
    _print(json.dumps(found, indent=1))
    sys.exit(1 if found["wrong"] else 0)


def _seed(given: int | None) -> int:
    return secrets.randbelow(1 << 32) if given is None else given


def _print(text: str) -> None:
    click.echo(text)


if __name__ == "__main__":
    main(prog_name="script/campaign")
