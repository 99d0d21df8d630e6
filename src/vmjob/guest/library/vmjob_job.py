"""What a job in a vmjob machine may tell the host, without linking BOINC's library.

Outside such a machine every call does nothing, so that a program runs anywhere unchanged.
"""

import os

__all__ = ["fraction_done", "ops_cumulative", "time_to_checkpoint", "checkpoint_completed"]


def fraction_done(fraction):
    """Say how much of the work is done, 0 to 1."""
    _tell(f"fraction_done {float(fraction):.6g}")


def ops_cumulative(floating, integer):
    """Say how many floating-point and integer operations were done since the beginning."""
    _tell(f"ops_cumulative {float(floating):.17g} {float(integer):.17g}")


def time_to_checkpoint():
    """Whether to write a checkpoint of one's own now: never, the whole machine is kept."""
    return False


def checkpoint_completed():
    """Say that a checkpoint of one's own was written: the machine may be kept at this moment."""
    _tell("checkpoint_completed")


def _tell(line):
    pipe = os.environ.get("VMJOB_TO_HOST")
    if pipe:
        try:
            with open(pipe, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            pass  # nobody listens; that is no reason to fail
