"""What makes one machine of many: random numbers, clock, names; and the sleep before a copy.

A machine may be a copy of one that was frozen (docs/explanation/templates.md). Its memory is then
equal to that of every other copy, so the first request that each answers gives it randomness of
its own before any job can ask for some.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import socket
import struct
import time
from typing import Any

from .place import Place, memory_facts, read_file, write_file

#: ``_IOW('R', 0x03, int[2])`` and ``_IO('R', 0x07)`` (Linux, include/uapi/linux/random.h).
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
#: Bytes of the seed: what the kernel's generator can hold (256 bits), twice.
SEED_LENGTH = 64
#: ``SIOCSIFHWADDR`` and the hardware type of Ethernet (Linux, sockios.h and if_arp.h).
SIOCSIFHWADDR = 0x8924
ARPHRD_ETHER = 1
INTERFACE = "eth0"

#: Free memory that is not cleared, bytes: taking it would make the kernel drop what was warmed up.
LEFT_FREE = 6 * 1024 * 1024
#: Bytes cleared at once.
CLEARED_AT_ONCE = 2 * 1024 * 1024


def assume(given: dict[str, Any], place: Place) -> None:
    """Take on the identity in a request; raises `ValueError` or `KeyError` for none that fits.

    ``seed`` (hex), ``time`` (seconds since 1970), ``hostname``, ``machine_id`` and, for a machine
    with a network, ``mac``. Where the kernel is not the machine's own (a test), it is left alone.
    """
    seed = bytes.fromhex(given["seed"])
    if len(seed) != SEED_LENGTH:
        raise ValueError("a seed of another length")
    if not place.owns_kernel:
        return
    reseed(seed)  # before everything else
    time.clock_settime(time.CLOCK_REALTIME, float(given["time"]))
    name = given["hostname"]
    socket.sethostname(name)
    _rewrite("/run/machine-id", f"{given['machine_id']}\n")
    _rewrite("/run/hosts", f"127.0.0.1\tlocalhost {name}\n"
                           "::1\tlocalhost ip6-localhost ip6-loopback\n")
    if given.get("mac"):
        set_mac(bytes.fromhex(given["mac"]))


def wake(given: dict[str, Any], place: Place) -> None:
    """Go on after standing still: ``time``, and ``seed`` (hex) unless it is empty."""
    seed = bytes.fromhex(given["seed"])
    if seed and len(seed) != SEED_LENGTH:
        raise ValueError("a seed of another length")
    if not place.owns_kernel:
        return
    if seed:
        reseed(seed)
    time.clock_settime(time.CLOCK_REALTIME, float(given["time"]))


def reseed(seed: bytes) -> None:
    """Mix a secret of the host into the kernel's random numbers, at once and for all readers."""
    fd = _kept("/dev/urandom")
    fcntl.ioctl(fd, RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
    fcntl.ioctl(fd, RNDRESEEDCRNG)


@functools.cache
def _kept(path: str) -> int:
    """A file that stays open from before a machine is frozen: each copy saves opening it."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _rewrite(path: str, text: str) -> None:
    """Replace the text of a short file to which the image has a link in /etc."""
    fd = _kept(path)
    os.ftruncate(fd, os.pwrite(fd, text.encode(), 0))


def set_mac(mac: bytes) -> None:
    """Give the network card an address of its own."""
    request = struct.pack("16sH6s8x", INTERFACE.encode(), ARPHRD_ETHER, mac)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, SIOCSIFHWADDR, request)


def drop_caches(place: Place) -> None:
    """Forget what was read from disk so far: booting needed it, a job hardly will."""
    if place.owns_kernel:
        os.sync()
        write_file("/proc/sys/vm/drop_caches", "3")


def left_free(total: int, least: int) -> int:
    """Bytes that stay free: who takes more makes the kernel give up everything else instead.

    It begins to at one and a half times ``least`` (vm.min_free_kbytes), and keeps a 256th of the
    memory for devices that reach only the lowest (vm.lowmem_reserve_ratio).
    """
    return max(LEFT_FREE, 2 * least + total // 256)


def clear_free_memory(place: Place) -> None:
    """Fill free memory with zeros, so that the host need not keep it."""
    if not place.owns_kernel:
        return
    with contextlib.suppress(OSError):
        write_file("/proc/sys/vm/compact_memory", "1")
    held: list[mmap.mmap] = []
    facts = memory_facts()
    left = left_free(facts["MemTotal"], int(read_file("/proc/sys/vm/min_free_kbytes") or 0) * 1024)
    with contextlib.suppress(OSError):
        for _ in range(facts["MemTotal"] // CLEARED_AT_ONCE):
            if memory_facts()["MemFree"] <= left + CLEARED_AT_ONCE:
                break
            # The kernel clears each page that it gives away.
            held.append(mmap.mmap(-1, CLEARED_AT_ONCE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                                  | mmap.MAP_POPULATE))
    for piece in held:
        piece.close()
    # Else every command would seem to have had as much: Linux takes the peak of a program (its
    # ru_maxrss) from before its exec on, and that of a vfork is its parent's.
    with contextlib.suppress(OSError):
        write_file("/proc/self/clear_refs", "5")
