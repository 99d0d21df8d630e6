"""How far a job is, as a checkpoint must know it."""

from __future__ import annotations

import msgspec

from vmjob.guest.client import TaskEnd

__all__ = ["Progress"]


class Progress(msgspec.Struct, frozen=True):
    """How far a job was, as the engine knows it.

    ``ends``: how its first tasks ended. ``number``: the agent's number of the task after those.
    ``received``: bytes of that task's streams that came; ``position``: bytes of all tasks' streams
    up to there. ``run_seconds`` of the job so far; ``messages_seen`` of its messages.
    """

    ends: list[TaskEnd]
    number: int
    received: dict[str, int]
    position: dict[str, int]
    run_seconds: float
    messages_seen: int
