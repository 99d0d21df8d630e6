"""The states of a job, and which may follow which: docs/explanation/life.md has the picture.

    image -> [template] -> machine -> boot | thaw -> inputs -> run -> outputs -> end -> ended
                              \\-> restore ----------------------^
    run <-> checkpoint      run <-> suspended

A state is what `Grid.phase` hears and what `Record.phases` counts seconds of. Whatever fails goes
to ``end``: the machine is removed there.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Iterator

from vmjob.engine.record import Record
from vmjob.grid.contract import Grid

__all__ = ["NEXT", "Life", "State"]


class State(enum.StrEnum):
    """Where a job is in its life."""

    IMAGE = "image"  # the image is found, checked, or built
    TEMPLATE = "template"  # a machine is frozen, for this job and later ones
    MACHINE = "machine"  # the machine's directory and disk are made
    BOOT = "boot"  # it boots, until its agent answers
    THAW = "thaw"  # it starts as a copy of a frozen one, until its agent answers
    RESTORE = "restore"  # it continues from a checkpoint, until its agent answers
    INPUTS = "inputs"  # files are copied in
    RUN = "run"  # tasks run, one after the other
    CHECKPOINT = "checkpoint"  # all of it is being written, while the tasks run
    SUSPENDED = "suspended"  # the machine stands still
    OUTPUTS = "outputs"  # files are copied out
    END = "end"  # the machine is ended and removed
    ENDED = "ended"  # nothing but the record is left


S = State
#: What may come after each state. An error or a cancellation leads from any of them to END.
NEXT: dict[State, frozenset[State]] = {
    S.IMAGE: frozenset({S.TEMPLATE, S.MACHINE, S.ENDED}),
    S.TEMPLATE: frozenset({S.MACHINE, S.END}),
    S.MACHINE: frozenset({S.BOOT, S.THAW, S.RESTORE, S.MACHINE, S.TEMPLATE, S.END}),
    # A copy or a checkpoint that does not answer is given up for the next best.
    S.BOOT: frozenset({S.INPUTS, S.MACHINE, S.END}),
    S.THAW: frozenset({S.INPUTS, S.MACHINE, S.END}),
    S.RESTORE: frozenset({S.RUN, S.MACHINE, S.TEMPLATE, S.END}),
    S.INPUTS: frozenset({S.RUN, S.END}),
    S.RUN: frozenset({S.OUTPUTS, S.CHECKPOINT, S.SUSPENDED, S.END}),
    S.CHECKPOINT: frozenset({S.RUN, S.SUSPENDED, S.END}),
    S.SUSPENDED: frozenset({S.RUN, S.END}),
    S.OUTPUTS: frozenset({S.END}),
    S.END: frozenset({S.ENDED}),
    S.ENDED: frozenset(),
}


class Life:
    """One job's way through its states; tells the grid, and counts seconds in the record."""

    def __init__(self, record: Record, grid: Grid) -> None:
        self.state = State.IMAGE
        self._record = record
        self._grid = grid
        self._began = self._since = time.monotonic()

    def enter(self, state: State) -> None:
        """Go on to a state; an impossible one is a bug (`AssertionError`)."""
        if state is self.state:
            return
        assert state in NEXT[self.state] or state is State.END, f"{self.state} -> {state}"
        self._count()
        self.state = state
        if state is not State.ENDED:
            self._grid.phase(str(state))

    @contextlib.contextmanager
    def during(self, state: State) -> Iterator[None]:
        """Be in a state for a while, then in RUN again unless the job has ended meanwhile."""
        self.enter(state)
        try:
            yield
        finally:
            if self.state is state:
                self.enter(State.RUN)

    def finish(self) -> None:
        """Nothing is left to do."""
        if self.state is not State.IMAGE:
            self.enter(State.END)
        self.enter(State.ENDED)
        self._record.phases["total"] = time.monotonic() - self._began

    def _count(self) -> None:
        now = time.monotonic()
        if self.state is not State.IMAGE:  # who found the image counts that
            phases = self._record.phases
            phases[str(self.state)] = phases.get(str(self.state), 0.0) + now - self._since
        self._since = now
