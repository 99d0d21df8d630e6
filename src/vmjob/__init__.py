"""Run a Linux job in a throw-away virtual machine.

    import vmjob

    with vmjob.Machine.create() as machine:
        result = machine.run(["echo", "hello"])
        print(result.exit_code, result.stdout_text)

Names are loaded when they are first used, so that ``import vmjob`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vmjob.api import AsyncMachine, Kept, Machine, Result
    from vmjob.engine.record import Record
    from vmjob.errors import (
        GuestError,
        HostError,
        ImageError,
        JobError,
        MachineError,
        UsageError,
        VmjobError,
    )
    from vmjob.guest.client import Entry, Limits, TaskEnd
    from vmjob.job.files import Folder, Input, Output
    from vmjob.job.model import Forward, Hardware, Job, Task, Triggers
    from vmjob.pool import AsyncPool, Pool

__all__ = [
    # a machine, by hand
    "Machine", "AsyncMachine", "Result", "Kept", "Limits", "TaskEnd", "Entry",
    # machines that are ready before they are asked for
    "Pool", "AsyncPool",
    # a job, as a whole
    "Job", "Task", "Input", "Output", "Folder", "Triggers", "Forward", "Hardware", "Record",
    # what can go wrong
    "VmjobError", "UsageError", "HostError", "ImageError", "MachineError", "GuestError",
    "JobError",
]  # fmt: skip

_HOMES = {
    "Machine": "api", "AsyncMachine": "api", "Result": "api", "Kept": "api",
    "Limits": "guest.client",
    "TaskEnd": "guest.client", "Entry": "guest.client", "Job": "job.model", "Task": "job.model",
    "Triggers": "job.model", "Forward": "job.model", "Hardware": "job.model",
    "Input": "job.files", "Output": "job.files", "Folder": "job.files", "Record": "engine.record",
    "Pool": "pool", "AsyncPool": "pool",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'vmjob' has no attribute {name!r}")
    home = importlib.import_module(f"vmjob.{_HOMES.get(name, 'errors')}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
