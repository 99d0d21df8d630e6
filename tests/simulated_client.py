"""A BOINC client for one app, by the rules that the real one (7.20.5) was seen to follow.

It shares no code with `vmjob.grid.boinc`: what both got wrong would look right. It looks more often
than the real client does (once a second), so that tests are quick.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

CONTROL, GRAPHICS_REPLY, HEARTBEAT, STATUS, TRICKLE_UP, TRICKLE_DOWN = 0, 3, 4, 5, 6, 7
SIZE, LENGTH = 1024, 8192
#: Seconds for anything that a test waits for.
DEADLINE = 15.0
PERIOD = 0.02
HEARTBEAT_PERIOD = 0.2
AUTHENTICATOR = "7da1c8e1f3b94e0d"

HEARTBEAT_TEXT = "<heartbeat/>\n<wss>1.100000e+07</wss>\n<max_wss>2.200000e+10</max_wss>\n"

INIT_DATA = """<app_init_data>
<major_version>7</major_version>
<minor_version>20</minor_version>
<release>5</release>
<app_version>100</app_version>
<userid>17</userid>
<teamid>0</teamid>
<hostid>23</hostid>
<app_name>probe</app_name>
<project_preferences>
<cores>2</cores><slot>99</slot>
</project_preferences>
<team_name>&lt;none&gt;</team_name>
<user_name>A &amp; B</user_name>
<project_dir>{boinc_dir}/projects/example.org_probe</project_dir>
<boinc_dir>{boinc_dir}</boinc_dir>
<authenticator>{authenticator}</authenticator>
<wu_name>unit</wu_name>
<result_name>unit_0</result_name>
<shm_key>{shm_key}</shm_key>
<slot>0</slot>
<client_pid>{client_pid}</client_pid>
<wu_cpu_time>{wu_cpu_time:f}</wu_cpu_time>
<starting_elapsed_time>0.000000</starting_elapsed_time>
<using_sandbox>0</using_sandbox>
<vm_extensions_disabled>0</vm_extensions_disabled><user_total_credit>12.5</user_total_credit>
<checkpoint_period>{checkpoint_period:f}</checkpoint_period>
<fraction_done_start>0.000000</fraction_done_start>
<fraction_done_end>1.000000</fraction_done_end>
<ncpus>2.000000</ncpus>
<host_info>
    <p_ncpus>2</p_ncpus>
    <m_nbytes>4294967296.000000</m_nbytes>
</host_info>
<global_preferences>
   <cpu_usage_limit>{cpu_usage_limit:f}</cpu_usage_limit>
