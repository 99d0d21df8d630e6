"""The smallest programs of Linux: a header, code, and a table that says where the code is."""

from __future__ import annotations

import struct

__all__ = ["FILLER", "elf", "with_one"]

#: Code of both widths: mov eax, eax.
FILLER = b"\x89\xc0"
RET = b"\xc3"


def with_one(instruction: bytes) -> bytes:
    """A function with this instruction somewhere in it."""
    return FILLER * 40 + instruction + FILLER * 40 + RET


def elf(code: bytes, *, wide: bool = True, machine: int | None = None, sections: bool = True,
        executable: bool = True) -> bytes:
    """A file with ``code`` in a section, or without a table of sections, in a segment."""
    machine = (62 if wide else 3) if machine is None else machine
    header = 64 if wide else 52
    table = header + len(code)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    shape = "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH"
    row_of_segment, row_of_section = (56, 64) if wide else (32, 40)
    head = struct.pack(shape, 2, machine, 1, 0, 0 if sections else table, table if sections else 0,
                       0, header, row_of_segment, int(not sections), row_of_section,
                       2 * int(sections), 0)
    flags = 6 if executable else 2
    if sections:
        row = (struct.pack("<IIQQQQ8xQQ", 0, 1, flags, 0, header, len(code), 0, 0) if wide
               else struct.pack("<IIIIII8xII", 0, 1, flags, 0, header, len(code), 0, 0))
        rows = bytes(row_of_section) + row
    else:
        may = 5 if executable else 4
        rows = (struct.pack("<IIQQQQQQ", 1, may, header, 0, 0, len(code), len(code), 0) if wide
                else struct.pack("<IIIIIIII", 1, header, 0, 0, len(code), len(code), may, 0))
    return ident + head + code + rows
