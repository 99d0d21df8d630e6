"""Jobs of a development server, computed by a real client, to the last report."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from vmjob.errors import ResultOverdue
from vmjob.project.boinccmd import ClientTask
from vmjob.project.devclient import DevClient
from vmjob.project.devserver import DevServer, Result

__all__ = ["Volunteer", "compute"]

#: Seconds. After any failure of a job the client leaves a project alone for 1 to 2.5 minutes; asked
#: to update, it does not. It looks itself every 5 s, so asking oftener gains nothing.
UPDATE_EVERY = 5.0
LOOK_EVERY = 1.0


#: Share of a job that is done when its volunteer suspends it, and when he restarts the client.
SUSPEND_AT, RESTART_AT = 0.25, 0.55
#: Seconds for which it stands still, and for which there is no client.
STILL, AWAY = 6.0, 4.0


class Volunteer:
    """Does to the first task what volunteers do: suspends it, and switches the computer off.

    ``told`` hears of each act. `act` is to be called about once a second.
    """

    def __init__(self, client: DevClient, told: Callable[[str], None]) -> None:
        self._client = client
        self._told = told
        self._acts = iter((self._suspend, self._resume, self._restart))
        self._next: Callable[[ClientTask], bool] | None = next(self._acts)
        self._since = 0.0

    def act(self, tasks: list[ClientTask]) -> None:
        """Do what is due, if anything is; raises `ClientFailed`."""
        if tasks and self._next is not None and self._next(tasks[0]):
            self._since = time.monotonic()
            self._next = next(self._acts, None)

    def _suspend(self, task: ClientTask) -> bool:
        if task.active != "EXECUTING" or task.fraction_done < SUSPEND_AT:
            return False
        self._told("suspended")
        self._client.suspend(task.name)
        return True

    def _resume(self, task: ClientTask) -> bool:
        if time.monotonic() - self._since < STILL:
            return False
        self._told("resumed")
        self._client.resume(task.name)
        return True

    def _restart(self, task: ClientTask) -> bool:
        if task.active != "EXECUTING" or task.fraction_done < RESTART_AT:
            return False
        self._told("client quits")
        self._client.quit()
        time.sleep(AWAY)
        self._told("client starts")
        self._client.restart()
        return True


def compute(server: DevServer, client: DevClient, wanted: Collection[str], deadline: float,
            progress: Callable[[list[ClientTask]], None] | None = None) -> dict[str, Result]:
    """Wait until all ``wanted`` results are reported; returns them by name.

    ``progress`` is called with the client's tasks about once a second. Raises `ResultOverdue`
    after ``deadline`` seconds, naming what is missing, and `ClientFailed` when the client fails.
    """
    until = time.monotonic() + deadline
    updated = time.monotonic()
    names = frozenset(wanted)
    while not server.wait(lambda: names <= server.state.results.keys(),
                          min(LOOK_EVERY, max(0.0, until - time.monotonic()))):
        if time.monotonic() >= until:
            missing = sorted(names - server.results.keys())
            raise ResultOverdue(f"not reported in {deadline:g} s: {', '.join(missing)}",
                                log=client.log[-2000:])
        tasks = client.tasks()
        if progress is not None:
            progress(tasks)
        # Asked before it has anything, it would count that as its request for work.
        if tasks and time.monotonic() - updated >= UPDATE_EVERY:
            client.update()
            updated = time.monotonic()
    found = server.results
    return {name: found[name] for name in wanted}
