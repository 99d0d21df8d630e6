"""Any file can be searched as a program: it has code or none, and the search comes to its end."""

from __future__ import annotations

import sys
import time
from io import BytesIO

import atheris

with atheris.instrument_imports(include=["vmjob.job"]):
    from vmjob.job.elf import code_of
    from vmjob.job.instructions import search, step

#: What files begin with that are programs: of 64 bits, of 32, and of 64 in the form of 32.
HEADS = [bytes([*b"\x7fELF", form, 1, 1, *bytes(9), 2, 0, machine, 0])
         for form, machine in ((2, 62), (1, 3), (1, 62))]


def one(data: bytes) -> None:
    """The first byte says what the others are: a file after its first 20 bytes, or code."""
    if not data:
        return
    kind, rest = data[0] % 5, data[1:]
    if kind < len(HEADS):
        for part, wide in code_of(BytesIO(HEADS[kind] + rest)):
            assert len(part) <= len(data) + 20
            search(part, wide=wide, deadline=time.monotonic() + 60)
        return
    wide = kind == 3
    search(rest, wide=wide, deadline=time.monotonic() + 60)
    at = 0
    try:
        while here := step(rest, at, wide=wide):
            assert at <= here[1] < here[0] <= min(len(rest), at + 15)
            at = here[0]
    except IndexError:
        pass


atheris.Setup(sys.argv, one)
atheris.Fuzz()
