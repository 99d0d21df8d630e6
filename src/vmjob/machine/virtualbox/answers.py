"""What VBoxManage prints, as data. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmjob.errors import HypervisorRefused
from vmjob.machine.virtualbox.faults import Fault, Kind, classify, error_lines, warning_lines

__all__ = ["Answer", "judge_answer", "parse_machine_readable", "uuid_of", "without_banner"]

_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
#: Progress, which goes to stderr when all is well: 0%...10%...
_PROGRESS = re.compile(r"^\d{1,3}%(?:\.\.\.\S*)*$")

#: key=value, "key"=value; groups: the quoted key, the other, the value as it stands there.
_PAIR = re.compile(r'^(?:"((?:[^"\\]|\\.)*)"|([^"=\s][^"=]*))=(.*)$')
#: Lines that one value may have: a description is ours.
MOST_LINES = 200


@dataclass(frozen=True)
class Answer:
    """One answer of VBoxManage.

    ``fault``: None when it did what was asked. It can have one with exit code 0, and a ``stdout``
    that is worth reading. ``warnings``: what it thinks odd, and did.
    """

    exit_code: int
    stdout: str
    stderr: str
    fault: Fault | None = None
    warnings: tuple[str, ...] = ()


def judge_answer(exit_code: int, stdout: str, stderr: str) -> Answer:
    """Whether it did what was asked: the exit code alone does not tell.

    `discardstate` of a machine that is not saved says ``error:`` and exits with 0; ``snapshot``
    says on stdout that there are none.
    """
    stdout = without_banner(stdout)
    stderr = "\n".join(line for line in stderr.splitlines() if not _PROGRESS.match(line.strip()))
    fault = None
    if exit_code < 0:
        fault = Fault(Kind.UNKNOWN, f"it was ended by signal {-exit_code}", stderr)
    elif errors := error_lines(stderr):
        fault = classify("\n".join(f"VBoxManage: error: {line}" for line in errors), stderr)
    elif exit_code:
        fault = classify(stderr, stdout)
    return Answer(exit_code, stdout, stderr, fault, tuple(warning_lines(stderr)))


def without_banner(stdout: str) -> str:
    """An answer without the warning that scripts of distributions print before it.

    It is one line that begins with ``WARNING:``, and indented and empty lines after it.
    """
    lines = stdout.splitlines(keepends=True)
    if not lines or not lines[0].startswith("WARNING: "):
        return stdout
    for number, line in enumerate(lines[1:], start=1):
        if line.strip() and not line[0].isspace() and not line.startswith("WARNING: "):
            return "".join(lines[number:])
    return ""


def parse_machine_readable(text: str) -> dict[str, str]:
    """``showvminfo --machinereadable`` and its like: keys and values without their quotes.

    Keys may be quoted, values may go over several lines, lines may be neither (all seen). Of two
    values for one key the first stands: later ones may come from a text that somebody wrote into
    the machine's description.
    """
    found: dict[str, str] = {}
    lines = without_banner(text).splitlines()
    number = 0
    while number < len(lines):
        match = _PAIR.match(lines[number])
        number += 1
        if match is None:
            continue
        value = match[3]
        if value.startswith('"'):
            # One that is never closed is one line: it must not hide all that comes after it.
            for last in range(number, len(lines) + 1):
                whole = "\n".join([value, *lines[number:last]])
                if _closed(whole):
                    value, number = _plain(whole[1:-1]), last
                    break
                if last - number >= MOST_LINES:
                    break
        key = match[2].strip() if match[1] is None else _plain(match[1])
        found.setdefault(key, value)
    return found


def _closed(value: str) -> bool:
    """Whether a value that begins with a quote ends with another, which is not an escaped one."""
    if len(value) < 2 or not value.endswith('"'):
        return False
    before = value[1:-1]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 0


def _plain(quoted: str) -> str:
    return re.sub(r'\\(["\\])', r"\1", quoted)


def uuid_of(text: str) -> str:
    """The UUID that an answer gives: ``Medium created. UUID: 284e...``.

    Raises `HypervisorRefused` when it gives none.
    """
    found = re.search(rf"UUID:\s*({_UUID})", text) or re.search(rf"\b({_UUID})\b", text)
    if found is None:
        raise HypervisorRefused(f"VBoxManage gave no UUID, but {text.strip()[:200]!r}",
                                kind="no-uuid")
    return found[1]
