"""A project's server for development: on this computer, for one client or a few, no database."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from vmjob.errors import (
    HostError,
    InputMissing,
    PackageInvalid,
    PortTaken,
    ResultOverdue,
    SignatureInvalid,
    UsageError,
)
from vmjob.project import names, signing
from vmjob.project.devserver import request as requests
from vmjob.project.devserver.records import (
    Event,
    InputFile,
    Job,
    Offer,
    Result,
    ServedFile,
    Trickle,
)
from vmjob.project.devserver.reply import Message, Reply, reply_text
from vmjob.project.devserver.state import State
from vmjob.project.devserver.web import WebServer
from vmjob.project.version import AppVersion, VersionFile, read

__all__ = ["DevServer"]

#: Bounds of a job where nobody says others: enough for a small machine.
DISK, MEMORY = 10e9, 1e9
#: What a job is said to need, and may need; with the speed of `reply.FLOPS`, 100 s and 11 days.
FPOPS_EST, FPOPS_BOUND = 1e11, 1e15
MAX_NBYTES = 100_000_000
DELAY_BOUND = 86400.0
#: Lines of a trickle that the client reads have less than 256 bytes.
MAX_LINE = 250


class DevServer:
    """A project that the real client attaches to, computes for and reports to.

        with DevServer(root) as server:
            server.add_version(directory)
            name = server.add_job(app="worker", inputs={"in": path}, outputs=["out"])
            result = server.wait_result(name, deadline=120)

    Everything is below ``root``: ``download/``, ``upload/``, ``keys/``. ``port`` 0 is any that is
    free. ``key`` signs what is not signed yet (default: one made, or found, in ``root/keys``); a
    public one suffices where all files are signed. ``request_delay`` and ``next_rpc_delay`` are
    seconds: how long a client waits before it asks again, and when it asks even without a reason
    (None: never; give it for aborts and trickles to jobs that run). ``preferences``: the inside of
    <project_specific>. ``email`` and ``password`` are those of the only account. ``listener`` is
    called with every `Event`, from the server's threads.

    Raises `PortTaken`, `HostError`, `KeyFileInvalid`.
    """

    email = "volunteer@localhost"
    password = "volunteer"  # noqa: S105 (an account of nobody, on loopback)

    def __init__(self, root: Path, *, port: int = 0, name: str = "vmjob development",
                 key: signing.PrivateKey | signing.PublicKey | None = None,
                 request_delay: float = 1.0, next_rpc_delay: float | None = None,
                 preferences: str = "", listener: Callable[[Event], None] | None = None) -> None:
        self.root = root.absolute()
        self.name = name
        self.request_delay = request_delay
        self.next_rpc_delay = next_rpc_delay
        self.preferences = preferences
        try:
            for each in ("download", "upload"):
                (self.root / each).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(f"cannot make {error.filename}: {error.strerror}",
                            advice="Give a directory that you may write to.") from None
        self._key = key if key is not None else _key_of(self.root / "keys")
        public = self._key.public if isinstance(self._key, signing.PrivateKey) else self._key
        self.state = State(self.root / "upload", public, listener or (lambda event: None))
        self._numbers = itertools.count(1)
        # Names differ between servers too: a client never computes a name a second time.
        self._run = f"{int(time.time())}_{secrets.token_hex(2)}"
        try:
            self._web = WebServer(port, self)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno not in {errno.EADDRINUSE, errno.EACCES}:
                raise HostError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}") from None
            raise PortTaken(f"port {port} of 127.0.0.1 cannot be had") from None
        self.port = self._web.server_port
        self.url = f"http://127.0.0.1:{self.port}/"
        self._thread: threading.Thread | None = None

    # -- life --------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to answer; ``with`` does it, too."""
        # The period matters only for how fast `close` is.
        self._thread = threading.Thread(target=self._web.serve_forever, args=(0.05,),
                                        name="devserver", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop answering. The files stay."""
        if self._thread is not None:
            self._web.shutdown()
            self._thread.join()
            self._thread = None
        self._web.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what there is to compute ------------------------------------------------------------

    @property
    def authenticator(self) -> str:
        """The key of the only account: with it a client attaches."""
        return self.state.authenticator

    @property
    def platforms(self) -> list[str]:
        """For which there are app versions."""
        with self.state.changed:
            return sorted({each.version.platform for each in self.state.offers})

    def add_version(self, directory: Path, *,
                    signatures: Literal["check", "ignore", "serve"] = "check") -> AppVersion:
        """Offer the app version of a directory; several may be offered at once.

        A job gets the one with the highest number that its client can run; of equal ones, the last
        added. ``signatures``: those beside the files are checked with the server's key, ignored (it
        signs all anew), or served as they are. Raises `PackageInvalid`, `SignatureInvalid`.
        """
        version = read(directory)
        files: dict[str, ServedFile] = {}
        signed: dict[str, str] = {}
        for each in version.files:
            files[each.physical_name] = served = self._serve(each.physical_name, each.path,
                                                             linked=True)
            signed[each.physical_name] = self._signature(each, served, signatures)
        with self.state.changed:
            self.state.files |= files
            self.state.offers.append(Offer(version, files, signed))
        return version

    def add_job(self, *, app: str, inputs: Mapping[str, Path] | None = None,
                outputs: Sequence[str] = (), command_line: str = "",
                disk_bound: float = DISK, memory_bound: float = MEMORY,
                fpops_est: float = FPOPS_EST, fpops_bound: float = FPOPS_BOUND,
                max_nbytes: int = MAX_NBYTES, delay_bound: float = DELAY_BOUND,
                copy_inputs: Collection[str] = (),
                copy_outputs: bool | Collection[str] = False,
                plan_class: str | None = None) -> str:
        """Queue a job for whichever client asks next; returns its result's name.

        ``inputs``: logical name -> file, copied now; those in ``copy_inputs`` are copied into the
        slot. ``outputs``: logical names; ``copy_outputs`` (all, or which): the job writes
        them in its slot.
        Bounds: bytes; operations (`FPOPS_BOUND` is 11 days of elapsed time); ``max_nbytes`` of
        each output; ``delay_bound`` seconds to the deadline. ``plan_class``: only of that class.
        """
        workunit = f"{names.check_app(app)}_{self._run}_{next(self._numbers)}"
        if "\n" in command_line or "\0" in command_line:
            raise UsageError("a command line is one line")
        taken = []
        for logical, path in (inputs or {}).items():
            mark = names.check_logical(logical).replace("/", "_")
            taken.append(InputFile(self._serve(f"{workunit}_{mark}", path, linked=False), logical,
                                   logical in copy_inputs))
        copied = frozenset((outputs if copy_outputs else ()) if isinstance(copy_outputs, bool)
                           else copy_outputs)
        job = Job(f"{workunit}_0", workunit, app, tuple(taken),
                  tuple(map(names.check_logical, outputs)), command_line, disk_bound, memory_bound,
                  fpops_est, fpops_bound, max_nbytes, delay_bound, copied, plan_class)
        names.check_result(job.name)
        with self.state.changed:
            self.state.files |= {each.file.name: each.file for each in taken}
            self.state.add_job(job)
        return job.name

    # -- what comes of it --------------------------------------------------------------------

    @property
    def results(self) -> dict[str, Result]:
        """What was reported so far, by the result's name."""
        with self.state.changed:
            return dict(self.state.results)

    @property
    def trickles(self) -> list[Trickle]:
        """What running jobs have sent, in the order in which it came."""
        with self.state.changed:
            return list(self.state.trickles)

    @property
    def events(self) -> list[Event]:
        """All that has happened: queued, download, upload, rpc, report, trickle, account."""
        with self.state.changed:
            return list(self.state.events)

    def wait_result(self, name: str, deadline: float) -> Result:
        """The result, once it is reported; raises `ResultOverdue` after ``deadline`` seconds."""
        if not self.wait(lambda: name in self.state.results, deadline):
            raise ResultOverdue(f"the result {name!r} was not reported in {deadline:g} s")
        return self.results[name]

    def wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait until ``condition`` holds, asked after every event; False after so many seconds."""
        with self.state.changed:
            return self.state.changed.wait_for(condition, deadline)

    def wait_event(self, kind: str, deadline: float, **facts: object) -> Event:
        """The first event of a kind with these facts; raises `ResultOverdue`."""

        def found() -> Event | None:
            return next((each for each in self.state.events if each.kind == kind
                         and facts.items() <= each.facts.items()), None)

        with self.state.changed:
            event = self.state.changed.wait_for(found, deadline)
        if event is None:
            raise ResultOverdue(f"no {kind} {facts or ''} in {deadline:g} s")
        return event

    # -- what a client is told at its next request -------------------------------------------

    def send_trickle_down(self, name: str, text: str) -> None:
        """Send a message to a running job: lines of at most 250 bytes each."""
        self._known(name)
        if any(len(line.encode()) > MAX_LINE for line in text.splitlines()) \
                or "</trickle_down>" in text:
            raise UsageError(f"a trickle has lines of at most {MAX_LINE} bytes")
        self.state.send_down(Trickle(name, int(time.time()), "", text))

    def abort(self, name: str) -> None:
        """End a job; one that nobody has fetched is never sent."""
        self._known(name)
        self.state.abort(name)

    def message(self, text: str, priority: Literal["low", "notice"] = "low") -> None:
        """Tell the volunteer something: in the log, or as a notice."""
        with self.state.changed:
            self.state.messages.append(Message(text, priority))

    def fail_uploads(self, count: int) -> None:
        """Answer the next uploads with "later", which the client tries again 2 minutes after."""
        with self.state.changed:
            self.state.upload_failures = count

    # -- inside ------------------------------------------------------------------------------

    def schedule(self, body: bytes) -> str:
        """The reply to a client's request."""
        reply = Reply(self.url, self.name, self.request_delay, self.next_rpc_delay,
                      preferences=self.preferences)
        self.state.schedule(requests.parse(body), reply)
        return reply_text(reply)

    def _known(self, name: str) -> None:
        with self.state.changed:
            if name not in self.state.jobs:
                raise UsageError(f"there is no result {name[:80]!r}")

    def _serve(self, name: str, path: Path, *, linked: bool) -> ServedFile:
        """Make a file available below ``download/``; a name never gets another content."""
        names.check_physical(name, ours=False)
        target = self.root / "download" / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputMissing(f"{str(path)!r} is not a file", advice="Check the path.")
            md5 = signing.md5_of(path)
            if target.exists() and signing.md5_of(target) != md5:
                raise PackageInvalid(f"{name!r} has another content than before",
                                     advice="Files are immutable: give it another name, or the "
                                            "app another version.")
            if not target.exists():
                _place(path.resolve(), target, linked=linked)
            return ServedFile(name, target, target.stat().st_size, md5)
        except OSError as error:
            raise InputMissing(f"cannot read {str(path)!r}: {error.strerror}",
                               advice="Check the path.") from None

    def _signature(self, file: VersionFile, served: ServedFile, signatures: str) -> str:
        given = file.signature
        if given and signatures == "check" and not self.state.key.verifies(served.md5, given):
            raise SignatureInvalid(f"{file.physical_name}.sig is not of this server's key",
                                   advice="Give the server the key that signed it, or let it sign "
                                          "anew.")
        if given and signatures != "ignore":
            return given
        if not isinstance(self._key, signing.PrivateKey):
            raise SignatureInvalid(f"{file.physical_name} is not signed, and the server has a "
                                   "public key only",
                                   advice="Sign it, or give the server the private key.")
        return self._key.sign(served.md5)


def _place(source: Path, target: Path, *, linked: bool) -> None:
    if linked:
        try:
            os.link(source, target)
        except OSError:  # another file system
            pass
        else:
            return
    shutil.copyfile(source, target)


def _key_of(directory: Path) -> signing.PrivateKey:
    path = directory / signing.PRIVATE_FILE
    if not path.exists():
        signing.write_keys(directory, signing.generate())
    key = signing.read_key(path)
    assert isinstance(key, signing.PrivateKey)
    return key
