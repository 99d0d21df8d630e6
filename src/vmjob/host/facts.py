"""Plain facts of this computer, each read afresh and bounded in time."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "boot_id", "device_identity", "disk_free", "memory", "memory_total",
           "user_namespaces"]


@dataclass(frozen=True)
class Memory:
    """Bytes of memory, in all and still to be had."""

    total: int
    available: int


def memory() -> Memory:
    """This computer's memory."""
    import psutil  # not at start-up: only the doctor and a start that failed ask

    found = psutil.virtual_memory()
    return Memory(found.total, found.available)


def memory_total() -> int:
    """Bytes of this computer's memory; what every start may ask."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def disk_free(path: Path) -> int:
    """Free bytes on the disk that holds ``path`` or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def boot_id() -> str:
    """Changes with every boot of this computer."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import psutil

        return f"{platform.node()}-{psutil.boot_time():.0f}"


def device_identity(path: str) -> str | None:
    """What tells one device node from another of the same name; None when it is not usable."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        facts = os.fstat(fd)
    finally:
        os.close(fd)
    return f"{path}:{facts.st_rdev}:{platform.release()}"


def processor() -> str:
    """What tells this computer's processor, and all that it announces, from another; '' unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines
                             if line.startswith(("model name", "flags", "microcode"))}))


def user_namespaces() -> str | None:
    """None when this user can make images without being root; else what is missing."""
    if os.geteuid() == 0:
        return None
    try:
        most = int(Path("/proc/sys/user/max_user_namespaces").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return "this kernel has no user namespaces"
    if most == 0:
        return "user namespaces are switched off"
    name = _user_name()
    for table in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(table).read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        if not any(line.split(":")[0] in (name, str(os.geteuid())) for line in lines):
            return f"{table} grants {name} no further user ids"
    return None


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
