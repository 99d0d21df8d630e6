"""Whether a machine stands still, and for whom: its user, a checkpoint, or both.

Both ask at any time. What VirtualBox is told follows from what both want when it is told, one after
the other: so that neither lets go on what the other holds.
"""

from __future__ import annotations

import anyio

from vmjob.machine.virtualbox import definition
from vmjob.machine.virtualbox.faults import Kind
from vmjob.machine.virtualbox.manage import Manage

__all__ = ["Standing"]


class Standing:
    """Of one process of a machine, which runs at first."""

    def __init__(self, manage: Manage) -> None:
        self._manage = manage
        self._switching = anyio.Lock()
        self._wanted = self._held = False
        #: None: a call was cut off, so nobody knows.
        self._still: bool | None = False

    @property
    def runs(self) -> bool:
        """Whether it certainly runs: an order to stand still that got no answer may be obeyed."""
        return self._still is False

    async def suspend(self) -> None:
        """Stand still for its user; it does when this returns."""
        before, self._wanted = self._wanted, True
        try:
            await self._switch()
        except BaseException:
            self._wanted = before
            raise

    async def resume(self) -> None:
        """Go on, unless it is held."""
        before, self._wanted = self._wanted, False
        try:
            await self._switch()
        except BaseException:
            self._wanted = before
            raise

    async def hold(self) -> None:
        """Stand still for a checkpoint; `let_go` is called afterwards, also when this fails."""
        self._held = True
        await self._switch()

    async def let_go(self) -> None:
        """Go on, unless its user wants it to stand still."""
        self._held = False
        await self._switch()

    async def _switch(self) -> None:
        async with self._switching:
            still = self._wanted or self._held
            known, self._still = self._still, None
            if still == known:
                self._still = known
                return
            words = ("controlvm", definition.NAME, "pause" if still else "resume")
            answer = await self._manage.ask(*words)
            # What was cut off may have been done all the same.
            if answer.fault is not None and not (
                    known is None and answer.fault.kind is Kind.WRONG_STATE):
                self._still = known
                raise answer.fault.error(f"VBoxManage {words[0]}", command=list(words),
                                         exit_code=answer.exit_code)
            self._still = still
