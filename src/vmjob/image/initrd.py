"""The initial ramdisk: busybox, the few modules that find the disks, and ``/init``.

Pure functions from bytes to bytes, so that the same input gives the same archive anywhere. It is
not compressed: unpacking costs more boot time under emulation than reading 3 MB.
"""

from __future__ import annotations

import gzip
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["BASE_MODULES", "MAILBOX_MODULES", "NET_MODULES", "SCSI_MODULES", "Entry", "initrd",
           "module_depends", "module_name", "module_order", "newc", "unsigned"]

#: Without these there is no disk, no console port, no random seed, no root.
BASE_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "squashfs", "overlay")

#: Loaded in place of virtio-blk where disks are on a virtio-scsi controller, by VirtualBox.
SCSI_MODULES = ("virtio_scsi", "sd_mod")

#: Loaded with a size: the place of a job's mailbox (`vmjob.engine.mailbox`).
MAILBOX_MODULES = ("brd",)

#: Loaded only when the machine was granted a network.
NET_MODULES = ("virtio_net",)

#: Ends a signed module; before it come the signature and 12 bytes with its length at the end.
_SIGNED = b"~Module signature appended~\n"

_NEWC_MAGIC = b"070701"
_NEWC_TRAILER = b"TRAILER!!!"
_NEWC_ALIGN = 4
#: cpio pads an archive to whole blocks of its tape.
_NEWC_BLOCK = 512


@dataclass(frozen=True)
class Entry:
    """One file of the archive: ``mode`` with its type bits, ``device`` for device nodes."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def newc(entries: Iterable[Entry]) -> bytes:
    """A cpio archive in the ``newc`` format: owned by root, without times, in the given order."""
    out = bytearray()
    number = 0
    for number, entry in enumerate(entries, start=1):
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        out += _header(number, entry.mode, links, len(entry.data), entry.device, entry.name)
        out += entry.data
        out += bytes(-len(out) % _NEWC_ALIGN)
    out += _header(0, 0, 1, 0, (0, 0), _NEWC_TRAILER.decode())
    out += bytes(-len(out) % _NEWC_BLOCK)
    return bytes(out)


def _header(inode: int, mode: int, links: int, size: int, device: tuple[int, int],
            name: str) -> bytes:
    """An entry's header with its padded name."""
    raw = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, links, 0, size, 0, 0, *device, len(raw), 0)
    head = _NEWC_MAGIC + b"".join(b"%08x" % field for field in fields) + raw
    return head + bytes(-len(head) % _NEWC_ALIGN)


def module_name(file_name: str) -> str:
    """The kernel's name for a module file: ``virtio-rng.ko`` is ``virtio_rng``."""
    return file_name.removesuffix(".ko").replace("-", "_")


def module_depends(module: bytes) -> tuple[str, ...]:
    """The modules that must be loaded before this one, from the ``depends=`` of its .modinfo.

    Raises `ValueError` when the bytes hold no such line: every module of Linux 6.1 has one.
    """
    found = module.find(b"\0depends=")
    if found < 0:
        raise ValueError("not a kernel module: no depends= in it")
    start = found + len(b"\0depends=")
    names = module[start:module.index(b"\0", start)].decode("ascii")
    return tuple(name.replace("-", "_") for name in names.split(",") if name)


def unsigned(module: bytes) -> bytes:
    """A module without its signature, which nobody asks for and whose check costs time.

    Each takes 10 ms under emulation and half a second in VirtualBox's interpreter (measured).
    """
    if not module.endswith(_SIGNED):
        return module
    end = len(module) - len(_SIGNED)
    length = int.from_bytes(module[end - 4:end], "big")
    return module[:max(0, end - 12 - length)]


def module_order(wanted: Sequence[str], modules: Mapping[str, bytes],
                 loaded: Iterable[str] = ()) -> list[str]:
    """``wanted`` and all they need, each after what it needs, without those in ``loaded``.

    ``modules`` maps a kernel's module names to their bytes. Raises `KeyError` naming a module
    that the kernel does not have, `ValueError` when they need each other in a circle.
    """
    done = set(loaded)
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in above:
            raise ValueError("modules need each other: " + " -> ".join((*above, name)))
        for needed in module_depends(modules[name]):
            visit(needed, (*above, name))
        done.add(name)
        order.append(name)

    for name in wanted:
        visit(name, ())
    return order


def initrd(busybox: bytes, init: bytes, modules: Mapping[str, bytes]) -> bytes:
    """The archive that the kernel boots with.

    The number in a module's file name is its turn: ``/init`` loads them as the shell sorts them.
    ``/dev.in`` is copied into the kernel's fresh ``/dev``, which lacks these.
    """
    modules = {name: unsigned(module) for name, module in modules.items()}
    base = module_order(BASE_MODULES, modules)
    mailbox = module_order(MAILBOX_MODULES, modules, loaded=base)
    net = module_order(NET_MODULES, modules, loaded=base)
    scsi = module_order(SCSI_MODULES, modules, loaded=base)
    directories = ("bin", "dev", "dev.in", "dev.in/pts", "dev.in/shm", "lib", "lib/base",
                   "lib/mailbox", "lib/net", "lib/scsi", "newroot", "proc", "ro", "rw", "sys")
    links = {"dev.in/fd": "/proc/self/fd", "dev.in/stdin": "/proc/self/fd/0",
             "dev.in/stdout": "/proc/self/fd/1", "dev.in/stderr": "/proc/self/fd/2"}
    return newc([
        *(Entry(name, stat.S_IFDIR | 0o755) for name in directories),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        *(Entry(name, stat.S_IFLNK | 0o777, target.encode()) for name, target in links.items()),
        Entry("bin/busybox", stat.S_IFREG | 0o755, busybox),
        Entry("init", stat.S_IFREG | 0o755, init),
        *(Entry(f"lib/{group}/{turn:02d}-{name}.ko", stat.S_IFREG | 0o644, modules[name])
          for group, names in (("base", base), ("mailbox", mailbox), ("net", net))
          for turn, name in enumerate(names)),
        # Compressed, as most machines never load them: 0.25 MB and not 0.8.
        *(Entry(f"lib/scsi/{turn:02d}-{name}.ko.gz", stat.S_IFREG | 0o644,
                gzip.compress(modules[name], mtime=0))
          for turn, name in enumerate(scsi)),
    ])
