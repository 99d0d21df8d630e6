"""Finds x86 instructions whose results are left to the maker of the processor.

Their bytes also occur within other instructions. So code is read instruction by instruction, as a
processor would, from a little before each place where such bytes are; and what lies between
instructions but is none (tables, keys) is told from code by what no compiler writes. How often that
is wrong was measured: ``docs/decisions/017-instructions-in-programs.md``.

Only lengths are decoded, not operands: enough to know where the next instruction begins.
"""

from __future__ import annotations

import re
import time

__all__ = ["OutOfTime", "search", "step"]

#: Bytes before a place that are read to be in step with the code: any start falls into step within
#: a few instructions.
LEAD = 512
#: Instructions before and after one, without anything between that is none, for it to be code.
BEFORE, AFTER = 12, 24
#: No instruction is longer.
LONGEST = 15

# What follows an opcode, one letter for each of the 256:
#   .  nothing                       p  a prefix                  r  a REX prefix
#   m  operands (ModRM)              M  operands, one byte        Z  operands, 4 bytes (or 2)
#   b  one byte   h  two bytes       z  4 bytes (or 2)            q  4 bytes (or 8, or 2)
#   a  an address                    t  operands; bytes for some  f  x87
#   v  VEX or EVEX                   e  a second opcode           k  a third opcode (K: one byte)
#   x  not in programs: none at all, privileged, or of the 1980s; where it is met, that is data
_ONE = """
    mmmmbzxx mmmmbzxe  mmmmbzxx mmmmbzxx  mmmmbzpx mmmmbzpx  mmmmbzpx mmmmbzpx
    {inc}              ........ ........  {push}             bbbbbbbb bbbbbbbb
    MZxMmmmm mmmm{s}mxm  ........ ..x.....  {addr}.... bz......  bbbbbbbb qqqqqqqq
    MMh.vvMZ x.xx.{i}xx  mmmmxxxx ffffffff  xxbbxxxx zzxbxxxx  pxpp..tt ......mm"""
_TWO = """
    mmxmx.xx xxx.xmxx  mmmmmmmm mmmmmmmm  xxxxxxxx mmmmmmmm  x.xx..xx kxKxxxxx
    mmmmmmmm mmmmmmmm  mmmmmmmm mmmmmmmm  mmmmmmmm mmmmmmmm  MMMMmmm. xxxxmmmm
    zzzzzzzz zzzzzzzz  mmmmmmmm mmmmmmmm  xx.mMmxx xxxmMmmm  mmxmxxmm mmMmmmmm
    mmMmMMMm ........  mmmmmmmm mmmmmmmm  mmmmmmmm mmmmmmmm  mmmmmmmm mmmmmmmx"""


def _letters(text: str, **those: str) -> str:
    letters = "".join(text.format(**those).split())
    assert len(letters) == 256
    return letters


_ONE_64 = _letters(_ONE, inc="r" * 16, push="xxvmpppp zZbMxxxx", s="x", addr="xxxx", i="x")
_ONE_32 = _letters(_ONE, inc="." * 16, push="..vxpppp zZbMxxxx", s="m", addr="aaaa", i="b")
_TWO_BYTES = _letters(_TWO)

#: Of the opcodes D8 to DF: the last bytes of those without memory operands that exist ...
_X87 = tuple(frozenset(byte for first, last in ranges for byte in range(first, last + 1))
             for ranges in (
    [(0xC0, 0xFF)],
    [(0xC0, 0xD0), (0xE0, 0xE1), (0xE4, 0xE5), (0xE8, 0xEE), (0xF0, 0xFF)],
    [(0xC0, 0xDF), (0xE9, 0xE9)],
    [(0xC0, 0xDF), (0xE2, 0xE3), (0xE8, 0xF7)],
    [(0xC0, 0xCF), (0xE0, 0xFF)],
    [(0xC0, 0xC7), (0xD0, 0xEF)],
    [(0xC0, 0xCF), (0xD9, 0xD9), (0xE0, 0xFF)],
    [(0xC0, 0xC7), (0xE0, 0xE0), (0xE8, 0xF7)]))
#: ... and which of those with memory operands do not (decimal numbers of 1980 among them).
_X87_NO_MEMORY = ((), (1,), (), (4, 6), (), (5,), (), (4, 6))
#: D9 and one of these.
_TRANSCENDENTAL = {0xF0: "f2xm1", 0xF1: "fyl2x", 0xF2: "fptan", 0xF3: "fpatan", 0xF9: "fyl2xp1",
                   0xFB: "fsincos", 0xFE: "fsin", 0xFF: "fcos"}
