"""A keeper's log: what it did, and what the machine's jobs have said. Bounded."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

__all__ = ["Log", "clean", "parse"]

#: Bytes that it may have; then the older half goes.
MOST = 256 * 1024


class Log(logging.Handler):
    """Lines ``TIME SOURCE TEXT`` in a file; also where Python's own loggers go."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC,
                          0o600)

    def write(self, source: str, text: str) -> None:
        """Append; a full disk loses the line, and nothing else."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            for line in text.splitlines() or [""]:
                data = f"{now} {source} {clean(line)}\n".encode(errors="replace")[-MOST // 2:]
                self._make_room(len(data))
                os.write(self.fd, data)
        except OSError:
            pass

    def emit(self, record: logging.LogRecord) -> None:
        self.write("python", self.format(record))

    def _make_room(self, wanted: int) -> None:
        size = os.fstat(self.fd).st_size
        if size + wanted <= MOST:
            return
        _, _, rest = os.pread(self.fd, MOST // 2, size - MOST // 2).partition(b"\n")
        os.ftruncate(self.fd, 0)
        os.write(self.fd, rest)


def clean(text: str) -> str:
    """Text of a stranger's, harmless to a terminal: one line, no control characters."""
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text)


def parse(line: str) -> dict[str, str]:
    """A line of the log; what no log line is, Python has written."""
    parts = line.split(" ", 2)
    if len(parts) == 3 and parts[0].endswith("Z") and parts[0][:4].isdecimal():
        return {"time": parts[0], "source": parts[1], "text": parts[2]}
    return {"time": "", "source": "python", "text": line}
