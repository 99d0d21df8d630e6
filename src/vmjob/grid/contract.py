"""What the engine tells whoever asked for a job, and what it may ask of them."""

from __future__ import annotations

from typing import Literal, Protocol

__all__ = ["Grid", "Quiet"]


class Grid(Protocol):
    """Hears of one job's life. Calls come in order, from one event loop."""

    def phase(self, name: str) -> None:
        """A phase begins: ``image``, ``machine``, ``boot``, ``inputs``, ``run``, ``outputs``..."""
        ...

    def transferred(self, what: str, count: int) -> None:
        """``count`` bytes of an input or output have been copied (called from any thread)."""
        ...

    async def output(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """Output of the job; the job waits while this does."""
        ...

    async def input(self) -> bytes:
        """The next piece of the job's input; b'' at its end."""
        ...

    @property
    def has_input(self) -> bool:
        """Whether there is any input to give."""
        ...

    def task(self, title: str, number: int, count: int) -> None:
        """A task begins, or goes on: the ``number``th (from 1) of ``count``."""
        ...

    def message(self, text: str) -> None:
        """A line that the job sent to the host."""
        ...

    def fraction_done(self, fraction: float) -> None:
        """How much of the job is done, 0 to 1, by its own word."""
        ...

    def checkpoint(self, number: int, still_seconds: float, written_bytes: int) -> None:
        """A checkpoint is complete and safe; see `machine.contract.Checkpoint`."""
        ...

    async def trickle(self, variety: str, text: str) -> bool:
        """A message for the project's server; false: not now, ask again."""
        ...

    async def upload(self, name: str) -> None:
        """An output file, by its name in the shared folder, is ready before the job has ended."""
        ...

    def operations(self, floating: float, integer: float) -> None:
        """Floating-point and integer operations of the job so far, by its own word."""
        ...

    def address(self, what: Literal["web", "console", "port"], where: str) -> None:
        """The job is there: a page, its machine's screen, or another port of it."""
        ...

    def warning(self, text: str) -> None:
        """Something odd that does not change the outcome."""
        ...


class Quiet:
    """A grid that wants nothing; a base for those that want something."""

    has_input = False

    def phase(self, name: str) -> None: ...

    def transferred(self, what: str, count: int) -> None: ...

    async def output(self, stream: Literal["stdout", "stderr"], data: bytes) -> None: ...

    async def input(self) -> bytes:
        return b""

    def task(self, title: str, number: int, count: int) -> None: ...

    def message(self, text: str) -> None: ...

    def fraction_done(self, fraction: float) -> None: ...

    def checkpoint(self, number: int, still_seconds: float, written_bytes: int) -> None: ...

    async def trickle(self, variety: str, text: str) -> bool:
        return True

    async def upload(self, name: str) -> None: ...

    def operations(self, floating: float, integer: float) -> None: ...

    def address(self, what: Literal["web", "console", "port"], where: str) -> None: ...

    def warning(self, text: str) -> None: ...