#: 0F and one of these, also in VEX.
_APPROXIMATE = {0x52: "rsqrt", 0x53: "rcp"}
#: Of EVEX's second map; p: packed, s: one; the sixth map has the first four for half precision.
_APPROXIMATE_EVEX = {0x4C: "vrcp14p", 0x4D: "vrcp14s", 0x4E: "vrsqrt14p", 0x4F: "vrsqrt14s",
                     0xCA: "vrcp28p", 0xCB: "vrcp28s", 0xCC: "vrsqrt28p", 0xCD: "vrsqrt28s"}
#: Of VEX's first map, those that exist.
_VEX_ONE = frozenset([*range(0x10, 0x18), *range(0x28, 0x30), *range(0x41, 0x4C),
                      *range(0x50, 0x80), *range(0x90, 0x9A), 0xAE, 0xC2, 0xC4, 0xC5, 0xC6,
                      *range(0xD0, 0x100)])
#: Opcodes of the first map that one more byte follows.
_WITH_BYTE = frozenset([0x70, 0x71, 0x72, 0x73, 0xC2, 0xC4, 0xC5, 0xC6])
_EMPTY_UPPER = 0x77

#: Where such an instruction may be: its bytes from the opcode, or from VEX and EVEX, on.
_PLACES = re.compile(
    rb"(?=\x0f[\x52\x53]|\xd9[\xf0-\xf3\xf9\xfb\xfe\xff]|\xc5.[\x52\x53]"
    rb"|\xc4[\x01\x21\x41\x61\x81\xa1\xc1\xe1].[\x52\x53]|\x62...[\x4c-\x4f\xca-\xcd])", re.DOTALL)
#: After these the next instruction is somewhere else, and data may follow: ret, jmp.
_ENDS = frozenset([0xC2, 0xC3, 0xE9, 0xEB])


class OutOfTime(Exception):
    """The deadline has passed."""


def search(code: bytes, *, wide: bool, deadline: float) -> set[str]:
    """The names of those that ``code`` has; ``wide``: it is of 64 bits.

    Raises `OutOfTime` when it is later than ``deadline``, by `time.monotonic`.
    """
    found: set[str] = set()
    at, clean = 0, BEFORE  # that a section begins with an instruction is sure
    for place in _PLACES.finditer(code):
        if time.monotonic() > deadline:
            raise OutOfTime
        if at < place.start() - LEAD:
            at, clean = place.start() - LEAD, 0
        while at <= place.start():
            try:
                here = step(code, at, wide=wide)
            except IndexError:
                return found
            if here is None:
                at, clean = at + 1, 0
                continue
            at, _, name = here
            clean += 1
            if name and name not in found and clean > BEFORE and _goes_on(code, at, wide=wide):
                found.add(name)
    return found


def _goes_on(code: bytes, at: int, *, wide: bool) -> bool:
    """Whether instructions follow."""
    try:
        for _ in range(AFTER):
            here = step(code, at, wide=wide)
            if here is None:
                return False
            at, opcode, _ = here
            if code[opcode] in _ENDS:
                break
    except IndexError:
        pass
    return True


def step(code: bytes, at: int, *, wide: bool) -> tuple[int, int, str] | None:
    """One instruction: where it ends, where its opcode is, its name if it is one of those looked
    for. None where there is none that a program has; IndexError where the code ends within it.
    """
    start, table = at, _ONE_64 if wide else _ONE_32
    short = far = False
    repeat = 0
    while (kind := table[byte := code[at]]) == "p":
        short |= byte == 0x66
        far |= byte == 0x67
        if byte in (0xF2, 0xF3):
            repeat = byte
        at += 1
        if at == start + LONGEST:
            return None
    rex = 0
    if kind == "r":
        rex = byte
        byte = code[at := at + 1]
        kind = table[byte]
    if kind in "xpr" or (far and not wide):  # addresses of 16 bits are of the 1980s
        return None
    opcode, name = at, ""
    at += 1
    if kind == "e":
        byte = code[at]
        kind = _TWO_BYTES[byte]
        at += 1
        if kind in "kK":
            at, kind = at + 1, "m" if kind == "k" else "M"
        elif byte in _APPROXIMATE:
            if short or repeat == 0xF2:
                return None
            name = _APPROXIMATE[byte] + ("ss" if repeat else "ps")
        byte |= 0x0F00
    if kind == "v":
        if short or repeat or rex:
            return None
        end, name = _vector(code, opcode, wide=wide)
    elif kind == "f":
        end, name = _x87(code, at)
    else:
        if byte == 0 and code[at] == 0 and not rex:
            return None  # zeros
        end = _end(code, at, kind, byte, short=short, long=rex & 8 != 0, wide=wide)
    if not 0 < end <= start + LONGEST:
        return None
    code[end - 1]  # IndexError
    return end, opcode, name


