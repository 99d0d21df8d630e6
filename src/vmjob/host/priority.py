"""How much of this computer a thread may take from others: its processor and its disk.

Linux only; elsewhere these do nothing, and nobody is told: a job that runs is better than one that
runs with manners.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform

__all__ = ["lower_disk_priority", "set_processor_priority"]

#: ``SYS_ioprio_set`` by machine (Linux, arch/*/entry/syscalls).
IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
#: ``IOPRIO_WHO_PROCESS``, and ``IOPRIO_CLASS_IDLE`` shifted to its place (linux/ioprio.h).
WHO_PROCESS = 1
CLASS_IDLE = 3 << 13


def lower_disk_priority() -> None:
    """Let the calling thread use the disk only when nobody else does."""
    number = IOPRIO_SET.get(platform.machine())
    if number is not None and os.name == "posix":
        ctypes.CDLL(None).syscall(number, WHO_PROCESS, 0, CLASS_IDLE)


def set_processor_priority(threads: list[int], *, low: bool) -> None:
    """Let threads run only when nobody else wants to (SCHED_IDLE), or like any program.

    Unlike a nice value, this can be taken back without privileges. A thread that is gone is no
    error.
    """
    if not hasattr(os, "SCHED_IDLE"):
        return
    policy = os.SCHED_IDLE if low else os.SCHED_OTHER
    for thread in threads:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(thread, policy, os.sched_param(0))
