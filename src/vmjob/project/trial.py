"""Jobs of a development server, computed by a real client, to the last report."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from vmjob.errors import ResultOverdue
from vmjob.project.boinccmd import ClientTask
from vmjob.project.devclient import DevClient
from vmjob.project.devserver import DevServer, Result

__all__ = ["compute"]

#: Seconds. After any failure of a job the client leaves a project alone for 1 to 2.5 minutes; asked
#: to update, it does not. It looks itself every 5 s, so asking oftener gains nothing.
UPDATE_EVERY = 5.0
LOOK_EVERY = 1.0


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
