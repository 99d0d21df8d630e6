"""The process that a machine is: started, followed by its log, ended with its owner."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import anyio

from vmjob.errors import ProgramMissing
from vmjob.host.guard import guarded
from vmjob.machine.contract import Ended, EndReason
from vmjob.machine.virtualbox.log import Cause, Event, Follower, cause

__all__ = ["MESSAGES", "Process", "explain_end"]

#: What VirtualBox itself printed, in the machine's directory.
MESSAGES = "virtualbox.log"

#: Seconds between looks at the log while a machine starts, and later.
STARTING_PERIOD, PERIOD = 0.02, 1.0
#: Seconds from SIGKILL until a process must be gone.
KILL_DEADLINE = 30.0
#: Bytes of VirtualBox's log that are looked at from its end.
LOG_TAIL = 64 * 1024
#: Ends a process when its owner has, however that happens: the pipe's other end is the owner's.
#: Not by the signal that children may ask for: a set-user-id program (VirtualBox's own is one)
#: loses it. The start time makes sure that the number still means the same process.
_WATCH = ('read -r _; for each in "$@"; do pid=${each%:*}; '
          '[ "$(cut -d" " -f22 /proc/$pid/stat 2>/dev/null)" = "${each#*:}" ] && kill -KILL $pid; '
          'done')


def _born(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]


class Process:
    """VBoxHeadless with one machine. Made by `begun`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, messages: Path, *,
                 may_restart: bool) -> None:
        self._process = process
        self._may_restart = may_restart
        self.pid = process.pid
        self.log = log
        self._messages = messages
        self._pidfd = os.pidfd_open(process.pid)
        self._watch: subprocess.Popen[bytes] | None = None
        self._services: list[int] = []
        #: Why it was ended by us, although nobody asked for that.
        self.halted: tuple[Cause, str] | None = None

    @classmethod
    async def begun(cls, command: list[str], environment: Mapping[str, str], directory: Path,
                    log: Path, *, may_restart: bool) -> Process:
        """Start it; `watch` then makes it die with this process. Raises `ProgramMissing`.

        ``may_restart``: a guest that restarts itself goes on, as on a PC; else that is its end.
        """
        log.unlink(missing_ok=True)
        messages = directory / MESSAGES
        with messages.open("wb") as file:
            try:
                process = await asyncio.create_subprocess_exec(
                    *guarded(command, os.getpid(), drop_capabilities=False,
                             may_gain_privileges=True),
                    env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            except OSError as error:
                raise ProgramMissing(
                    f"{command[0]} cannot be started: {error.strerror}") from error
        return cls(process, log, messages, may_restart=may_restart)

    def watch(self, services: list[int]) -> None:
        """From now on it and these other processes end with us, even when we are killed.

        And it ends with any of the ``services``: VirtualBox itself ends it 15 s later (measured),
        or crashes, and answers nothing until then.
        """
        known = []
        for pid in (self.pid, *services):
            with contextlib.suppress(OSError, IndexError):
                known.append(f"{pid}:{_born(pid)}")
        for pid in services:
            with contextlib.suppress(ProcessLookupError):
                self._services.append(os.pidfd_open(pid))
        self._watch = subprocess.Popen(["/bin/sh", "-c", _WATCH, "vmjob-watch", *known],
                                       stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL, start_new_session=True)

    def said(self) -> str:
        """What the program itself printed."""
        return _tail(self._messages)

    def logged(self) -> str:
        """The end of its log."""
        return _tail(self.log)

    def log_size(self) -> int:
        """Bytes of its log so far."""
        try:
            return self.log.stat().st_size
        except OSError:
            return 0

    def logged_since(self, size: int) -> str:
        """What its log says behind its first ``size`` bytes; the end of it, when that is long."""
        return _tail(self.log, size)

    async def reaches(self, state: str) -> bool:
        """Wait until its log says that it is in a state; false when it ends before."""
        follower = Follower(self.log)
        while not any(each.kind == "state" and each.text == state for each in follower.look()):
            if self._process.returncode is not None:
                return False
            await anyio.sleep(STARTING_PERIOD)
        return True

    def kill(self) -> None:
        """End it now."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def ended(self) -> int:
        """Its exit status, once it has ended; a machine that VirtualBox has halted is ended."""
        follower = Follower(self.log)
        loop = asyncio.get_running_loop()
        waiting = asyncio.ensure_future(self._process.wait())
        watched = list(self._services)
        for service in watched:
            loop.add_reader(service, self._service_ended, loop, service)
        try:
            while True:
                done, _ = await asyncio.wait([waiting], timeout=PERIOD)
                if done:
                    return waiting.result()
                for final in filter(self._final, follower.look()):
                    self.halted = _cause_of(final)
                    self.kill()
        finally:
            waiting.cancel()
            for service in watched:
                loop.remove_reader(service)

    def _service_ended(self, loop: asyncio.AbstractEventLoop, service: int) -> None:
        loop.remove_reader(service)
        if self._process.returncode is None:
            self.halted = self.halted or (
                Cause.CRASHED, "its service (VBoxSVC) ended, by somebody or by a fault of its own")
            self.kill()

    def _final(self, event: Event) -> bool:
        """Whether a machine is of no more use after that, although its process lives."""
        return ((event.kind == "reset" and not self._may_restart) or event.kind == "guru"
                or (event.kind == "state" and event.text == "GURU_MEDITATION")
                or (event.kind == "runtime-error" and "DISKFULL" in event.text))

    def close(self) -> None:
        """After its end."""
        if self._watch is not None and self._watch.stdin is not None:
            self._watch.kill()
            self._watch.wait()
            self._watch.stdin.close()
            self._watch = None
        while self._services:
            os.close(self._services.pop())
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _cause_of(event: Event) -> tuple[Cause, str]:
    """What an event after which a machine was ended means."""
    if event.kind == "reset":
        return Cause.RESET, "the guest restarted the machine"
    if event.kind == "runtime-error":
        return Cause.NO_SPACE, event.text
    return Cause.CRASHED, "the machine cannot go on: Guru Meditation" + (
        f" {event.text}" if event.kind == "guru" else "")


def _tail(path: Path, behind: int = 0) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(behind, size - LOG_TAIL))
            return file.read(LOG_TAIL).decode("utf-8", "replace")
    except OSError:
        return ""


def explain_end(asked: bool, code: int, log: str, console: str, said: str,
                halted: tuple[Cause, str] | None = None) -> Ended:
    """Why a machine's process ended, from all that is known about it.

    ``halted`` as `Process.halted`: what the end of a long log may not show any more.
    """
    if asked:
        return Ended(EndReason.ASKED, "the machine was stopped")
    why, sentence = halted or cause(log) or (None, "")
    if why is Cause.RESET and halted is None:  # it was not ended for that: it went on
        why, sentence = None, ""
    if why is Cause.NO_SPACE:
        return Ended(EndReason.NO_SPACE, "there was no room left for the machine's disk")
    # A machine that may restart can have done so after a panic, and ended well.
    if why is Cause.POWERED_OFF:
        return Ended(EndReason.POWERED_OFF, "the machine switched itself off")
    if "Kernel panic" in console:
        line = console[console.index("Kernel panic"):].partition("\n")[0]
        return Ended(EndReason.PANIC, f"the machine's kernel gave up: {line[:200]}")
    if why is Cause.RESET:
        told = [line for line in console.splitlines() if "vmjob-init:" in line]
        last = told[-1].partition("vmjob-init:")[2].strip() if told else "it restarted itself"
        return Ended(EndReason.RESET, f"the machine ended: {last[:200]}")
    if code == -signal.SIGKILL and why is None:
        return Ended(EndReason.KILLED, "VirtualBox was killed (signal 9): by somebody, or because "
                     "this computer was out of memory")
    if halted is not None:
        return Ended(EndReason.CRASHED, f"VirtualBox failed: {sentence}")
    how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    more = sentence or said[-500:].strip()
    return Ended(EndReason.CRASHED, f"VirtualBox {how}" + (f": {more}" if more else ""))
