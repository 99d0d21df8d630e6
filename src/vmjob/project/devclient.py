"""The real BOINC client as an ordinary program: in its own folder, on loopback, gone at the end.

It needs no service, no account of its own and no root. Nothing of it outlives the process that
started it, whatever ends that: see `vmjob.project.supervisor`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from vmjob.errors import ClientFailed, HostError, ProgramMissing
from vmjob.project import supervisor
from vmjob.project.boinccmd import (
    ClientMessage,
    ClientTask,
    parse_messages,
    parse_notices,
    parse_tasks,
)
from vmjob.project.tags import block, tag

__all__ = ["DevClient", "Leftover", "programs"]

#: Seconds. The control port answers 0.3 s after the start; the client then answers within 1 s, or
#: a few where it is starting tasks.
START_DEADLINE, ANSWER_DEADLINE = 30.0, 30.0
#: The client looks every 6 s whether its apps have left, and kills them after 60.
QUIT_DEADLINE = 20.0
#: What descendants of a client that has ended get to leave by themselves before they are killed.
GRACE = 3.0
#: Between two looks at what is announced to nobody.
PERIOD = 0.1
#: Tries to find a free port, which another program may take before the client does.
PORT_TRIES = 5
LOG = "client.log"
#: Largest part of the client's log that an error quotes, bytes.
MAX_QUOTE = 2000

Mode = Literal["always", "auto", "never"]

#: Log flags that tell of every change of a task, and of every message to and from it.
LOG_FLAGS = ("task_debug", "app_msg_send", "app_msg_receive", "checkpoint_debug", "slot_debug",
             "trickle_debug", "unparsed_xml", "sched_op_debug")


@dataclass(frozen=True)
class Leftover:
    """A process that the client's tasks left behind, and that had to be killed."""

    pid: int
    command: str


