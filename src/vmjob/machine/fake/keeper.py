"""The process that a fake machine is: it holds everything of the machine, and ends all of it.

Run as a script (``python keeper.py OWNER COMMAND...``), with the standard library only, so that it
starts in a few milliseconds. Orphans of its descendants become its children
(PR_SET_CHILD_SUBREAPER), so a job cannot leave the machine by forking twice and calling setsid.
When the owner dies, however it dies, or the command ends, everything else is killed.

It prints two lines: the command's process id, and how the command ended (as
`os.waitstatus_to_exitcode` has it) once nothing of the machine is left. Without the second line,
the keeper was ended by somebody else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

#: Blocked and waited for, so that none comes at a bad moment.
SIGNALS = (signal.SIGTERM, signal.SIGCHLD)


def main(owner: int, command: list[str]) -> int:
    """Start the command and stay until nothing of it is left."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    # Until here the owner's death killed this process (host/guard.py); from here it tells it.
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != owner:
        return 1
    child = _start(command)
    os.closerange(3, 1 << 16)  # the lanes are the command's: they end with it
    _say(child)
    status = _wait(child)
    kill_descendants()
    if status is not None:
        _say(os.waitstatus_to_exitcode(status))
    return 0


def _start(command: list[str]) -> int:
    keeper = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the keeper's words are for the owner alone
        if os.getppid() == keeper:
            os.execv(command[0], command)
    finally:
        os._exit(127)


def _wait(child: int) -> int | None:
    """The command's status when it ends; None when the end of all is asked for."""
    while signal.sigwait(SIGNALS) != signal.SIGTERM:
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    return ended[1]
        except ChildProcessError:
            pass
    return None


def kill_descendants() -> None:
    """Kill all children and reap them, their orphans too, until there are none."""
    while pids := _children():
        # Children of the killed come to us, so some round is the last.
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        os.wait()


def _children() -> list[int]:
    pid = os.getpid()
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:  # noqa: PTH123 - speed
        return [int(word) for word in file.read().split()]


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _say(number: int) -> None:
    try:
        os.write(1, b"%d\n" % number)
    except OSError:
        pass  # the owner is gone


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