</global_preferences>
</app_init_data>
"""


@dataclass
class Seen:
    """What the client knows of its app."""

    statuses: list[dict[str, float]] = field(default_factory=list)
    checkpoints: list[float] = field(default_factory=list)
    current_cpu_time: float = 0.0
    checkpoint_cpu_time: float = 0.0
    fraction_done: float = 0.0
    other_pids: list[int] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)
    trickles: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)


class SimulatedClient:
    """One slot and one app; nothing moves but while the test waits in `until` or `see`."""

    def __init__(self, root: Path, *, wu_cpu_time: float = 0.0, shm_key: int = -1,
                 client_pid: int | None = None) -> None:
        self.root = root
        self.slot = root / "slots" / "0"
        self.project = root / "projects" / "example.org_probe"
        self.slot.mkdir(parents=True)
        self.project.mkdir(parents=True)
        self._facts: dict[str, object] = {
            "boinc_dir": root, "authenticator": AUTHENTICATOR, "shm_key": shm_key,
            "client_pid": os.getpid() if client_pid is None else client_pid,
            "wu_cpu_time": wu_cpu_time, "checkpoint_period": 60.0, "cpu_usage_limit": 100.0}
        self.write_init_data()
        path = self.slot / "boinc_mmap_file"
        path.write_bytes(bytes(LENGTH))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), LENGTH)
        self.seen = Seen(current_cpu_time=wu_cpu_time, checkpoint_cpu_time=wu_cpu_time)
        self.queue: list[str] = []
        self.heartbeat = HEARTBEAT_TEXT
        #: Whether the client looks at what the app says.
        self.listens = True
        self.process: subprocess.Popen[str] | None = None
        #: What was started is only the app's parent.
        self.app_outlives_us = False
        self._beat = 0.0

    def write_init_data(self, **changes: object) -> None:
        self._facts |= changes
        (self.slot / "init_data.xml").write_text(INIT_DATA.format(**self._facts))

    def link(self, logical_name: str, physical_name: str) -> Path:
        """A link file in the slot; returns the file in the project's directory."""
        place = self.slot / logical_name
        place.parent.mkdir(parents=True, exist_ok=True)
        target = f"../../projects/{self.project.name}/{physical_name}"
        place.write_text(f"<soft_link>{target}</soft_link>\n")
        return self.project / physical_name

    # -- the app -------------------------------------------------------------------------------

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start the app as the client does, but with pipes, by which a test leads it."""
        (self.slot / "boinc_temporary_exit").unlink(missing_ok=True)
        self.memory[:] = bytes(LENGTH)
        with (self.slot / "stderr.txt").open("ab") as errors:
            self.process = subprocess.Popen(
                command, cwd=self.slot, env=dict(env) if env is not None else None,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.said: list[str] = []
        self._rest = ""

    def tell(self, line: str) -> None:
        """An order of the test's to its app."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def until_said(self, line: str) -> float:
        """Wait for a line of the app's; returns the seconds it took."""
        start = time.monotonic()
        self.until(lambda: line in self.said, f"the app says {line!r}")
        return time.monotonic() - start

    def ended(self) -> str:
        """Wait for the app's end; returns what the client makes of it."""
        assert self.process is not None
        process = self.process
        self.until(lambda: process.poll() is not None, "the app ends")
        self._look()  # the client reads a last time
        return self.verdict(process.wait())

    def verdict(self, code: int) -> str:
        """The rules of the client for an app that has ended."""
        temporary = self.slot / "boinc_temporary_exit"
        if temporary.exists():
            lines = temporary.read_text().split("\n")
            if len(lines) > 1 and lines[0].strip().isdigit() and lines[1]:
                assert all(len(line.encode()) < 255 for line in lines)
                notice = len(lines) > 2 and lines[2] == "notice"
                return f"postponed {lines[0]} {lines[1]!r} notice={notice}"
        if code < 0:
            return f"signal {-code}"
        if code:
            return f"failed {code}"
        if (self.slot / "boinc_finish_called").exists():
            return "finished"
        return "restart"

    # -- the channels --------------------------------------------------------------------------

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            over = (self.process is not None and self.process.poll() is not None
                    and not self.app_outlives_us)
            self._look()
            if condition():
                return
            if over or time.monotonic() > deadline:
                errors = (self.slot / "stderr.txt").read_text() if self.process else ""
                raise AssertionError(f"not before {'its end' if over else DEADLINE}: {what}; "
                                     f"{self.said}\n{errors}")
            time.sleep(PERIOD)

    def put(self, channel: int, text: str | bytes) -> bool:
        data = text if isinstance(text, bytes) else text.encode()
        start = channel * SIZE
        if self.memory[start]:
            return False
        self.memory[start + 1:start + 1 + len(data)] = data
        if len(data) < SIZE - 1:
            self.memory[start + 1 + len(data)] = 0
        self.memory[start] = 1
        return True

    def take(self, channel: int) -> str | None:
        start = channel * SIZE
        if not self.memory[start]:
            return None
        text = self.memory[start + 1:start + SIZE].split(b"\0")[0].decode()
        self.memory[start] = 0
        return text

    def _look(self) -> None:
        self._read_pipe()
        if self.queue and self.put(CONTROL, self.queue[0]):
            self.queue.pop(0)
        if time.monotonic() >= self._beat and self.put(HEARTBEAT, self.heartbeat):
            self._beat = time.monotonic() + HEARTBEAT_PERIOD
        if not self.listens:
            return
        if (text := self.take(STATUS)) is not None:
            self._status(text)
        if (text := self.take(GRAPHICS_REPLY)) is not None:
            self.seen.addresses |= dict(re.findall(r"<(\w+)>([^<]*)</", text))
        if (text := self.take(TRICKLE_UP)) is not None:
            self._take_files(text)

    def _status(self, text: str) -> None:
        numbers = {name: float(value) for name, value in re.findall(r"<(\w+)>([-+.\de]+)", text)}
        self.seen.statuses.append(numbers)
        self.seen.current_cpu_time = numbers.get("current_cpu_time", 0.0)
        checkpoint = numbers.get("checkpoint_cpu_time", 0.0)
        if checkpoint != self.seen.checkpoint_cpu_time:
            self.seen.checkpoint_cpu_time = checkpoint
            self.seen.checkpoints.append(checkpoint)
        self.seen.fraction_done = numbers.get("fraction_done") or self.seen.fraction_done
        if "other_pid" in numbers:
            self.seen.other_pids.append(int(numbers["other_pid"]))

    def _take_files(self, text: str) -> None:
        if "<have_new_trickle_up/>" in text:
            path = self.slot / "trickle_up.xml"
            self.seen.trickles.append(path.read_text())
            path.unlink()
        if "<have_new_upload_file/>" in text:
            for path in self.slot.glob("boinc_ufr_*"):
                name = path.name.removeprefix("boinc_ufr_")
                self.seen.uploads.append(name)
                path.unlink()
                (self.slot / f"boinc_ufs_{name}").write_text("<status>0</status>\n")
                self.put(TRICKLE_DOWN, "<upload_file_status/>\n")

    def _read_pipe(self) -> None:
        if self.process is None or self.process.stdout is None:
            return
        try:
            data = os.read(self.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data.decode()).split("\n")
        self.said += lines

    # -- its own end ---------------------------------------------------------------------------

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