class DevClient:
    """A client of one project.

        with DevClient(folder, url=server.url, authenticator=server.authenticator) as client:
            client.tasks()

    ``folder`` is its data directory, made when missing. ``cpus``: as many as it is to believe in
    (None: those of this computer). ``leave_in_memory``: whether a suspended task gets <suspend/> or
    <quit/>. ``checkpoint_period``: seconds, told to tasks. ``environment``: in addition to PATH,
    HOME (the folder), USER and LC_ALL; tasks inherit it. ``preferences``: further elements of
    global_prefs_override.xml; ``options``: of cc_config.xml.

    Raises `ProgramMissing`, `ClientFailed`, `HostError`.
    """

    def __init__(self, folder: Path, *, url: str, authenticator: str, cpus: int | None = None,
                 leave_in_memory: bool = True, checkpoint_period: float = 60.0,
                 environment: Mapping[str, str] | None = None,
                 preferences: Mapping[str, str | float] | None = None,
                 options: Mapping[str, str | float] | None = None) -> None:
        self.folder = folder.absolute()
        self.url = url
        self.leftovers: list[Leftover] = []
        self.pid: int | None = None
        self.exit_status: int | None = None
        self._boinc, self._boinccmd = programs()
        self._environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.folder),
                             "USER": getpass.getuser(),
                             # What boinccmd prints is read; Python would set LC_CTYPE without it.
                             "LC_ALL": "C.UTF-8", **(environment or {})}
        self._preferences: dict[str, str | float] = {
            **_PREFERENCES, "leave_apps_in_memory": int(leave_in_memory),
            "disk_interval": checkpoint_period, **(preferences or {})}
        self._port = 0
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        try:
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._write("cc_config.xml", _configuration(cpus, options or {}))
            self._write(f"account_{self._place}.xml", block("account", [
                tag("master_url", url), tag("authenticator", authenticator)]))
            self._write_preferences()
        except OSError as error:
            raise HostError(f"cannot write {error.filename}: {error.strerror}",
                            advice="Give a folder that you may write to.") from None

    # -- life --------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the client, and return when it answers."""
        for _ in range(PORT_TRIES):
            self._port = _free_port()
            self._supervise()
            with self._changed:
                self.exit_status = None
            self._order("start")
            if self._answers():
                return self
        raise self._failed("the BOINC client ends as soon as it is started")

    def kill(self) -> None:
        """SIGKILL to the client alone, as a crash would: its tasks remain for a while."""
        self._order("signal 9")
        if not self._wait(lambda: self.pid is None, ANSWER_DEADLINE):
            raise self._failed("the BOINC client cannot be killed")

    def quit(self, deadline: float = QUIT_DEADLINE) -> None:
        """Let it end its tasks, then itself; raises `ClientFailed` after ``deadline`` seconds."""
        self._command("--quit")
        if not self._wait(lambda: self.pid is None, deadline):
            raise self._failed(f"the BOINC client has not ended in {deadline:g} s")

    def restart(self) -> None:
        """Start it again in the same folder; end it first where it runs."""
        if self.pid is not None:
            self.quit()
        self.start()

    def close(self, *, grace: float = GRACE) -> None:
        """End the client and everything that descends from it.

        What is still there ``grace`` seconds after the client is killed, and is in `leftovers`.
        """
        if self._process is None:
            return
        try:
            if self.pid is not None:
                with contextlib.suppress(ClientFailed):
                    self.quit()
                if self.pid is not None:
                    self.kill()
            self._order(f"end {grace}")
        finally:
            process, self._process = self._process, None
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # which ends it, whatever it is at
            try:
                process.wait(grace + supervisor.KILL_DEADLINE + ANSWER_DEADLINE)
            finally:
                process.kill()
                process.wait()
                if self._reader is not None:
                    self._reader.join()
                assert process.stdout is not None
                process.stdout.close()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close(grace=0)
            raise

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what it says ------------------------------------------------------------------------

    @property
    def project_directory(self) -> Path:
        """Where the project's files are; an app_info.xml goes there before the start."""
        return self.folder / "projects" / self._place

    @property
    def log(self) -> str:
        """All that the client has printed so far (its messages, with times)."""
        try:
            return (self.folder / LOG).read_text("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def slot(self, number: int = 0) -> Path:
        """The directory that a task runs in."""
        return self.folder / "slots" / str(number)

    def tasks(self) -> list[ClientTask]:
        """All tasks that it has."""
        return parse_tasks(self._command("--get_tasks"))

    def task(self, name: str) -> ClientTask | None:
        """One task; None when it is not there, or no longer."""
        return next((each for each in self.tasks() if each.name == name), None)

    def wait_task(self, name: str, condition: Callable[[ClientTask], bool],
                  deadline: float) -> ClientTask:
        """Look until a task is as wanted; raises `ClientFailed` after ``deadline`` seconds."""
        until = time.monotonic() + deadline
        while True:
            found = self.task(name)
            if found is not None and condition(found):
                return found
            if time.monotonic() >= until:
                raise self._failed(f"the task {name} is not as expected after {deadline:g} s: "
                                   f"{found.fields if found else 'it is not there'}")
            threading.Event().wait(PERIOD)

    def messages(self) -> list[ClientMessage]:
        """Its log of events, as the Manager shows it."""
        return parse_messages(self._command("--get_messages"))

    def notices(self) -> list[str]:
        """What it wants the volunteer to read."""
        return parse_notices(self._command("--get_notices"))

    # -- what it is told ---------------------------------------------------------------------

    def suspend(self, name: str) -> None:
        """Suspend a task, as a volunteer does."""
        self._command("--task", self.url, name, "suspend")

    def resume(self, name: str) -> None:
        self._command("--task", self.url, name, "resume")

    def abort(self, name: str) -> None:
        self._command("--task", self.url, name, "abort")

    def update(self) -> None:
        """Ask the project now, whatever the delays are: reports, and asks for work."""
        self._command("--project", self.url, "update")

    def set_run_mode(self, mode: Mode, seconds: float = 0) -> None:
        """``never``: all tasks stand; for ``seconds`` (0: until the next call)."""
        self._command("--set_run_mode", mode, f"{seconds:g}")

    def set_network_mode(self, mode: Mode, seconds: float = 0) -> None:
        self._command("--set_network_mode", mode, f"{seconds:g}")

    def set_preferences(self, **preferences: str | float) -> None:
        """Change elements of global_prefs_override.xml, and have it read."""
        self._preferences |= preferences
        self._write_preferences()
        self.read_global_prefs_override()

    def read_global_prefs_override(self) -> None:
        """Have the file read that somebody has changed."""
        self._command("--read_global_prefs_override")

    # -- inside ------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        """What the client calls the project's files: the URL without what paths cannot hold."""
        return self.url.partition("://")[2].strip("/").replace(":", "_").replace("/", "_")

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def _write_preferences(self) -> None:
        self._write("global_prefs_override.xml", block(
            "global_preferences", [tag(name, each) for name, each in self._preferences.items()]))

    def _supervise(self) -> None:
        """The supervisor of all clients in this folder; another one for another port."""
        if self._process is not None:
            # A client that was killed may have left tasks, which its successor is to meet.
            self._order(f"argument {self._port}")
            return
        argv = [sys.executable, "-I", "-S", supervisor.__file__, str(self.folder), LOG,
                self._boinc, "--dir", str(self.folder), "--gui_rpc_port", str(self._port)]
        # A session of its own: Ctrl-C at the terminal is for us, who then end the client.
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self.folder,
            env=self._environment, start_new_session=True)
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True,
                                        name="client-supervisor")
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.decode("utf-8", "replace").split(maxsplit=2)
            with self._changed:
                match words:
                    case ["started", pid]:
                        self.pid = int(pid)
                    case ["exited", status]:
                        self.pid, self.exit_status = None, int(status)
                    case ["left", pid, *command]:
                        self.leftovers.append(Leftover(int(pid), " ".join(command).strip()))
                self._changed.notify_all()

    def _order(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("the BOINC client's supervisor has ended") from None

    def _wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, deadline)

    def _answers(self) -> bool:
        """Wait until the control port answers; False where the client has ended."""
        until = time.monotonic() + START_DEADLINE
        while time.monotonic() < until:
            with contextlib.suppress(ClientFailed):
                self._command("--client_version")
                return True
            if self._wait(lambda: self.exit_status is not None, PERIOD):
                return False
        raise self._failed(f"the BOINC client does not answer after {START_DEADLINE:g} s")

    def _command(self, *words: str) -> str:
        """What ``boinccmd`` prints; raises `ClientFailed`."""
        try:
            done = subprocess.run(
                [self._boinccmd, "--host", f"127.0.0.1:{self._port}", *words], cwd=self.folder,
                env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, check=False,
                timeout=ANSWER_DEADLINE)
        except subprocess.TimeoutExpired:
            raise self._failed(f"boinccmd {words[0]}: no answer in {ANSWER_DEADLINE:g} s") from None
        if done.returncode:
            said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
            raise self._failed(f"boinccmd {' '.join(words)}: {said[:500]}")
        return done.stdout.decode("utf-8", "replace")

    def _failed(self, message: str) -> ClientFailed:
        return ClientFailed(message, advice=f"The client's messages are in {self.folder / LOG}.",
                            log=self.log[-MAX_QUOTE:])


