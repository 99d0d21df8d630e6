"""Input and output templates: what a workunit's files are called, and what it may use.

BOINC's own defaults are too small for a virtual machine (1 GB of disk), and a job that passes a
bound is aborted. So the bounds are computed from the job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vmjob.errors import UsageError
from vmjob.job.model import Job
from vmjob.project import names
from vmjob.project.tags import block, flag, tag

__all__ = ["Bounds", "bounds", "input_template", "output_template"]

MIB, GIB = 1 << 20, 1 << 30
#: What QEMU and the wrapper take beside the machine's memory: 42 MB were measured for QEMU with a
#: used machine, 29 MB for vmjob; the rest is for translated code, which grows to at most 128 MB on
#: each of emulation's processors.
OWN_MEMORY = 256 * MIB
#: Logs, the journal of a folder, records; each is bounded.
OWN_DISK = 64 * MIB
#: Largest output that a client uploads unless the job says another size.
OUTPUT = 128 * MIB
#: The speed that the bound of operations is computed for: above that of any volunteer's core, for
#: the client divides by its own, and a bound that is passed ends the job.
FAST_FLOPS = 1e11
#: A usual core's, for the estimate.
USUAL_FLOPS = 5e9
#: How often a job's own limit of time fits into the bound: emulation takes ten times as long.
PATIENCE = 10
#: A job that has no time limit is taken to need this, seconds.
UNKNOWN_TIME = 6 * 3600.0
#: Days that a volunteer has, at least; a computer that is on 2 hours a day has 14 then.
LEAST_DELAY = 7 * 86400


@dataclass(frozen=True)
class Bounds:
    """What a workunit may use: bytes, operations, seconds until it must be reported."""

    disk: int
    memory: int
    fpops_est: float
    fpops_bound: float
    delay: int


def bounds(job: Job, *, image_bytes: int = 0, outputs: int = 1,
           output_bytes: int | None = None) -> Bounds:
    """The bounds of a job.

    ``image_bytes``: size of the image, whose files the slot's checkpoints link (the client counts
    links). ``outputs``, ``output_bytes``: how many, and the largest of one.

    Disk: what the machine may write, the frozen machine's memory, two generations of changed
    memory (which takes at most twice its size), one merge of the disk's layers, the outputs.
    """
    disk, memory = job.disk_gb * GIB, job.memory_mb * MIB
    largest = output_bytes or job.output_limit or OUTPUT
    seconds = job.time_limit or job.duration or UNKNOWN_TIME
    return Bounds(
        disk=2 * disk + 3 * memory + image_bytes + outputs * largest + OWN_DISK,
        memory=memory + OWN_MEMORY,
        fpops_est=seconds * USUAL_FLOPS * job.cpus,
        fpops_bound=seconds * PATIENCE * FAST_FLOPS * job.cpus,
        delay=max(LEAST_DELAY, math.ceil(seconds * PATIENCE * 2)))


def input_template(inputs: Sequence[str], limits: Bounds, *, copied: Sequence[str] = (),
                   command_line: str = "") -> str:
    """``templates/APP_in``: files by logical name, in the order of create_work's arguments."""
    for each in inputs:
        names.check_logical(each)
    if unknown := set(copied) - set(inputs):
        raise UsageError(f"{min(unknown)!r} is to be copied, but is none of the inputs")
    parts = [block("file_info", [tag("number", number)], "    ") for number in range(len(inputs))]
    refs = [block("file_ref", [tag("file_number", number), tag("open_name", each),
                               flag("copy_file", each in copied)], "    ")
            for number, each in enumerate(inputs)]
    unit = [*refs, tag("command_line", command_line) if command_line else "",
            tag("rsc_fpops_est", limits.fpops_est), tag("rsc_fpops_bound", limits.fpops_bound),
            tag("rsc_memory_bound", limits.memory), tag("rsc_disk_bound", limits.disk),
            tag("delay_bound", limits.delay)]
    return block("input_template", [*parts, block("workunit", unit, "    ")], "    ")


def output_template(outputs: Sequence[str], *, max_nbytes: int = OUTPUT,
                    copied: Sequence[str] = ()) -> str:
    """``templates/APP_out``. ``copied``: written by the job in its slot under the logical name.

    The two macros are BOINC's, which replaces them for each result.
    """
    if unknown := set(copied) - set(outputs):
        raise UsageError(f"{min(unknown)!r} is to be copied, but is none of the outputs")
    parts, refs = [], []
    for number, each in enumerate(outputs):
        names.check_logical(each)
        macro = f"<OUTFILE_{number}/>"
        parts.append(block("file_info", [
            f"<name>{macro}</name>\n", flag("generated_locally", True),
            flag("upload_when_present", True), tag("max_nbytes", max_nbytes),
            "<url><UPLOAD_URL/></url>\n"], "    "))
        refs.append(block("file_ref", [
            f"<file_name>{macro}</file_name>\n", tag("open_name", each),
            flag("copy_file", each in copied)], "    "))
    result = block("result", [*refs, flag("report_immediately", True)], "    ")
    return block("output_template", [*parts, result], "    ")
