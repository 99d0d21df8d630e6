"""How far a job is, as a checkpoint must know it."""

from __future__ import annotations

from typing import Any

import msgspec

from vmjob.guest.client import TaskEnd

__all__ = ["Progress"]


class Progress(msgspec.Struct, frozen=True):
    """How far a job was, as the engine knows it.

    ``ends``: how its first tasks ended. ``number``: the agent's number of the task after those.
    ``received``: bytes of that task's streams that came; ``position``: bytes of all tasks' streams
    up to there. ``run_seconds`` of the job so far; ``messages_seen`` of its messages. ``daemons``:
    the agent's numbers of those; ``task_since``: run time when the task that runs began, seconds.
    ``folders``: what `Mirror.known` says of each folder, by name.
    """

    ends: list[TaskEnd]
    number: int
    received: dict[str, int]
    position: dict[str, int]
    run_seconds: float
    messages_seen: int
    daemons: list[int] = []
    task_since: float = 0.0
    folders: dict[str, dict[str, Any]] = {}