#: A computer that is there for tests: nothing makes it stop, or fetch more than it needs.
_PREFERENCES: dict[str, str | float] = {
    "run_on_batteries": 1, "run_if_user_active": 1, "suspend_cpu_usage": 0,
    "max_ncpus_pct": 100, "cpu_usage_limit": 100, "ram_max_used_busy_pct": 90,
    "ram_max_used_idle_pct": 90, "vm_max_used_pct": 100, "disk_max_used_pct": 100,
    "disk_min_free_gb": 0.1, "work_buf_min_days": 0.01, "work_buf_additional_days": 0.01}


def programs() -> tuple[str, str]:
    """The client and its command; raises `ProgramMissing`."""
    return _program("boinc"), _program("boinccmd")


def _configuration(cpus: int | None, options: Mapping[str, str | float]) -> str:
    chosen: dict[str, str | float] = {
        "skip_cpu_benchmarks": 1, "no_gpus": 1,
        # Nothing leaves loopback.
        "no_info_fetch": 1, "dont_contact_ref_site": 1,
        "allow_multiple_clients": 1, "report_results_immediately": 1, "fetch_on_update": 1,
        "max_file_xfers": 8, "max_file_xfers_per_project": 8}
    if cpus is not None:
        chosen["ncpus"] = cpus
    return block("cc_config", [block("log_flags", [tag(each, 1) for each in LOG_FLAGS]),
                               block("options", [tag(name, value) for name, value
                                                 in {**chosen, **options}.items()])])


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ProgramMissing(f"there is no {name!r}", advice="Install Debian's package "
                             "boinc-client, with --no-install-recommends: nothing more is needed.")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
