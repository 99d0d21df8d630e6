"""The smallest guest: a floppy whose boot sector says something on the first serial port."""

from __future__ import annotations

from pathlib import Path

__all__ = ["floppy"]

FLOPPY_BYTES = 1474560
#: Where the text begins in the boot sector, which is loaded to 0x7c00.
TEXT_AT = 0x40

#: 16-bit code: write each byte from 0x7c40 on to COM1 when it is ready for one; halt at a zero.
CODE = bytes((
    0xFA,                    # 00      cli
    0x31, 0xC0,              # 01      xor ax, ax
    0x8E, 0xD8,              # 03      mov ds, ax
    0xBE, TEXT_AT, 0x7C,     # 05      mov si, text
    0xAC,                    # 08 next lodsb
    0x84, 0xC0,              # 09      test al, al
    0x74, 0x12,              # 0b      jz halt
    0x88, 0xC4,              # 0d      mov ah, al
    0xBA, 0xFD, 0x03,        # 0f      mov dx, 0x3fd
    0xEC,                    # 12 wait in al, dx
    0xA8, 0x20,              # 13      test al, 0x20
    0x74, 0xFB,              # 15      jz wait
    0x88, 0xE0,              # 17      mov al, ah
    0xBA, 0xF8, 0x03,        # 19      mov dx, 0x3f8
    0xEE,                    # 1c      out dx, al
    0xEB, 0xE9,              # 1d      jmp next
    0xF4,                    # 1f halt hlt
    0xEB, 0xFD,              # 20      jmp halt
))


def floppy(path: Path, text: str) -> None:
    """Write a floppy image whose guest says ``text`` (ASCII, up to 440 bytes) and halts."""
    sector = CODE.ljust(TEXT_AT, b"\0") + text.encode("ascii")
    assert len(sector) < 510
    path.write_bytes((sector.ljust(510, b"\0") + b"\x55\xaa").ljust(FLOPPY_BYTES, b"\0"))
