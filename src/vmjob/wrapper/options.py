"""The command line of the application version and the workunit, read."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """None: not said. ``arguments``: what is the job's."""

    arguments: tuple[str, ...] = ()
    cpus: int | None = None
    memory_mb: float | None = None
    image_number: int | None = None
    trickle_every: float | None = None
    sporadic: bool = False
    prepare_only: bool = False
    emulation: bool = False
