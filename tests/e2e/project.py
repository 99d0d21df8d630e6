"""A project with vmjob's own apps as the real client meets it: server, app versions, one client."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from tests.conftest import TOKEN, session_processes, wait_until_gone
from vmjob.errors import VmjobError
from vmjob.home import Home
from vmjob.image.store import Image
from vmjob.project import signing
from vmjob.project.boinccmd import ClientTask
from vmjob.project.devclient import DevClient
from vmjob.project.devserver import DevServer, Result
from vmjob.project.package import package
from vmjob.project.trial import compute

__all__ = ["EMULATION", "Project", "lend_templates"]

#: A project's consent to emulation, on the command line of its jobs.
EMULATION = "--allow-emulation"
#: Seconds that one job may take on a computer with other work; alone it takes 30 to 60.
DEADLINE = 400.0
#: Seconds between looks at the client's tasks.
LOOK_EVERY = 0.5
#: Characters of each log that a failed test shows.
MOST_SHOWN = 6000

#: The signatures' key: made once, for it takes a second.
_KEY = signing.generate()


class Project:
    """A server and one client of it, in ``root``; a context manager.

    ``templates`` is a home whose templates are used. ``client``: options of `DevClient`. All that
    the client shows of its tasks is kept in `seen`, for what is over soon.
    """

    def __init__(self, root: Path, image: Image, templates: Home, **client: Any) -> None:
        self.root = root
        self.image = image
        (root / "jobs").mkdir(parents=True)
        self.server = DevServer(root / "server", key=_KEY, next_rpc_delay=5)
        options = {"checkpoint_period": 10.0, **client}
        options["environment"] = {"VMJOB_TEST_TOKEN": TOKEN, **options.get("environment", {})}
        self.client = DevClient(root / "client", url=self.server.url,
                                authenticator=self.server.authenticator, **options)
        lend_templates(templates, self.client.project_directory / "vmjob")
        self.seen: dict[str, list[ClientTask]] = {}
        #: Most tasks that were executing at one look.
        self.most_at_once = 0
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, name="watch", daemon=True)

    # -- life ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.server.start()
        try:
            self.client.start()
        except BaseException:
            self.server.close()
            raise
        self._watch.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._watch.join()
        try:
            self.client.close()
        finally:
            self.server.close()

    def left(self) -> list[psutil.Process]:
        """Processes that are still there some seconds after the end of all."""
        return wait_until_gone(session_processes(self.root))

    # -- what there is to compute --------------------------------------------------------------

    def app(self, name: str, job: str, *, job_name: str = "vmjob.toml",
            files: Mapping[str, str | bytes | Path] | None = None, copied: Sequence[str] = (),
            inputs: Sequence[str] = (), file_prefix: str = "",
            needs_network: bool = True) -> None:
        """Package an app version 1.00 and offer it.

        ``files``: logical name -> path or content. ``needs_network`` False: it may run without one,
        whatever its job says.
        """
        place = self.root / "apps of" / name
        place.mkdir(parents=True)
        (place / job_name).write_text(job)
        made = package(self.root / "apps", app=name, number="1.00", job=place / job_name,
                       image=self.image, key=_KEY, inputs=inputs, copied=copied,
                       file_prefix=file_prefix,
                       files={logical: self._file(place / logical, each)
                              for logical, each in (files or {}).items()})
        directory = made.version.directory
        assert directory is not None
        if not needs_network:
            described = directory / "version.xml"
            described.write_text(re.sub(r"<needs_network.*\n", "", described.read_text()))
        self.server.add_version(directory)

    def add(self, app: str, inputs: Mapping[str, str | bytes | Path] | None = None,
            outputs: Sequence[str] = (), *, arguments: str = "", consent: bool = True,
            **more: Any) -> str:
        """Queue a job; returns its result's name. ``more``: as `DevServer.add_job` takes it."""
        place = self.root / "jobs" / str(len(list((self.root / "jobs").iterdir())))
        place.mkdir()
        given = {logical: self._file(place / logical, each)
                 for logical, each in (inputs or {}).items()}
        line = " ".join(filter(None, [EMULATION if consent else "", arguments]))
        more = {"disk_bound": 10e9, "memory_bound": 5e8, **more}
        return self.server.add_job(app=app, inputs=given, outputs=outputs, command_line=line,
                                   **more)

    # -- what comes of it ----------------------------------------------------------------------

    def result(self, name: str, deadline: float = DEADLINE) -> Result:
        """The server's record of a job, when it is reported."""
        return compute(self.server, self.client, [name], deadline)[name]

    def until(self, name: str, condition: Callable[[ClientTask], bool],
              deadline: float = DEADLINE) -> ClientTask:
        """The first look at a task, in the past too, at which the client showed it like this."""
        def found() -> ClientTask | None:
            return next((each for each in self.seen.get(name, []) if condition(each)), None)

        with self._changed:
            task = self._changed.wait_for(found, deadline)
        if task is None:
            last = self.seen.get(name, [None])[-1]
            raise AssertionError(f"{name} was never as expected in {deadline:g} s; last: {last}")
        return task

    def pids(self, name: str) -> set[int]:
        """The processes of a task now: the wrapper, and all below it."""
        task = self.client.task(name)
        if task is None or task.pid is None:
            return set()
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(task.pid)
            return {process.pid, *(each.pid for each in process.children(recursive=True))}
        return set()

    def slot_of(self, name: str) -> Path:
        """The directory that a task runs in, or ran in when it was seen last."""
        number = self.until(name, lambda task: task.slot is not None).slot
        assert number is not None
        return self.client.slot(number)

    def explanation(self) -> Iterator[tuple[str, str]]:
        """(title, text) of all that tells what happened, for a test that failed."""
        yield "client's log", self.client.log[-MOST_SHOWN:]
        for path in sorted(self.client.folder.glob("slots/*/stderr.txt")):
            yield str(path.relative_to(self.client.folder)), path.read_text(
                "utf-8", "replace")[-MOST_SHOWN:]
        for name, result in self.server.results.items():
            yield name, (f"exit {result.exit_status}, state {result.state}, {result.message}\n"
                         f"{result.stderr_out[:MOST_SHOWN]}")
        yield "server's events", "\n".join(
            f"{each.kind} {each.facts}" for each in self.server.events if each.kind != "rpc"
        )[-MOST_SHOWN:]

    # -- inside --------------------------------------------------------------------------------

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY):
            try:
                tasks = self.client.tasks()
            except VmjobError:  # it is being started again
                continue
            with self._changed:
                for task in tasks:
                    history = self.seen.setdefault(task.name, [])
                    if not history or history[-1] != task:
                        history.append(task)
                self.most_at_once = max(self.most_at_once, sum(
                    task.active == "EXECUTING" for task in tasks))
                self._changed.notify_all()

    @staticmethod
    def _file(path: Path, content: str | bytes | Path) -> Path:
        if isinstance(content, Path):
            return content
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def lend_templates(shared: Home, root: Path) -> Home:
    """A home in ``root`` that uses another's templates and proofs; its images are its own.

    A frozen machine takes 10 to 20 s to make, and the proof that KVM does not work takes 10.
    """
    home = Home(root)
    root.mkdir(parents=True)
    for path in (shared.templates, shared.cache, shared.locks):
        (root / path.name).symlink_to(path)
    return home
