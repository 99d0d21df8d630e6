"""The wrapper's log, for a look at what it says."""

from __future__ import annotations

from vmjob.wrapper.log import Log

__all__ = ["NotedLog"]


class NotedLog(Log):
    """Keeps its lines, and writes none."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)
