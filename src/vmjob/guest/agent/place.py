"""Where the agent works: directories, the job's user, control groups.

In a machine these are fixed (`MACHINE`); a test gives its own on the host, where
there is no control group to use and no user to change to.
"""

from __future__ import annotations

import errno
import os
import pwd
import resource
from typing import Any

#: (name, uid, gid, home, all groups) of a user.
Account = tuple[str, int, int, str, list[int]]

#: Memory kept from all jobs together for the kernel and the agent, bytes. With less, a job that
#: takes everything it can get starves the agent (seen at 8 MiB in a 128 MiB machine).
RESERVED_MEMORY = 16 * 1024 * 1024


class Place:
    """``workdir`` is where jobs start; ``run`` holds the agent's own files.

    ``owns_kernel``: the kernel runs for us alone, so its clock and names are ours to set.
    """

    def __init__(self, workdir: str, run: str, cgroup: str | None, user: str | None, *,
                 owns_kernel: bool = False) -> None:
        self.workdir = workdir
        self.owns_kernel = owns_kernel
        self.run = run
        self.cgroup = cgroup
        self.user = user
        self._default: Account | None = None
        self.to_host = os.path.join(run, "to-host")
        self.from_host = os.path.join(run, "from-host")

    def prepare(self) -> None:
        """Make what jobs and the agent need; idempotent."""
        os.makedirs(self.run, mode=0o755, exist_ok=True)
        try:
            os.mkfifo(self.to_host)
        except FileExistsError:
            pass
        os.chmod(self.to_host, 0o622)  # noqa: S103 - every job writes, only we read
        os.close(os.open(self.from_host, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        if self.cgroup:
            self._prepare_cgroup(self.cgroup)
            write_file("/proc/self/oom_score_adj", "-1000")
        # Inherited by every job.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.umask(0o022)

    def _prepare_cgroup(self, path: str) -> None:
        write_file(os.path.join(os.path.dirname(path), "cgroup.subtree_control"),
                   "+memory +pids +cpu")
        try:
            os.mkdir(path)
        except FileExistsError:
            pass
        write_file(os.path.join(path, "cgroup.subtree_control"), "+memory +pids +cpu")
        available = memory_facts()["MemAvailable"]
        write_file(os.path.join(path, "memory.max"), str(max(available - RESERVED_MEMORY,
                                                             RESERVED_MEMORY)))

    def resolve(self, path: str) -> str:
        """A path of a request: relative ones start in the job's directory."""
        return os.path.join(self.workdir, path)

    def account(self, name: str | None) -> Account | None:
        """A user by name or number; None: stay who we are.

        Raises `KeyError` for one that does not exist.
        """
        wanted = name or self.user
        if wanted is None:
            return None
        # The default user is fixed in the image; looking it up costs 1 ms under emulation.
        if wanted == self.user and self._default:
            return self._default
        entry = pwd.getpwuid(int(wanted)) if wanted.isdecimal() else pwd.getpwnam(wanted)
        found = (entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir,
                 os.getgrouplist(entry.pw_name, entry.pw_gid))
        if wanted == self.user:
            self._default = found
        return found

    def owner(self) -> tuple[int, int] | None:
        """Who owns the files that the host puts."""
        account = self.account(None)
        return None if account is None else (account[1], account[2])


MACHINE = Place(workdir="/job", run="/run/vmjob", cgroup="/sys/fs/cgroup/vmjob", user="job",
                owns_kernel=True)


def write_file(path: str, text: str) -> None:
    """Write a control file of the kernel in one call."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read_file(path: str) -> str:
    """A small file of the kernel; '' when it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return ""
        raise
    try:
        return os.read(fd, 65536).decode("ascii", "replace")
    except OSError as error:
        if error.errno == errno.ENODEV:
            return ""
        raise
    finally:
        os.close(fd)


def read_counters(path: str) -> dict[str, int]:
    """A file of ``name number`` lines."""
    pairs = (line.split() for line in read_file(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def memory_facts() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    facts = {}
    for line in read_file("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        parts = value.split()
        if parts:
            facts[name] = int(parts[0]) * (1024 if len(parts) > 1 else 1)
    return facts


def processor_facts() -> dict[str, Any]:
    """What the kernel says of the (first) processor: its name and what it announces."""
    found: dict[str, Any] = {"processor": "", "processor_flags": []}
    for line in read_file("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            found["processor"] = value.strip()
        elif name.strip() == "flags":
            found["processor_flags"] = value.split()
            break
    return found
