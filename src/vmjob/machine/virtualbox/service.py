"""VBoxSVC: the service that VBoxManage and VBoxHeadless share for one registry.

VBoxManage starts it, in a session of its own, and it ends by itself five seconds after its last
client. What was found about it, with 7.2.22 on Linux:

- It is one for each ``VBOX_IPC_SOCKETID``, not for each registry: two ids with one registry make
  two services that know nothing of each other. So the id follows from the registry, always.
- It meets its clients in ``/tmp/.vbox-ID-ipc/`` (``TMPDIR`` moves nothing), where it leaves the
  directory with ``ipcd`` and ``lock`` behind when it ends. ``lock`` is locked as long as it lives.
- SIGTERM ends it within 0.2 s when it has no client. With one, it lives on and refuses all others.
  SIGKILL ends it at once; machines that VBoxHeadless runs end soon after, and a VBoxManage that
  waits for its answer waits for ever.
- Whoever calls while it goes (2 of 12 calls in the sixth second) is told that it did not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["end_services", "ipc_directory", "ipc_id_of", "service_pids", "sweep_ipc",
           "sweep_orphans"]

#: Up to 7.1 there is a second process, which carries the messages.
NAMES = ("VBoxSVC", "VBoxXPCOMIPCD")
#: Seconds for a service to end when it is asked to; it takes 0.2.
TERM_SECONDS = 2.0
#: Seconds from SIGKILL until it must be gone.
KILL_SECONDS = 10.0
#: What all our ids begin with.
PREFIX = "vmjob-"
#: Seconds after which a directory without a lock is no service's that is just starting.
SETTLED = 60.0
#: Where VirtualBox has it, whatever the environment says.
TEMPORARY = Path("/tmp")  # noqa: S108


def ipc_id_of(registry: Path) -> str:
    """The id of a registry's service: the same for whoever asks, and short enough for a socket."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(registry))).hexdigest()
    return f"{PREFIX}{digest[:16]}"


def ipc_directory(ipc_id: str) -> Path:
    """Where the service with this id meets its clients."""
    return TEMPORARY / f".vbox-{ipc_id}-ipc"


def service_pids(registry: Path) -> list[int]:
    """The living services of a registry, by the environment that they were started with.

    Only of this user: others' environments cannot be read, and theirs it cannot be.
    """
    import psutil  # 15 ms

    wanted = os.path.realpath(registry)
    found = []
    for process in psutil.process_iter():
        try:
            if process.name().removesuffix(".exe") in NAMES \
                    and os.path.realpath(process.environ().get("VBOX_USER_HOME", "/")) == wanted:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


async def end_services(registry: Path) -> None:
    """End the services of a registry: by request, then by force.

    Machines of that registry that still run end with them.
    """
    handles = list(_handles(service_pids(registry)))
    # Between the look and the handle, the number may have become another process's.
    still = set(service_pids(registry))
    try:
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            waiting = [fd for pid, fd in handles if pid in still]
            for fd in waiting:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, number)
            if await _ended(waiting, seconds):
                return
    finally:
        for _, fd in handles:
            os.close(fd)


def _handles(pids: Iterable[int]) -> Iterable[tuple[int, int]]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            yield pid, os.pidfd_open(pid)


async def _ended(pidfds: Iterable[int], seconds: float) -> bool:
    """Whether all these processes end in time; they need not be children."""
    loop = asyncio.get_running_loop()
    waiting = {fd: loop.create_future() for fd in pidfds}

    def gone(fd: int) -> None:
        loop.remove_reader(fd)
        if not waiting[fd].done():
            waiting[fd].set_result(None)

    for fd in waiting:
        loop.add_reader(fd, gone, fd)
    try:
        if waiting:
            await asyncio.wait(waiting.values(), timeout=seconds)
        return all(future.done() for future in waiting.values())
    finally:
        for fd in waiting:
            loop.remove_reader(fd)


def sweep_ipc(ipc_id: str) -> bool:
    """Remove what a service that has ended left in /tmp; true when nothing of it is there.

    The service holds a lock as long as it lives: then nothing is removed. Neither is what is
    another user's, or no directory, or has files in it that no service makes.
    """
    directory = ipc_directory(ipc_id)
    try:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if os.fstat(opened).st_uid != os.geteuid():
            return False
        with contextlib.suppress(FileNotFoundError):
            lock = os.open("lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=opened)
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name in ("ipcd", "lock"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=opened)
            finally:
                os.close(lock)
        directory.rmdir()
    except OSError:
        return False
    finally:
        os.close(opened)
    return True


def sweep_orphans() -> list[Path]:
    """Remove from /tmp what services of ours left whose owners were killed; says what it removed.

    For a sweep at a start: directories that a service holds stay, and those younger than a minute.
    """
    before = time.time() - SETTLED
    removed = []
    for directory in TEMPORARY.glob(f".vbox-{PREFIX}*-ipc"):
        with contextlib.suppress(OSError):
            if directory.lstat().st_mtime < before and sweep_ipc(
                    directory.name.removeprefix(".vbox-").removesuffix("-ipc")):
                removed.append(directory)
    return removed
