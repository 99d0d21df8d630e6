"""Kills at every numbered step of a job, one after the other: of vmjob, of its QEMU, of both.

Steps are numbered as they come in three undisturbed runs: ``first``, from the beginning to the end;
``resumed``, from a checkpoint on; ``stopped``, what follows SIGTERM. A step that comes again in the
same way (each checkpoint is like the one before) has the number of the first.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.campaign.kills import Case, Field, Outcome, Strike

__all__ = ["MODES", "Step", "campaign", "golden", "kept_in", "numbered", "struck"]

MODES = ("self", "hypervisor", "both")
#: The step before which SIGTERM comes.
ENDED_AT = "run agent POST /output"
#: States in which there is no hypervisor to be killed.
WITHOUT_HYPERVISOR = ("image", "ended")
#: What is asked over and over: one of them stands for all.
POLLS = ("agent POST /output", "agent POST /tasks/N/stdin")
#: How often a step that a run did not come to is tried.
TRIES = 3


@dataclass(frozen=True)
class Step:
    """``part``: which run it is of; ``kind`` and ``at`` as in `Plan`."""

    part: str
    kind: str
    at: int

    @property
    def strike(self) -> dict[str, Any]:
        return {"kind": self.kind, "at": self.at, "named": True,
                "ended_at": ENDED_AT if self.part == "stopped" else None}

    def modes(self) -> tuple[str, ...]:
        alone = self.kind.removeprefix("stop ").startswith(WITHOUT_HYPERVISOR)
        return MODES[:1] if alone else MODES


@dataclass
class Row:
    """What came of one step: exit codes, and where the job went on, by mode."""

    codes: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def golden(place: Field, kept: Path) -> None:
    """A slot with two checkpoints (on a busy computer, one), and half of a further one."""
    for at in (8, 8, 8, 5, 5, 5):
        place.clear()
        outcome = place.run(Strike("checkpoint rename", at, "self"))
        if outcome.reached and place.newest() is not None:
            shutil.copytree(place.slot, kept, copy_function=_linked)
            return
    raise RuntimeError(f"no checkpoint to begin with: {outcome.stderr}")


def kept_in(place: Field, kept: Path) -> None:
    """Put the golden slot there. What was written to is copied, the rest never changes."""
    shutil.copytree(kept, place.slot, copy_function=_linked)
    job = place.slot / "job.json"
    job.write_text(job.read_text().replace(str(kept.parent), str(place.place)))


def _linked(source: str, target: str) -> None:
    if "/checkpoints/" in source and not source.endswith("verified"):
        os.link(source, target)
    else:
        shutil.copy(source, target)


def numbered(place: Field, kept: Path) -> list[Step]:
    """All steps, in their order."""
    place.clear()
    first = place.run(named=True)
    place.clear()
    kept_in(place, kept)
    resumed = place.run(named=True)
    place.clear()
    kept_in(place, kept)
    stopped = place.run(named=True, ended_at=ENDED_AT)
    if (first.code, resumed.code, stopped.code) != (0, 0, 143):
        raise RuntimeError(f"an undisturbed run fails: {first} {resumed} {stopped}")
    known = list(_steps("first", first))
    # The end of a job is the same, from wherever it began.
    known += [step for step in _steps("resumed", resumed)
              if not step.kind.startswith(("outputs", "end"))]
    return known + [step for step in _steps("stopped", stopped) if step.kind.startswith("stop ")]


def _steps(part: str, outcome: Outcome) -> Iterator[Step]:
    counts: Counter[str] = Counter()
    visits: dict[str, int] = {}
    for event in outcome.events:
        if (kind := event.get("step")) is None:
            continue
        counts[kind] += 1
        if visits.setdefault(kind, event["visit"]) != event["visit"]:
            continue
        if not kind.endswith(POLLS) or counts[kind] == 1:
            yield Step(part, kind, counts[kind])


def struck(place: Field, kept: Path, step: Step, mode: str) -> Case:
    """A job that is killed at a step and continued; tried again when the step did not come."""
    def prepare() -> None:
        if step.part != "first":
            kept_in(place, kept)

    for _ in range(TRIES):
        case = place.case(iter([Strike(mode=mode, **step.strike)]), prepare)
        if case.wrong or case.runs[0].reached:
            break
    return case


def campaign(fields: list[Field], kept: Path, steps: list[Step]) -> dict[str, Any]:
    """Every step in each of its modes; what came of it."""
    began = time.monotonic()
    rows = [Row() for _ in steps]
    work = iter([(number, mode) for number, step in enumerate(steps) for mode in step.modes()])
    turn = threading.Lock()

    def go_through(place: Field) -> None:
        while True:
            with turn:
                number, mode = next(work, (None, ""))
            if number is None:
                return
            case = struck(place, kept, steps[number], mode)
            with turn:
                rows[number].codes[mode] = _came_of(case)
                rows[number].wrong += case.wrong
                for each in case.wrong:
                    print(f"WRONG: {steps[number]} {mode}: {each}",  # noqa: T201
                          file=sys.stderr, flush=True)

    with ThreadPoolExecutor(len(fields)) as pool:
        for each in pool.map(go_through, fields):
            assert each is None
    told = [word for row in rows for word in row.codes.values()]
    return {"steps": [{"number": number, "part": step.part, "step": step.kind, "at": step.at,
                       **row.codes} for number, (step, row) in
                      enumerate(zip(steps, rows, strict=True), 1)],
            "strikes": sum(not word.startswith("not reached") for word in told),
            "not_reached": sum(word.startswith("not reached") for word in told),
            "wrong": [each for row in rows for each in row.wrong],
            "seconds": round(time.monotonic() - began, 1)}


def _came_of(case: Case) -> str:
    """The exit code of the run that was struck, and what the next one did."""
    first = case.runs[0]
    if not first.reached:
        return f"not reached ({first.code})"
    if len(case.runs) == 1:
        return f"{first.code}, ended"
    used = case.runs[1].told("continues")
    phases = case.runs[1].told("phase")
    return f"{first.code}, " + (f"from {used[-1]}" if used else "anew" if phases else "was over")
