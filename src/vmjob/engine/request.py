"""What is asked of the engine: a job, what it runs on, and how it is to survive."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmjob.engine.clock import Pace
from vmjob.engine.control import Control
from vmjob.job.model import Job
from vmjob.machine.contract import Driver, MachineSpec

if TYPE_CHECKING:
    from vmjob.engine.slot import Slot

__all__ = ["Request", "Survival"]


@dataclass(frozen=True)
class Survival:
    """How a job survives the end of the process that carries it.

    Everything of it is in ``slot``. Checkpoints are made at ``pace`` (None in it: only when asked
    for); the slot may take ``disk_limit`` bytes (None: what there is). Where the slot has
    checkpoints, the job continues from the newest that is good.
    """

    slot: Slot
    pace: Pace = field(default_factory=Pace)
    disk_limit: int | None = None


@dataclass(frozen=True)
class Request:
    """A job with what it runs on: a driver, the shape of its machine, and whom to tell.

    ``image_facts`` and ``machine_facts`` go into the record; the latter with what the driver tells.
    ``cold``: boot the machine, whatever templates there are. ``hashes``: whether the record gets
    the outputs' SHA-256 (they are read once more for it). ``keep``: where a failed job's machine
    logs go, if anywhere. ``control``: for who wants to suspend or keep it. ``remote_ports``:
    whether ports that the job wants to open for other computers may be.
    """

    job: Job
    driver: Driver
    shape: MachineSpec
    image_facts: dict[str, Any]
    machine_facts: dict[str, Any] = field(default_factory=dict)
    cold: bool = False
    hashes: bool = False
    keep: Path | None = None
    survival: Survival | None = None
    control: Control = field(default_factory=Control)
    remote_ports: bool = False
