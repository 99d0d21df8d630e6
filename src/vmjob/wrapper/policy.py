"""What the owner of this computer allows: one file, obeyed whatever a project asks.

    allow = true                     # may virtual machines run at all
    machines = 2                     # how many at once, over all projects
    memory_mb = 4096                 # the most that one may have, MiB
    cpus = 2                         # the most processors that one may have
    network = false                  # may one reach the network
    accelerators = ["kvm", "tcg"]    # which may be used; tcg is emulation, slow and always there

What is not said is allowed, but for emulation, which a project has to allow as well.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from vmjob.errors import AcceleratorUnusable, PolicyForbids, PolicyInvalid
from vmjob.job.model import Job, Network

__all__ = ["FILE", "SYSTEM", "Policy", "read"]

#: Its name in BOINC's data directory, and where an administrator puts one for all of a computer.
FILE = "vmjob_policy.toml"
SYSTEM = Path("/etc/vmjob/policy.toml")
#: Bytes; nothing honest is longer.
MAX_SIZE = 64 << 10
EMULATION = "tcg"
ACCELERATORS = frozenset({"kvm", "hvf", "whpx", "hm", EMULATION})

Positive = Annotated[int, msgspec.Meta(ge=1)]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one file says; None: nothing about it. ``path``: which file, '' for none."""

    allow: bool = True
    machines: Annotated[int, msgspec.Meta(ge=0)] | None = None
    memory_mb: Positive | None = None
    cpus: Positive | None = None
    network: bool = True
    accelerators: frozenset[str] | None = None
    path: str = ""

    def check(self, job: Job) -> None:
        """Raise `PolicyForbids` for the first thing of the job that is not allowed."""
        if not self.allow or self.machines == 0:
            raise self._forbids("virtual machines are not allowed on this computer")
        if job.network is not Network.NONE and not self.network:
            raise self._forbids("the job needs the network, which is not allowed")
        if self.memory_mb is not None and job.memory_mb > self.memory_mb:
            raise self._forbids(f"the job needs {job.memory_mb} MiB of memory; at most "
                                f"{self.memory_mb} are allowed")

    def check_begun(self, job: Job) -> None:
        """The same for a job that has begun, whose machine keeps the processors that it has."""
        self.check(job)
        if self.cpus is not None and job.cpus > self.cpus:
            raise self._forbids(f"the job has begun with {job.cpus} processors; at most "
                                f"{self.cpus} are allowed now")

    def allowed(self, *, emulation: bool) -> frozenset[str]:
        """The accelerators that may be used; ``emulation``: whether the project allows it."""
        if self.accelerators is not None:
            return self.accelerators
        return ACCELERATORS if emulation else ACCELERATORS - {EMULATION}

    def asking_for_emulation(self, error: AcceleratorUnusable,
                             allowed: frozenset[str]) -> AcceleratorUnusable:
        """The error in the words that a volunteer gets to read, of which 240 bytes are shown.

        ``allowed``: what was. Emulation is offered unless the owner has spoken of it already.
        """
        if EMULATION in allowed or self.accelerators is not None:
            return error
        mending = "" if "vmjob doctor" in error.advice else f"{error.advice} "
        return AcceleratorUnusable(
            "hardware virtualization does not work here",
            advice=f'{mending}For emulation (slow), write accelerators = ["kvm", "tcg"] into '
                   f"{FILE} in BOINC's directory.", why=error.message)

    def _forbids(self, what: str) -> PolicyForbids:
        return PolicyForbids(f"{what} ({self.path})")


def read(paths: Iterable[Path]) -> Policy:
    """The strictest of all that these files say; missing ones say nothing.

    Raises `PolicyInvalid` for a file that cannot be read or understood: what it forbids is not
    known then.
    """
    policy = Policy()
    for path in paths:
        found = _one(path)
        if found is not None:
            policy = _stricter(policy, found)
    return policy


def _one(path: Path) -> Policy | None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIZE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise PolicyInvalid(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_SIZE:
        raise PolicyInvalid(f"{path} is longer than {MAX_SIZE} bytes")
    try:
        said = tomllib.loads(data.decode("utf-8"))
        if "path" in said:
            raise PolicyInvalid(f"{path}: `path` is nothing that can be said")
        policy = msgspec.convert(said, Policy)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise PolicyInvalid(f"{path}: {error}") from None
    if unknown := (policy.accelerators or frozenset()) - ACCELERATORS:
        raise PolicyInvalid(f"{path}: {min(unknown)!r} is no accelerator; there are "
                            f"{', '.join(sorted(ACCELERATORS))}")
    return msgspec.structs.replace(policy, path=str(path))


def _stricter(one: Policy, other: Policy) -> Policy:
    accelerators = other.accelerators if one.accelerators is None else (
        one.accelerators if other.accelerators is None
        else one.accelerators & other.accelerators)
    return Policy(
        allow=one.allow and other.allow, machines=_least(one.machines, other.machines),
        memory_mb=_least(one.memory_mb, other.memory_mb), cpus=_least(one.cpus, other.cpus),
        network=one.network and other.network, accelerators=accelerators,
        path=" and ".join(filter(None, (one.path, other.path))))


def _least(one: int | None, other: int | None) -> int | None:
    given = [each for each in (one, other) if each is not None]
    return min(given) if given else None
