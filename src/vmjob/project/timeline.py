"""The life of jobs under a client as a picture: states, progress, processor time, checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape

from vmjob.project.boinccmd import ClientTask

__all__ = ["Mark", "Sample", "Timeline"]

#: A time's place in the picture.
Position = Callable[[float], float]
#: State -> colour and what the legend says.
STATES = {
    "downloading": ("#9db4c8", "files come"),
    "waiting": ("#d8d8d8", "waits"),
    "running": ("#4c9f70", "runs"),
    "suspended": ("#e3b23c", "stands still"),
    "reporting": ("#5b7db1", "files go, report"),
    "failed": ("#c0504d", "failed"),
    "away": ("#ffffff", "no client"),
}
WIDTH, LEFT, RIGHT, TOP = 960, 64, 24, 44
BAND, CHART, GAP = 24, 96, 64
PROGRESS, PROCESSOR = "#1f4e99", "#b0632b"
#: Seconds without a sample after which there was no client to ask.
AWAY = 2.5
#: Distances of the time axis's labels, seconds; the first that leaves them room is taken.
STEPS = (5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
MOST_LABELS = 14


@dataclass(frozen=True)
class Sample:
    """One task at one time; seconds, ``fraction`` 0 to 1."""

    at: float
    task: str
    state: str
    fraction: float
    cpu: float
    checkpoint_cpu: float


@dataclass(frozen=True)
class Mark:
    """Something that was done from outside."""

    at: float
    text: str


@dataclass
class Timeline:
    """Collects samples and marks, in the order of their times."""

    samples: list[Sample] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def add(self, at: float, tasks: Iterable[ClientTask]) -> None:
        """What the client shows at a time."""
        self.samples += [Sample(at, task.name, state_of(task), task.fraction_done, task.cpu_time,
                                task.checkpoint_cpu_time) for task in tasks]

    def mark(self, at: float, text: str) -> None:
        self.marks.append(Mark(at, text))

    def svg(self) -> str:
        """The picture, a panel for each task."""
        times = [*(each.at for each in self.samples), *(each.at for each in self.marks)]
        begin, end = (min(times), max(times)) if times else (0.0, 1.0)
        span = max(1.0, end - begin)

        def x(at: float) -> float:
            return LEFT + (at - begin) / span * (WIDTH - LEFT - RIGHT)

        names = list(dict.fromkeys(each.task for each in self.samples))
        panel = BAND + CHART + GAP
        height = TOP + max(1, len(names)) * panel + 60
        parts = [(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
                 'font-family="sans-serif" font-size="13">'),
                 f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>']
        for number, name in enumerate(names):
            samples = [each for each in self.samples if each.task == name]
            parts += _panel(samples, TOP + number * panel, x)
        bottom = TOP + max(1, len(names)) * panel - GAP + 20
        parts += self._marks(x, TOP, bottom)
        parts += _axis(span, x, begin, bottom)
        parts += _legend(height - 18)
        return "\n".join((*parts, "</svg>\n"))

    def _marks(self, x: Position, top: float, bottom: float) -> list[str]:
        parts = []
        for number, mark in enumerate(self.marks):
            at = x(mark.at)
            anchor = "end" if at > WIDTH - 150 else "start"
            # Neighbours would lie on each other, so every other one is higher.
            height = top - 8 - 14 * (number % 2)
            parts += [(f'<path d="M{at:.1f} {height + 3}V{bottom:.0f}" stroke="#777" '
                      'stroke-dasharray="4 3"/>'),
                      (f'<text x="{at + (3 if anchor == "start" else -3):.1f}" y="{height}" '
                      f'text-anchor="{anchor}" fill="#333">{escape(mark.text)}</text>')]
        return parts


def state_of(task: ClientTask) -> str:
    """One of `STATES`."""
    if task.state in {"uploading", "uploaded"}:
        return "reporting"
    if task.state in {"compute error", "aborted"}:
        return "failed"
    if task.state != "downloaded":
        return "downloading"
    if task.active == "EXECUTING":
        return "running"
    return "suspended" if task.active == "SUSPENDED" or task.suspended else "waiting"


def _panel(samples: list[Sample], top: float, x: Position) -> list[str]:
    parts = [(f'<text x="{LEFT}" y="{top + BAND + CHART + 48}" fill="#333">'
             f"{escape(samples[0].task)}</text>")]
    chart = top + BAND + 8
    parts.append(f'<rect x="{LEFT}" y="{chart}" width="{WIDTH - LEFT - RIGHT}" height="{CHART}" '
                 'fill="#f6f6f6"/>')
    for before, after in itertools.pairwise(samples):
        state = "away" if after.at - before.at > AWAY else before.state
        colour = STATES[state][0]
        parts.append(f'<rect x="{x(before.at):.1f}" y="{top}" '
                     f'width="{x(after.at) - x(before.at) + 0.4:.1f}" height="{BAND}" '
                     f'fill="{colour}"/>')
    most = max((each.cpu for each in samples), default=0.0) or 1.0
    shown = [each for each in samples if each.state in {"running", "suspended", "waiting"}]
    for run in _unbroken(shown):
        for heights, colour, dashes in (([each.fraction for each in run], PROGRESS, ""),
                                        ([each.cpu / most for each in run], PROCESSOR, "6 3")):
            points = " ".join(f"{x(each.at):.1f},{chart + CHART * (1 - min(1.0, height)):.1f}"
                              for each, height in zip(run, heights, strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                         f'stroke-width="2" stroke-dasharray="{dashes}"/>')
    known = 0.0
    for each in shown:
        if each.checkpoint_cpu > known:
            known, at = each.checkpoint_cpu, x(each.at)
            middle = top + BAND / 2
            parts.append(f'<path d="M{at:.1f} {middle - 8}l6 8l-6 8l-6 -8z" fill="#222"/>')
    parts += [(f'<text x="{LEFT - 6}" y="{chart + 10}" text-anchor="end" fill="{PROGRESS}">100 %'
              "</text>"),
              (f'<text x="{LEFT - 6}" y="{chart + 26}" text-anchor="end" fill="{PROCESSOR}">'
              f"{most:.0f} s</text>")]
    return parts


def _unbroken(samples: list[Sample]) -> list[list[Sample]]:
    """The samples of each time during which there was a client."""
    runs: list[list[Sample]] = []
    for each in samples:
        if not runs or each.at - runs[-1][-1].at > AWAY:
            runs.append([])
        runs[-1].append(each)
    return runs


def _axis(span: float, x: Position, begin: float, y: float) -> list[str]:
    step = next((each for each in STEPS if span / each <= MOST_LABELS), STEPS[-1])
    parts = []
    for number in range(int(span // step) + 1):
        at = x(begin + number * step)
        parts.append(f'<text x="{at:.1f}" y="{y + 4:.0f}" text-anchor="middle" fill="#555">'
                     f"{number * step} s</text>")
    return parts


def _legend(y: float) -> list[str]:
    parts, at = [], float(LEFT)
    for name, (colour, text) in STATES.items():
        if name == "away":
            continue
        parts += [f'<rect x="{at}" y="{y - 11}" width="14" height="14" fill="{colour}"/>',
                  f'<text x="{at + 19}" y="{y}" fill="#333">{text}</text>']
        at += 34 + 6.6 * len(text)
    for colour, text in ((PROGRESS, "progress"), (PROCESSOR, "processor time")):
        parts += [f'<path d="M{at} {y - 4}h18" stroke="{colour}" stroke-width="2"/>',
                  f'<text x="{at + 23}" y="{y}" fill="#333">{text}</text>']
        at += 38 + 6.6 * len(text)
    parts += [f'<path d="M{at + 6} {y - 12}l6 8l-6 8l-6 -8z" fill="#222"/>',
              f'<text x="{at + 18}" y="{y}" fill="#333">checkpoint</text>']
    return parts
