"""What ``boinccmd`` prints, as records."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["ClientMessage", "ClientTask", "parse_messages", "parse_notices", "parse_tasks"]

_FIELD = re.compile(r"^ {3}([^:]{1,60}): ?(.*)$")
#: ``12: 21-Nov-2026 19:40:00 (low) [project] text``
_MESSAGE = re.compile(r"^(\d+): (\S+ \S+) \((user notification|internal error|[a-z ]*)\) "
                      r"\[([^\]]*)\] (.*)$")


@dataclass(frozen=True)
class ClientTask:
    """A task as the client shows it. Times are seconds, ``memory`` bytes.

    ``state``: ``downloading``, ``downloaded``, ``uploading``, ``uploaded``, ``aborted``,
    ``compute error``. ``active``: ``EXECUTING``, ``SUSPENDED``, ... ; '' where it never ran.
    ``fields``: all that was printed.
    """

    name: str
    workunit: str
    state: str
    active: str
    scheduler_state: str
    fraction_done: float
    cpu_time: float
    checkpoint_cpu_time: float
    memory: float
    suspended: bool
    ready_to_report: bool
    slot: int | None
    pid: int | None
    fields: dict[str, str]


@dataclass(frozen=True)
class ClientMessage:
    """A line of the client's log; ``priority``: ``low`` or ``user notification``."""

    number: int
    time: str
    priority: str
    project: str
    text: str


def parse_tasks(text: str) -> list[ClientTask]:
    """From ``--get_tasks``."""
    blocks: list[dict[str, str]] = []
    for line in text.splitlines():
        if re.match(r"^\d+\) -", line):
            blocks.append({})
        elif blocks and (match := _FIELD.match(line)):
            blocks[-1].setdefault(match[1], match[2])
    return [_task(each) for each in blocks if each.get("name")]


def _task(fields: dict[str, str]) -> ClientTask:
    def number(name: str) -> float:
        match = re.match(r"-?[0-9.]+(e[+-]?\d+)?", fields.get(name, ""))
        try:
            found = float(match[0]) if match else 0.0
        except ValueError:
            return 0.0
        return found * (1 << 20) if fields.get(name, "").endswith("MB") else found

    def whole(name: str) -> int | None:
        found = fields.get(name, "")
        return int(found) if found.isascii() and found.isdigit() else None

    active = fields.get("active_task_state", "")
    return ClientTask(
        fields["name"], fields.get("WU name", ""), fields.get("state", ""),
        "" if active == "UNINITIALIZED" else active, fields.get("scheduler state", ""),
        number("fraction done"), number("current CPU time"), number("CPU time at last checkpoint"),
        number("working set size"), fields.get("suspended via GUI") == "yes",
        fields.get("ready to report") == "yes", whole("slot"), whole("PID"), fields)


def parse_messages(text: str) -> list[ClientMessage]:
    """From ``--get_messages``; a message of several lines keeps them."""
    found: list[ClientMessage] = []
    for line in text.splitlines():
        if match := _MESSAGE.match(line):
            number, time, priority, project, said = match.groups()
            found.append(ClientMessage(int(number), time, priority, project, said))
        elif found and line.strip():
            last = found.pop()
            found.append(ClientMessage(last.number, last.time, last.priority, last.project,
                                       f"{last.text}\n{line}"))
    return found


def parse_notices(text: str) -> list[str]:
    """From ``--get_notices``: the text of each."""
    found: list[str] = []
    for line in text.splitlines():
        if re.match(r"^\d+: ", line):
            found.append(line.partition(": ")[2])
        elif found and line.strip() and not line.startswith("="):
            found[-1] += f"\n{line}"
    return [each.strip() for each in found]
