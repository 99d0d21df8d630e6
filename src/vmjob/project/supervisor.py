"""Holds a program and all that it ever starts: a process of its own, standard library only.

    python supervisor.py DIRECTORY LOG COMMAND...

It adopts what its descendants leave behind (PR_SET_CHILD_SUBREAPER), so nothing gets away from it.
Lines on its input: ``start``, ``argument WORD`` (instead of the command's last, from the next start
on), ``signal N`` (to the program, if it runs), ``end SECONDS``. Lines on its output:
``started PID``, ``exited STATUS`` (negative: by that signal), and at the end ``left PID COMMAND``
for each process that had to be killed. The end of its input is ``end 0``: so whoever started it may
be killed, and nothing remains. If it is killed itself, the kernel kills the program.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
#: Longest line of an order, bytes.
MAX_LINE = 256
#: How often the leaving of processes is looked at, which is announced for children only.
PERIOD = 0.05
#: Seconds in which what was killed must be gone.
KILL_DEADLINE = 10.0


class Supervisor:
    """One program, started as often as it is asked for."""

    def __init__(self, directory: str, log: str, argv: list[str]) -> None:
        self._directory, self._log, self._argv = directory, log, argv
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._pid: int | None = None
        if self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot adopt processes")

    def serve(self) -> None:
        """Obey until the input ends."""
        woken, waker = os.pipe()
        os.set_blocking(waker, False)
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        pending = b""
        while True:
            ready = select.select([0, woken], [], [])[0]
            if woken in ready:
                os.read(woken, 4096)
                self._reap()
            if 0 not in ready:
                continue
            data = os.read(0, 4096)
            lines = (pending + data).split(b"\n")
            pending = lines.pop()
            for line in lines:
                if not self._obey(line.decode("ascii", "replace").split()):
                    return
            if not data or len(pending) > MAX_LINE:
                self._end(0)
                return

    def _obey(self, words: list[str]) -> bool:
        match words:
            case ["start"] if self._pid is None:
                self._start()
            case ["argument", last]:
                self._argv[-1] = last
            case ["signal", number] if self._pid is not None:
                os.kill(self._pid, int(number))
            case ["end", seconds]:
                self._end(float(seconds))
                return False
        return True

    def _start(self) -> None:
        us = os.getpid()
        pid = os.fork()
        if pid:
            self._pid = pid
            self._say(f"started {pid}")
            return
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != us:
                os._exit(1)
            os.chdir(self._directory)
            nothing = os.open(os.devnull, os.O_RDONLY)
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            os.dup2(nothing, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.closerange(3, 64)
            os.execvpe(self._argv[0], self._argv, os.environ)
        finally:
            os._exit(127)

    def _reap(self) -> None:
        """Take the ends of all that has ended; the program's is told."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._pid = None
                self._say(f"exited {os.waitstatus_to_exitcode(status)}")

    def _end(self, seconds: float) -> None:
        """Wait so long for descendants to leave by themselves, then kill what is left."""
        until = time.monotonic() + seconds
        while self._descendants() and time.monotonic() < until:
            time.sleep(PERIOD)
            self._reap()
        said: set[int] = set()
        until = time.monotonic() + KILL_DEADLINE
        # Once more each time: what forks while it is killed has children in the next look.
        while (left := self._descendants()) and time.monotonic() < until:
            for pid in left:
                if pid not in said:
                    said.add(pid)
                    self._say(f"left {pid} {_command(pid)}")
                try:
                    # Ours, or a descendant's child: it cannot be gone and its number another's
                    # before its parent, or we, have taken its end.
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(PERIOD)
            self._reap()
        self._reap()

    def _descendants(self) -> list[int]:
        """All living processes that descend from us."""
        children: dict[int, list[int]] = {}
        for name in os.listdir("/proc"):  # noqa: PTH208
            if name.isdigit() and (found := _parent_of(int(name))) is not None:
                children.setdefault(found, []).append(int(name))
        found_all, look = [], [os.getpid()]
        while look:
            below = children.get(look.pop(), [])
            found_all += below
            look += below
        return found_all

    def _say(self, line: str) -> None:
        try:
            os.write(1, f"{line}\n".encode("utf-8", "replace"))
        except BrokenPipeError:
            pass  # who asked is gone; what is to be done remains


def _parent_of(pid: int) -> int | None:
    """The parent of a process that lives; None for a zombie, too."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[1]) if fields[0] not in {b"Z", b"X"} else None


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    shown = " ".join(word.decode("utf-8", "replace") for word in words).strip()
    return "".join(c if c.isprintable() else "?" for c in shown)[:300]


def main() -> None:
    directory, log, *argv = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        # Our input tells when to end; a signal to a whole group must not end us before.
        signal.signal(number, signal.SIG_IGN)
    Supervisor(directory, log, argv).serve()


if __name__ == "__main__":
    main()
