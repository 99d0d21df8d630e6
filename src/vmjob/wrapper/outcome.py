"""From how a job ended to what the client is told: pure, so that every case is a line of a test.

Three kinds of faults. The job's own: it has failed, at once, and the exit code says how. This
computer's: it may run later, here, so it is postponed, for longer each time. The machine's: nobody
knows, so it is tried again from the last checkpoint, but not for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmjob import errors
from vmjob.engine.record import Record
from vmjob.errors import VmjobError
from vmjob.grid.boinc.exitcodes import (
    EXIT_ABORTED_BY_CLIENT,
    EXIT_CHILD_FAILED,
    EXIT_DISK_LIMIT_EXCEEDED,
    EXIT_INIT_FAILURE,
    EXIT_OUT_OF_MEMORY,
    EXIT_TIME_LIMIT_EXCEEDED,
)
from vmjob.grid.boinc.files import MAX_LINE

__all__ = ["AGAIN", "Again", "Finish", "Outcome", "Postpone", "of_error", "of_record"]

#: Seconds of a first postponement; each further one for the same cause takes twice as long. The
#: client looks once a minute, so less than that makes no difference.
FIRST = 120
#: Seconds of the longest: several tries a day. Nothing is put off for a day.
MOST = 4 * 3600
#: How often a machine may fail, without a checkpoint in between, before it is taken to be the job
#: that makes it fail. The client itself would try a hundred times.
MOST_MACHINE_FAULTS = 5

_CODES: dict[type[VmjobError], int] = {
    errors.UsageError: EXIT_INIT_FAILURE,
    errors.ImageError: EXIT_INIT_FAILURE,
    errors.TimeLimit: EXIT_TIME_LIMIT_EXCEEDED,
    errors.FolderFull: EXIT_DISK_LIMIT_EXCEEDED,
    errors.OutputTooLarge: EXIT_DISK_LIMIT_EXCEEDED,
    errors.HeartbeatStopped: EXIT_ABORTED_BY_CLIENT,
    errors.JobError: EXIT_CHILD_FAILED,
}
#: What we end a task for where that is a failure of the job's: `TaskEnd.ended_by`. The exit code
#: in its record is then the task's own, mostly that of our signal.
_LIMITS = ("time-limit", "output-limit")
_BY_CODE = {kind.code: kind for kind in errors.all_errors()}
#: What a volunteer can do, where an error's own advice is for somebody at a command line.
_FOR_VOLUNTEERS: dict[type[VmjobError], str] = {
    errors.AcceleratorUnusable: "Make it work again as when the task began, or abort the task.",
    errors.VirtualizationOff: "Switch on virtualization (VT-x or AMD-V) in this computer's BIOS "
                              "setup.",
    errors.CheckpointNewer: "It goes on with a newer version of the application.",
    errors.HomeUnusable: "Let the user that BOINC runs as write in BOINC's data directory.",
    errors.HostDiskFull: "Free some disk space, or let BOINC use more of the disk.",
    errors.HostMemoryLow: "This computer has too little memory for it: abort the task.",
    errors.ImageBuildFailed: "It is tried again by itself.",
    errors.PortTaken: "Close the program that holds it, or wait.",
    errors.ProcessorChanged: "It goes on when the computer is as before; else abort the task.",
    errors.SlotUnusable: "Abort the task.",
}


@dataclass(frozen=True)
class Finish:
    """The job is over. ``code`` 0: it succeeded. ``message``: for the volunteer, if ``notice``."""

    code: int
    message: str = ""
    notice: bool = False


@dataclass(frozen=True)
class Postpone:
    """It is to be started again after some ``seconds``; ``notice``: the volunteer should know."""

    seconds: int
    reason: str
    notice: bool = False


@dataclass(frozen=True)
class Again:
    """It goes on at once, in this process."""


AGAIN = Again()
Outcome = Finish | Postpone | Again


def of_record(record: Record, before: int) -> Outcome:
    """What becomes of a job; ``before``: how often in a row it ended with this fault before."""
    limited = bool(record.tasks) and record.tasks[-1].ended_by in _LIMITS
    if record.error is not None and (limited or record.exit_code == errors.EXIT_VMJOB_FAILED):
        return of_error(record.error, before)
    if record.error is not None and record.error["code"] == errors.Postponed.code:
        return _asked_for(record.error)
    if record.tasks and record.tasks[-1].ended_by == "out-of-memory" and record.exit_code != 0:
        return Finish(EXIT_OUT_OF_MEMORY)
    return Finish(record.exit_code, record.message, record.notice)


def of_error(error: Mapping[str, Any], before: int) -> Outcome:
    """What becomes of a job that ended with an error; the form is `VmjobError.as_dict`'s."""
    kind = _BY_CODE.get(str(error["code"]), VmjobError)
    if issubclass(kind, errors.Postponed):
        return _asked_for(error)
    # An image that comes with no application is built here: a download that failed may work later.
    if issubclass(kind, errors.HostError | errors.ImageBuildFailed):
        return Postpone(delay(before), _reason(str(error["message"]), _advice(kind, error)),
                        notice=before == 0 and not issubclass(kind, errors.Busy))
    # No job asks anything of a machine by itself: one in the wrong state has ended behind our back.
    if issubclass(kind, errors.MachineError | errors.GuestError | errors.WrongState):
        if before >= MOST_MACHINE_FAULTS:
            return Finish(EXIT_CHILD_FAILED, str(error["message"]))
        return AGAIN if before == 0 else Postpone(delay(before - 1), str(error["message"]))
    for cls in kind.__mro__:
        if cls in _CODES:
            return Finish(_CODES[cls])
    return Finish(EXIT_CHILD_FAILED)


def _reason(message: str, advice: str) -> str:
    """Both, as long as the client shows it; what is cut is of what happened, not of what to do."""
    room = max(0, MAX_LINE - len(f". {advice}".encode()))
    data = message.encode("utf-8", "replace")
    if len(data) > room:
        message = data[:max(0, room - 3)].decode("utf-8", "ignore") + "..."
    return f"{message}. {advice}"


def _advice(kind: type[VmjobError], error: Mapping[str, Any]) -> str:
    """What a volunteer is told to do: what was found for this case, or what is so for its kind."""
    own = str(error["advice"])
    return _FOR_VOLUNTEERS.get(kind, own) if own == kind.standing_advice else own


def delay(before: int) -> int:
    """Seconds to wait after a fault that has been there so many times already."""
    return min(MOST, FIRST << min(before, 16))


def _asked_for(error: Mapping[str, Any]) -> Postpone:
    """The job itself wants to wait. Its own back-off, but never a day of nothing."""
    context = error["context"]
    seconds = context.get("delay", FIRST)
    return Postpone(int(min(max(seconds, 0), MOST)), str(error["message"]),
                    notice=bool(context.get("notice")))
