"""The code in a program of Linux on x86: what may be executed of an ELF file.

Files are not trusted: each number of theirs is held against the file's size and against a bound.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["TooLarge", "code_of", "is_program"]

#: Bytes of a file that `is_program` wants.
HEAD = 20
#: Bytes of code that are read of one file.
MOST_CODE = 64 << 20
#: Sections or segments that are looked at; compilers that make one section for each function join
#: them in programs.
MOST_PARTS = 4096
#: Bytes of such a row; today's have at most 64.
LONGEST_ROW = 256

_MACHINES = {3: False, 62: True}  # EM_386, EM_X86_64: whether code is of 64 bits
_TYPES = (2, 3)  # ET_EXEC, ET_DYN
_PROGBITS, _EXECUTABLE = 1, 4
_LOAD, _MAY_EXECUTE = 1, 1


class TooLarge(Exception):
    """More code than is read."""


def is_program(head: bytes) -> bool:
    """Whether a file that begins so is a program or library for x86."""
    return (len(head) >= HEAD and head.startswith(b"\x7fELF") and head[4] in (1, 2)
            and head[5] == 1 and int.from_bytes(head[16:18], "little") in _TYPES
            and int.from_bytes(head[18:20], "little") in _MACHINES)


def code_of(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """The code in a file for which `is_program` holds, part by part; whether it is of 64 bits.

    Sections where there are any, else segments, which may have data among the code. A file that is
    cut off, or whose numbers are wrong, has the parts that can be read. Raises `TooLarge` once
    there is too much; OSError.
    """
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(64)
    if not is_program(head):
        return
    wide = _MACHINES[int.from_bytes(head[18:20], "little")]
    left, seen = MOST_CODE, set[tuple[int, int]]()
    for offset, length in _sections(file, head) or _segments(file, head):
        length = min(length, size - offset)
        if length <= 0 or (offset, length) in seen:
            continue
        seen.add((offset, length))
        left -= length
        if left < 0:
            raise TooLarge
        file.seek(offset)
        yield file.read(length), wide


def _sections(file: BinaryIO, head: bytes) -> list[tuple[int, int]]:
    table, entry, fields = (40, 58, "<4xIQ8xQQ") if head[4] == 2 else (32, 46, "<4xIIxxxxII")
    return [(offset, length) for kind, flags, offset, length
            in _table(file, head, table, entry, fields)
            if kind == _PROGBITS and flags & _EXECUTABLE]


def _segments(file: BinaryIO, head: bytes) -> list[tuple[int, int]]:
    if head[4] == 2:
        rows = _table(file, head, 32, 54, "<IIQ16xQ")
        return [(offset, length) for kind, flags, offset, length in rows
                if kind == _LOAD and flags & _MAY_EXECUTE]
    return [(offset, length) for kind, offset, length, flags
            in _table(file, head, 28, 42, "<II8xI4xI")
            if kind == _LOAD and flags & _MAY_EXECUTE]


def _table(file: BinaryIO, head: bytes, where: int, entry: int,
           fields: str) -> Iterator[tuple[int, ...]]:
    """The rows of a table of the file: what the header has at ``where`` says where it is."""
    wide = head[4] == 2
    if len(head) < (64 if wide else 52):
        return
    start: int = struct.unpack_from("<Q" if wide else "<I", head, where)[0]
    length, count = struct.unpack_from("<HH", head, entry)
    size = struct.calcsize(fields)
    if not 0 < start < file.seek(0, 2) or not size <= length <= LONGEST_ROW:
        return
    file.seek(start)
    rows = file.read(length * min(count, MOST_PARTS))
    for at in range(0, len(rows) - length + 1, length):
        yield struct.unpack_from(fields, rows, at)
