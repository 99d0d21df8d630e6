"""Calls of the kernel that Python 3.11 does not have: mounts, namespaces, modules, mapped disks."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Sequence

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_NOATIME = 1, 2, 4, 8, 32, 1024
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID = 0x20000, 0x4000000, 0x8000000, 0x20000000
#: Numbers of x86-64.
SYS_PIVOT_ROOT, SYS_FINIT_MODULE = 155, 313

#: The device mapper (``linux/dm-ioctl.h``).
DM_CONTROL = "/dev/mapper/control"
DM_HEAD = struct.Struct("<3IIIIiIIIQ128s129s7x")
DM_TARGET = struct.Struct("<QQiI16s")
DM_CREATE, DM_RESUME, DM_LOAD = 3, 6, 9
DM_READONLY = 1
DM_ALIGN = 8
#: What is copied at the first write to a part of a disk that others lie below, in sectors: few
#: enough for a small write, many enough that the table of them stays small (48 bytes each).
DM_CHUNK = 32

#: A file as a disk (``linux/loop.h``).
LOOP_CONTROL = "/dev/loop-control"
LOOP_CTL_GET_FREE, LOOP_SET_FD = 0x4C82, 0x4C00
#: ``linux/fs.h``.
BLKROSET = 0x125D

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, name: str | None = None) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    _checked(_libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags),
                         data.encode()), target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(target.encode(), flags), target)


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc.unshare(flags))


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    _checked(_libc.syscall(SYS_PIVOT_ROOT, new.encode(), old.encode()), new)


def load_module(path: str) -> None:
    """Load a module of the kernel; one that is loaded is fine."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.syscall(SYS_FINIT_MODULE, fd, b"", 0), path)
    except FileExistsError:
        pass
    finally:
        os.close(fd)


def map_disk(name: str, device: str, runs: Sequence[tuple[int, int, int | None]], *,
             writable: bool = False) -> str:
    """A disk made of parts of another, and of zeros where it is None; its path."""
    below = _number(device)
    return _mapped(name, [_target(first, length, "zero") if at is None
                          else _target(first, length, "linear", f"{below} {at}")
                          for first, length, at in runs], writable=writable)


def lay_above(name: str, below: str, above: str, sectors: int) -> str:
    """A disk that is written to ``above``, and is what is ``below`` where it is not; its path.

    What is where is known for as long as this kernel runs.
    """
    words = f"{_number(below)} {_number(above)} N {DM_CHUNK}"
    return _mapped(name, [_target(0, sectors, "snapshot", words)], writable=True)


def file_disk(path: str) -> str:
    """A disk that is a file; its path."""
    control = os.open(LOOP_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        made = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
    finally:
        os.close(control)
    with open(path, "rb+") as file, open(made, "rb+", buffering=0) as disk:
        fcntl.ioctl(disk, LOOP_SET_FD, file.fileno())
    return made


def forbid_writing(device: str) -> None:
    """Let nobody write to a disk."""
    with open(device, "rb", buffering=0) as disk:
        fcntl.ioctl(disk, BLKROSET, struct.pack("i", 1))


def _number(device: str) -> str:
    number = os.stat(device).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def _mapped(name: str, targets: Sequence[bytes], *, writable: bool) -> str:
    flags = 0 if writable else DM_READONLY
    control = os.open(DM_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        made = _ask(control, DM_CREATE, name, flags)
        _ask(control, DM_LOAD, name, flags, b"".join(targets), len(targets))
        _ask(control, DM_RESUME, name, flags)
    finally:
        os.close(control)
    return f"/dev/dm-{os.minor(made)}"


def _target(first: int, length: int, kind: str, words: str = "") -> bytes:
    room = -(-(len(words) + 1) // DM_ALIGN) * DM_ALIGN
    return (DM_TARGET.pack(first, length, 0, DM_TARGET.size + room, kind.encode())
            + words.encode().ljust(room, b"\0"))


def _ask(control: int, what: int, name: str, flags: int, data: bytes = b"", count: int = 0) -> int:
    """One request to the device mapper; the number of the device."""
    size = DM_HEAD.size + len(data)
    asked = bytearray(DM_HEAD.pack(4, 0, 0, size, DM_HEAD.size, count, 0, flags, 0, 0, 0,
                                   name.encode(), b"") + data)
    fcntl.ioctl(control, 3 << 30 | DM_HEAD.size << 16 | 0xFD << 8 | what, asked)
    device: int = DM_HEAD.unpack_from(asked)[10]
    return device
