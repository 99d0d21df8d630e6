"""VBox.log: what happened to a machine, in the order in which it happened.

Parsers are pure; `Follower` reads a log that grows, by offset and in bounded pieces. The guest
cannot write to this log, but it can make VirtualBox write much: what is kept is bounded.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cause", "Event", "Follower", "cause", "complaints", "events", "port_conflicts"]

#: Bytes that one look reads at most; a log with its final statistics has 150 kB.
PIECE = 1 << 20
#: Characters of one line that are looked at.
LINE = 2000


class Cause(enum.StrEnum):
    """Why a machine is no longer running, as far as its log tells."""

    POWERED_OFF = "powered-off"  # the guest switched it off (ACPI)
    RESET = "reset"  # the guest restarted it; it runs on
    CRASHED = "crashed"  # the guest did what no processor goes on after, or VirtualBox gave up
    SAVED = "saved"
    ASKED = "asked"  # somebody switched it off
    NO_SPACE = "no-space"  # this computer's disk is full: it was paused
    NOT_STARTED = "not-started"


@dataclass(frozen=True)
class Event:
    """One line that means something.

    ``seconds``: since the start of the process. ``kind``: ``state`` (``text`` is the new state in
    VirtualBox's capitals, RUNNING), ``console`` (the same as VBoxManage tells it, 'Running'),
    ``error`` (``text`` is a sentence, with its VERR_ code in brackets), ``runtime-error`` (``text``
    is ``ID: sentence``), ``power-off`` (asked for by the guest), ``reset``, ``guru`` (``text``:
    why), ``failed`` (the start; ``text``: the code), ``asked-off``.
    """

    seconds: float
    kind: str
    text: str


_TIME = re.compile(r"^(\d{1,6}):(\d\d):(\d\d)\.(\d{1,6}) (.*)$")
#: What a line says -> its kind; the first group is its text.
_LINES: tuple[tuple[str, re.Pattern[str]], ...] = tuple((kind, re.compile(pattern)) for
                                                        kind, pattern in (
    ("state", r"Changing the VM state from '\w{1,60}' to '(\w{1,60})'"),
    ("console", r"Console: Machine state changed to '(\w{1,60})'"),
    ("failed", r"Power up failed \(vrc=(\w{1,80})"),
    ("power-off", r"ACPI: (Entering S5 power state)"),
    ("reset", r"(?:ACPI: |GIM: HyperV: )?Reset initiated (?:by|through) (.{1,80})"),
    ("guru", r"!! {1,20}VCPU\d{1,4}: Guru Meditation (.{1,120})"),
    ("runtime-error",
     r"Console: VM runtime error: fatal=\w{1,10}, errorID=(.{1,80}?) message=\"(.{0,1000})"),
    ("asked-off", r"Console::powerDown\(\): (A request to power off)"),
))
_SET_ERROR = re.compile(r"VMSetError: (.*)")
_PLACE = re.compile(r".*\(\d{1,9}\) .*; rc=(\w{1,80})$")


def events(text: str) -> Iterator[Event]:
    """The events of a log, or of a piece of one that begins and ends with whole lines.

    An error is written in two lines, place and code first, then the sentence: a piece that ends
    between them gives the sentence without its code.
    """
    code = ""
    for whole in text.splitlines():
        timed = _TIME.match(whole[:LINE])
        if timed is None:
            continue
        hours, minutes, seconds, part, line = timed.groups()
        when = int(hours) * 3600 + int(minutes) * 60 + float(f"{seconds}.{part}")
        if found := _SET_ERROR.match(line):
            if place := _PLACE.match(found[1]):
                code = place[1]
            else:
                yield Event(when, "error", f"{found[1].strip()}{f' ({code})' if code else ''}")
                code = ""
            continue
        for kind, pattern in _LINES:
            if found := pattern.match(line):
                yield Event(when, kind, ": ".join(each.strip('" ') for each in found.groups()))
                break


def complaints(text: str) -> list[str]:
    """The sentences of all errors in a log: what `faults.classify` understands.

    Not the log itself: it names files that are not there, and states, without anything being wrong.
    """
    found = [each for each in events(text)
             if each.kind in ("error", "runtime-error", "failed", "guru")]
    return [each.text for each in found if each.kind != "failed"] or [
        f"Power up failed ({each.text})" for each in found]


def port_conflicts(text: str) -> list[int]:
    """Ports of this computer that a machine was to have, and another process has.

    VirtualBox tells it nowhere but in its log: the start is successful.
    """
    return [int(port) for sentence in complaints(text)
            for port in re.findall(r"failed to set up redirection of (\d{1,5}) to", sentence)]


def cause(text: str) -> tuple[Cause, str] | None:
    """Why the machine of this log ended or stands still, with a sentence; None: it runs.

    The newest cause counts. A machine that was killed has none: its log just ends, and says
    ``running`` (None).
    """
    found: tuple[Cause, str] | None = None
    powered_off = False
    for event in events(text):
        match event.kind, event.text:
            case "power-off", _:
                powered_off = True
            case "reset", how:
                found = (Cause.RESET, f"the guest restarted the machine (by {how})")
            case "guru", why:
                found = (Cause.CRASHED, f"the machine cannot go on: Guru Meditation {why}")
            case "state", "GURU_MEDITATION" if found is None:
                found = (Cause.CRASHED, "the machine cannot go on: Guru Meditation")
            case "runtime-error", what:
                full = "DISKFULL" in what
                found = (Cause.NO_SPACE if full else Cause.CRASHED, what)
            case "failed", code:
                sentences = complaints(text)
                found = (Cause.NOT_STARTED, sentences[-1] if sentences else code)
            case "console", "Saved":
                found = (Cause.SAVED, "it was saved")
            case "console", "PoweredOff" if found is None or found[0] == Cause.RESET:
                found = ((Cause.POWERED_OFF, "the guest switched it off") if powered_off
                         else (Cause.ASKED, "it was switched off"))
            case "console" | "state", ("Running" | "RUNNING") if found and found[0] in (
                    Cause.SAVED, Cause.NO_SPACE, Cause.ASKED):
                found = None
            case _:
                pass
    return found


class Follower:
    """A log that grows, read piece by piece.

    A log that was begun anew (VirtualBox renames the old one at each start) is read from its
    beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""
        self._file: tuple[int, int] | None = None

    def look(self) -> list[Event]:
        """Events since the last look, of at most `PIECE` bytes; [] while there is no log."""
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                identity = (facts.st_dev, facts.st_ino)
                if identity != self._file or facts.st_size < self._offset:
                    self._file, self._offset, self._rest = identity, 0, b""
                file.seek(self._offset)
                data = file.read(PIECE)
        except OSError:
            return []
        self._offset += len(data)
        whole, newline, rest = (self._rest + data).rpartition(b"\n")
        # What never ends in a newline is no line of a log.
        self._rest = rest if len(rest) < PIECE else b""
        text = (whole + newline).decode("utf-8", "replace")
        # The first half of an error waits for the second.
        last = text[:-1].rpartition("\n")[2] if text else ""
        if "VMSetError: " in last and _PLACE.match(last):
            self._rest = (last + "\n").encode() + self._rest
            text = text[:-len(last) - 1]
        return list(events(text))
