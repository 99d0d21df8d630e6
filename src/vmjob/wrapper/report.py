"""What stands at the top of ``stderr.txt`` when a process is done with a job: the cause first."""

from __future__ import annotations

import os
import platform
import signal
from pathlib import Path
from typing import Any

from vmjob import __version__
from vmjob.engine.record import Record
from vmjob.host.facts import memory_total
from vmjob.wrapper.log import Tail, shown
from vmjob.wrapper.outcome import Finish, Outcome, Postpone
from vmjob.wrapper.totals import Totals

__all__ = ["cause", "console_of", "sections"]

MIB = 1 << 20
#: Bytes of the machine's console, and of the hypervisor's own messages, at most.
MOST_CONSOLE = 6 << 10
#: The guest's console among the logs of a machine that failed; the others are its hypervisor's.
CONSOLE = "console.log"
MOST_MESSAGES = 2 << 10


def sections(outcome: Outcome, record: Record | None, error: dict[str, Any] | None, phase: str,
             totals: Totals, streams: dict[str, Tail], console: str,
             facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (title, text) each, the cause first."""
    found = [(cause(outcome, record, error), _summary(outcome, record, error, phase, totals,
                                                      facts))]
    for name in ("stderr", "stdout"):
        stream = streams[name]
        if stream.total:
            found.append((f"The end of the job's {name} ({stream.total} bytes in all):",
                          stream.text()))
    if console.strip():
        found.append(("The end of the machine's console:", console))
    return found


def cause(outcome: Outcome, record: Record | None, error: dict[str, Any] | None) -> str:
    """One line: what happened."""
    if isinstance(outcome, Postpone):
        what = error["message"] if error is not None else outcome.reason  # which may be cut
        return shown(f"POSTPONED for {outcome.seconds} s: {what}")
    code = outcome.code if isinstance(outcome, Finish) else 0
    if code == 0:
        return "SUCCEEDED"
    if error is not None:
        return shown(f"FAILED: {error['message']} [{error['code']}], exit code {code}")
    if record is not None and record.tasks and (number := record.tasks[-1].signal):
        return f"FAILED: the job was ended by signal {number} ({_name(number)}), exit code {code}"
    return f"FAILED: the job ended with exit code {code}"


def _summary(outcome: Outcome, record: Record | None, error: dict[str, Any] | None, phase: str,
             totals: Totals, facts: dict[str, Any]) -> str:
    lines = []
    if error is not None:
        lines += [f"what to do:  {error['advice']}",
                  f"retry:       {'may help' if error['retryable'] else 'will not help'}"]
        lines.append(f"phase:       {phase or 'start'}")
    guest = 0.0
    if record is not None:
        guest = sum(end.cpu_seconds or 0.0 for end in record.tasks)
        lines += [f"task {number}:      exit code {end.exit_code}, signal {end.signal}, "
                  f"{end.wall_seconds:.1f} s, {end.ended_by or 'ended by itself'}"
                  for number, end in enumerate(record.tasks[-5:], len(record.tasks[:-5]) + 1)]
        lines += [f"warning:     {shown(text)}" for text in record.warnings[:10]]
    machine = {**facts, **(record.machine if record is not None else {})}
    lines += [
        (f"processor:   {totals.cpu_seconds:.1f} s on this computer (claimed), "
        f"{guest:.1f} s in the machine"),
        (f"time:        {totals.run_seconds:.0f} s of running, {totals.starts} starts, "
        f"{totals.checkpoints} checkpoints"),
        (f"machine:     {machine.get('hypervisor', '-')} {machine.get('version') or ''}, "
        f"{machine.get('accelerator', '-')} ({machine.get('accelerator_why', '-')}), "
        f"{machine.get('cpus', '-')} processors, {machine.get('memory_mb', '-')} MiB, "
        f"image {machine.get('image', '-')}"),
        (f"computer:    {platform.system()} {platform.release()}, {os.cpu_count()} processors, "
        f"{memory_total() // MIB} MiB"),
        f"vmjob:       {__version__}, Python {platform.python_version()}"]
    return "\n".join(lines)


def console_of(failed: Path) -> str:
    """The end of what the last machine that failed had to say, from its logs."""
    try:
        newest = max((each for each in failed.iterdir() if each.is_dir()),
                     key=lambda each: each.stat().st_mtime)
    except (OSError, ValueError):
        return ""
    others = sorted(each for each in newest.glob("*.log") if each.name != CONSOLE)
    return _end(newest / CONSOLE, MOST_CONSOLE) + "".join(
        _end(each, MOST_MESSAGES) for each in others)


def _end(path: Path, most: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            text = file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""
    return "".join(c if c.isprintable() or c in "\n\t" else "" for c in text)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
