"""The project behind the server: what it offers, what it has sent, what came back.

All of it is guarded by one condition, which is notified whenever something has come.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vmjob.project.devserver.records import (
    Event,
    Job,
    Offer,
    Reported,
    Result,
    ServedFile,
    Trickle,
)
from vmjob.project.devserver.reply import Assignment, Message, Reply
from vmjob.project.devserver.request import Request
from vmjob.project.signing import PublicKey

__all__ = ["State"]

#: Jobs in one reply.
MAX_JOBS = 50
#: Events, and trickles, that are kept; a client that never stops fills no memory.
MAX_KEPT = 100_000


class State:
    """Jobs and their fate. Every public method may be called from any thread."""

    def __init__(self, uploads: Path, key: PublicKey, listener: Callable[[Event], None]) -> None:
        self.changed = threading.Condition()
        self.authenticator = secrets.token_hex(16)
        self.key = key
        self.files: dict[str, ServedFile] = {}
        self.offers: list[Offer] = []
        self.jobs: dict[str, Job] = {}
        self.results: dict[str, Result] = {}
        self.trickles: list[Trickle] = []
        self.events: list[Event] = []
        self.messages: list[Message] = []
        self.uploaded: set[str] = set()
        self.upload_failures = 0
        self._uploads = uploads
        self._listener = listener
        self._queue: list[str] = []
        self._sent: dict[str, None] = {}
        self._downward: list[Trickle] = []
        self._aborts: list[str] = []
        self._hosts = 0

    # -- what the project's people do --------------------------------------------------------

    def add_job(self, job: Job) -> None:
        with self.changed:
            self.jobs[job.name] = job
            self._queue.append(job.name)
            self.event("queued", name=job.name)

    def send_down(self, trickle: Trickle) -> None:
        with self.changed:
            self._downward.append(trickle)

    def abort(self, name: str) -> None:
        with self.changed:
            if name in self._queue:
                self._queue.remove(name)
            else:
                self._aborts.append(name)

    def event(self, kind: str, **facts: Any) -> None:
        """Note that something happened, and wake whoever waits."""
        with self.changed:
            event = Event(kind, facts)
            if len(self.events) < MAX_KEPT:
                self.events.append(event)
            self._listener(event)
            self.changed.notify_all()

    # -- what clients do ---------------------------------------------------------------------

    def upload_path(self, name: str) -> tuple[Path, int] | None:
        """Where an output goes, and its largest size; None for what no job has."""
        with self.changed:
            stem, _, number = name.rpartition("_")
            job = self.jobs.get(stem)
            if job is None or number not in map(str, range(len(job.outputs))):
                return None
            return self._uploads / name, job.max_nbytes

    def upload_fails(self) -> bool:
        """Whether this upload is one of those that are to fail."""
        with self.changed:
            if self.upload_failures:
                self.upload_failures -= 1
                return True
            return False

    def schedule(self, request: Request, reply: Reply) -> None:
        """Take what the client reports, and fill the reply."""
        with self.changed:
            if not secrets.compare_digest(request.authenticator.encode(),
                                          self.authenticator.encode()):
                reply.messages.append(Message("Invalid or missing account key.", "notice"))
                self.event("refused", client=request.client)
                return
            if request.host_id == 0:
                self._hosts += 1
                reply.host_id = self._hosts
            if not request.has_key:
                reply.key_text = self.key.text
            reply.messages += self.messages
            self.messages = []
            for reported in request.results:
                self._take(reported)
                reply.acknowledged.append(reported.name)
            for trickle in request.trickles:
                if trickle.result in self.jobs and len(self.trickles) < MAX_KEPT:
                    self.trickles.append(trickle)
                    self.event("trickle", result=trickle.result, variety=trickle.variety)
            reply.acknowledge_trickles = bool(request.trickles)
            reply.trickles, self._downward = self._downward, []
            reply.aborts, self._aborts = self._aborts, []
            if request.wanted > 0:
                reply.assignments = list(self._work(request))
            self.event("rpc", sequence=request.sequence, wanted=request.wanted,
                       reported=[each.name for each in request.results],
                       gave=[each.job.name for each in reply.assignments],
                       client=request.client)

    # -- inside ------------------------------------------------------------------------------

    def _take(self, reported: Reported) -> None:
        # A job could put words of a report into its own output: only the first report of what was
        # sent counts.
        job = self.jobs.get(reported.name)
        if job is None or reported.name not in self._sent or reported.name in self.results:
            return
        outputs = {logical: self._uploads / name for number, logical in enumerate(job.outputs)
                   if (name := job.output_name(number)) in self.uploaded}
        self.results[job.name] = Result(**vars(reported), outputs=outputs)
        self.event("report", name=job.name, exit_status=reported.exit_status, state=reported.state)

    def _work(self, request: Request) -> Iterable[Assignment]:
        # What was sent and is neither reported nor there was lost on the way: once more.
        lost = [name for name in self._sent
                if name not in self.results and name not in request.held]
        for name in (lost + self._queue)[:MAX_JOBS]:
            assignment = self._assignment(self.jobs[name], request)
            if assignment is None:
                continue
            if name in self._queue:
                self._queue.remove(name)
            self._sent[name] = None
            yield assignment

    def _assignment(self, job: Job, request: Request) -> Assignment | None:
        """The newest app version that this client can run, or its own."""
        if request.anonymous:
            held = [each for each in request.versions if each.app == job.app]
            return Assignment(job, None, max(held, key=lambda each: each.version_num)) \
                if held else None
        offers = [each for each in self.offers
                  if each.version.app == job.app and each.version.platform in request.platforms
                  and job.plan_class in {None, each.version.plan_class}]
        # Of equal numbers the one that was added last.
        best = max(enumerate(offers), key=lambda each: (each[1].version.version_num, each[0]),
                   default=None)
        return Assignment(job, best[1]) if best is not None else None
