"""``stderr.txt``: what a scientist reads of a job, far away, often years later.

While the job runs it is a log, a line for each thing that happened. When the job is over, the cause
goes to the top: the client sends the last 63 KiB to the project's server, so all of it together is
kept shorter than that.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections import deque
from pathlib import Path

__all__ = ["Log", "Tail", "shown"]

FILE = "stderr.txt"
#: Bytes of the whole file at the end; what the client sends is 63 KiB.
MOST = 60 << 10
#: Bytes of the log that one process writes; a job that talks for ever is not read for ever.
MOST_LOG = 24 << 10
#: Bytes of one line.
MOST_LINE = 1000


def shown(text: str) -> str:
    """One line of a text of anybody's: no control characters, no more than a line's length."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= MOST_LINE else f"{line[:MOST_LINE]}..."


def _harmless(data: bytes) -> bytes:
    """Without what the client, or a server, would take for a word of ours to them."""
    # The client sends it as CDATA, and a server takes what follows its end for tags.
    data = data.replace(b"]]>", b"]] >")
    # Of an app whose plan class has "vbox" in it, the client believes this for good, and its
    # computer gets no jobs for virtual machines any more: a guest only had to print it.
    return data.replace(b"ERR_CPU_VM_EXTENSIONS_DISABLED", b"ERR_CPU_VM_EXTENSIONS DISABLED")


class Tail:
    """The end of a stream, bounded."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pieces: deque[bytes] = deque()
        self._size = self.total = 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        self._pieces.append(data[-self._most:])
        self._size += len(self._pieces[-1])
        while self._size - len(self._pieces[0]) >= self._most:
            self._size -= len(self._pieces.popleft())

    @classmethod
    def of(cls, path: Path, most: int) -> Tail:
        """The end of a file; an empty one where it cannot be read."""
        tail = cls(most)
        with contextlib.suppress(OSError), path.open("rb") as file:
            tail.total = path.stat().st_size
            file.seek(max(0, tail.total - most))
            tail._pieces.append(file.read(most))
        return tail

    def text(self) -> str:
        """What there is, readable; no more than was asked to be kept."""
        data = b"".join(self._pieces)[-self._most:]
        text = data.decode("utf-8", "replace")
        return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


class Log:
    """Writes the log of one process, and at the end the report above it."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._left = MOST_LOG

    def line(self, text: str) -> None:
        """Something happened. Never raises: a log that cannot be written stops nothing."""
        entry = f"{time.strftime('%Y-%m-%d %H:%M:%S')} vmjob: {shown(text)}\n".encode()
        if self._left > 0 and len(entry) > self._left:
            entry = b"vmjob: the log ends here: it has become too long\n"
            self._left = len(entry)
        if self._left > 0:
            self._left -= len(entry)
            self._write(entry)

    def conclude(self, sections: list[tuple[str, str]]) -> None:
        """Put a report above the log: (title, text) each; the first title is the cause.

        Only where the log is a file of the slot's; elsewhere the report follows the log.
        """
        before = self._taken_back()
        report = _harmless("".join(
            f"{title}\n{text.rstrip()}\n\n" if text.strip() else f"{title}\n"
            for title, text in sections).encode("utf-8", "replace"))  # before it is measured
        if len(report) > MOST:
            report = report[:MOST - 5] + b"\n...\n"
        room = MOST - len(report)
        if before:
            head = b"What happened:\n"
            if len(before) + len(head) > room:
                cut = before[len(before) - max(0, room - len(head) - 30):]
                before = b"[...]\n" + cut[cut.find(b"\n") + 1:]
            before = head + before if room > len(head) + 30 else b""
        self._write(report + before)

    def _taken_back(self) -> bytes:
        """Empty the file that stderr is, and return what it held; b'' where it is no such file."""
        try:
            there, here = os.fstat(self._fd), Path(FILE).lstat()
            if not stat.S_ISREG(there.st_mode) or not os.path.samestat(there, here):
                return b""
            with Path(FILE).open("rb") as file:
                file.seek(max(0, there.st_size - MOST))
                held = file.read(MOST)
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)  # where nobody opened it for appending
        except OSError:
            return b""
        return held

    def _write(self, data: bytes) -> None:
        data = _harmless(data)
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._fd, data):]