def _end(code: bytes, at: int, kind: str, byte: int, *, short: bool, long: bool,
         wide: bool) -> int:
    """Where an instruction ends whose opcode is before ``at``; 0: there is none."""
    few = 2 if short else 4
    match kind:
        case ".":
            return at
        case "b":
            return at + 1
        case "h":
            return at + 2
        case "a":
            return at + 4
        case "z":  # calls and jumps of 64-bit code have 4 bytes, come what may
            return at + (4 if wide and (byte in (0xE8, 0xE9) or byte > 0xFF) else few)
        case "q":
            return at + (8 if long else few)
        case "m" | "M" | "Z" | "t":
            operation = code[at] >> 3 & 7
            if not _exists(byte, operation, code[at]):
                return 0
            end = _operands(code, at)
            if kind == "M":
                return end + 1
            if kind == "Z":
                return end + few
            if kind == "t" and operation < 2:
                return end + (1 if byte == 0xF6 else few)
            return end
    return 0


def _exists(byte: int, operation: int, operands: int) -> bool:
    """Whether an opcode is one with these operands, as far as that tells code from data."""
    match byte:
        case 0x8D:
            return operands < 0xC0
        case 0x8F:
            return operation == 0
        case 0xC6 | 0xC7:  # F8: transactions
            return operation == 0 or operands == 0xF8
        case 0xFE:
            return operation < 2
        case 0xFF:  # 3 and 5: far calls and jumps
            return operation in (0, 1, 2, 4, 6)
    return True


def _operands(code: bytes, at: int) -> int:
    """The end of ModRM, SIB and displacement."""
    mode, register = code[at] >> 6, code[at] & 7
    at += 1
    if mode == 3:
        return at
    if register == 4:
        register = code[at] & 7
        at += 1
    if mode == 0:
        return at + 4 if register == 5 else at
    return at + (1 if mode == 1 else 4)


def _x87(code: bytes, at: int) -> tuple[int, str]:
    which, last = code[at - 1] & 7, code[at]
    if last < 0xC0:
        return (0 if last >> 3 & 7 in _X87_NO_MEMORY[which] else _operands(code, at)), ""
    name = _TRANSCENDENTAL.get(last, "") if which == 1 else ""
    return (at + 1 if last in _X87[which] else 0), name


def _vector(code: bytes, at: int, *, wide: bool) -> tuple[int, str]:
    """An instruction with VEX or EVEX; (0, "") where there is none."""
    if not wide and code[at + 1] < 0xC0:
        return 0, ""
    kind = code[at]
    if kind == 0xC5:
        which, fields, at = 1, code[at + 1], at + 2
    elif kind == 0xC4:
        which, fields, at = code[at + 1] & 31, code[at + 2], at + 3
    else:
        which, fields = code[at + 1] & 15, code[at + 2]
        at += 4
        if which > 7 or not fields & 4:
            return 0, ""
    byte, prefix = code[at], fields & 3
    at += 1
    if kind != 0x62 and which == 1:
        if byte == _EMPTY_UPPER:
            return at, ""
        if byte not in _VEX_ONE or (byte in _APPROXIMATE and prefix not in (0, 2)):
            return 0, ""
    elif which not in ((1, 2, 3, 5, 6) if kind == 0x62 else (2, 3)):
        return 0, ""
    end = _operands(code, at)
    if which == 3 or (byte in _WITH_BYTE and which == 1) or (byte == 0xC2 and which == 5):
        end += 1
    return end, _vector_name(kind, which, byte, prefix, fields)


def _vector_name(kind: int, which: int, byte: int, prefix: int, fields: int) -> str:
    """The name of an instruction with VEX or EVEX, if it is one of those looked for."""
    if kind != 0x62:
        if which == 1 and byte in _APPROXIMATE:
            return f"v{_APPROXIMATE[byte]}{'ss' if prefix else 'ps'}"
    elif prefix == 1 and byte in _APPROXIMATE_EVEX:
        if which == 2:
            return _APPROXIMATE_EVEX[byte] + ("d" if fields & 0x80 else "s")
        if which == 6 and byte <= 0x4F:
            return _APPROXIMATE_EVEX[byte].replace("14", "") + "h"
    return ""
