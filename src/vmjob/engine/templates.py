"""Templates on disk: found, verified, leased, made once, evicted.

    templates/KEY/template.json     what it is, and the checksum of each file
    templates/KEY/lock              locked, shared, by each machine that is a copy
    templates/KEY/...               the driver's files

KEY is a hash of all that a template depends on, so a changed image, hypervisor or shape never
meets a stale one. Its making is `vmjob.engine.freezing`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vmjob.errors import TemplateUnusable, UsageError
from vmjob.guest.client import Hello
from vmjob.home import Home, remove_tree
from vmjob.host import durable
from vmjob.host.digest import digest
from vmjob.host.seal import read_seal, seal_of, write_seal
from vmjob.machine.contract import TEMPLATE_DISK_GB, Driver, MachineSpec

__all__ = ["Lease", "Template", "TemplateStore", "key_of"]

#: Raise this when the same key would stand for another template than before.
FORMAT = 1
#: Bytes of disk that all templates of one home may take, unless ``VMJOB_TEMPLATES_MB`` says
#: otherwise; one of a 256 MiB machine takes about 80 MB.
CAP = 4 << 30
CAP_VARIABLE = "VMJOB_TEMPLATES_MB"

MANIFEST = "template.json"
LOCK = "lock"
_REMOVED = ".removed-"


class File(msgspec.Struct, frozen=True):
    """One file of a template; ``sha256`` as `digest` has it."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a template is: ``identity`` is all that its key is made of, ``hello`` what its agent
    said of itself, ``seconds`` how long it took to make, ``shape`` the part of the identity that
    people ask for.
    """

    format: int
    driver: str
    image: str
    identity: dict[str, Any]
    shape: dict[str, Any]
    created: float
    seconds: float
    hello: Hello
    files: dict[str, File]


@dataclass(frozen=True)
class Template:
    """A template in the store; ``disk_bytes`` is what it takes, holes not counted."""

    key: str
    directory: Path
    manifest: Manifest
    disk_bytes: int
    used: float


def key_of(driver: Driver, shape: MachineSpec) -> tuple[str, dict[str, Any]]:
    """The key of the template for machines of this shape, and what it is made of."""
    told = {"memory_mb": shape.memory_mb, "cpus": shape.cpus, "network": shape.network,
            "accelerator": shape.accelerator, "cpu_model": shape.cpu_model,
            "disk_gb": min(shape.disk_gb, TEMPLATE_DISK_GB), "display": shape.display}
    identity = {"format": FORMAT, "driver": driver.name, "shape": told,
                "image": shape.boot.digest if shape.boot else None, **driver.identity(shape)}
    return hash_of(identity), identity


def hash_of(identity: dict[str, Any]) -> str:
    """The key that stands for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


class Lease:
    """A verified template that nobody removes until this is closed."""

    def __init__(self, template: Template, fd: int, seal: dict[str, object]) -> None:
        self.template = template
        self._fd = fd
        self._seal = seal

    def check(self) -> None:
        """Raise `TemplateUnusable` when somebody changed the files since they were verified."""
        if _seal(self.template.directory, self.template.manifest) != self._seal:
            # A checkpoint's link to a file touches it as well, so only its bytes can tell.
            _verify(self.template)

    def close(self) -> None:
        os.close(self._fd)


class TemplateStore:
    """The templates of one home."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def all(self) -> list[Template]:
        """All that can be read, the last used first."""
        found = []
        for directory in self._home.templates.iterdir():
            if not directory.name.startswith("."):
                with contextlib.suppress(TemplateUnusable):
                    found.append(_read(directory))
        return sorted(found, key=lambda each: -each.used)

    def of_image(self, digest: str) -> list[Template]:
        """Those that were made from an image."""
        return [each for each in self.all() if each.manifest.image == digest]

    def lease(self, key: str) -> Lease | None:
        """The template with this key, verified and held; None when there is none.

        It is read whole the first time after this computer's start, and after somebody touched
        it. Raises `TemplateUnusable` for a damaged one.
        """
        directory = self._home.templates / key
        looked = False
        while True:
            try:
                fd = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                if not directory.exists():
                    return None
                if looked:
                    raise TemplateUnusable(f"the template {key} has no lock") from None
                looked = True  # it may have appeared between the two looks
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                if _is_at(fd, directory / LOCK):
                    return self._leased(directory, fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # it was removed between opening and locking

    def _leased(self, directory: Path, fd: int) -> Lease:
        template = _read(directory)
        seal = _seal(directory, template.manifest)
        path = self._home.cache / f"verified-template-{template.key}.json"
        if read_seal(path) != seal:
            _verify(template)
            with contextlib.suppress(OSError):  # then it is read again next time
                write_seal(path, seal)
        with contextlib.suppress(OSError):
            os.utime(directory / LOCK)
        return Lease(template, fd, seal)

    def publish(self, made: Path, files: list[str], identity: dict[str, Any], hello: Hello,
                seconds: float) -> None:
        """Make a template of the driver's ``files`` in the directory ``made``, all or nothing.

        The caller holds the lock of the key's making. Raises `OSError`.
        """
        beside = made / "template"
        beside.mkdir(mode=0o700)
        for name in files:
            (made / name).rename(beside / name)
        checked = {name: File((beside / name).stat().st_size, digest(beside / name))
                   for name in files}
        manifest = Manifest(FORMAT, identity["driver"], identity["image"] or "", identity,
                            identity["shape"],
                            time.time(), seconds, hello, checked)
        key = hash_of(identity)
        (beside / MANIFEST).write_bytes(_sealed(manifest))
        (beside / LOCK).touch(mode=0o600)
        for path in (*beside.iterdir(), beside):
            durable.sync(path)
        self.remove(key)
        beside.rename(self._home.templates / key)
        durable.sync(self._home.templates)
        self.evict(key)

    def remove(self, key: str) -> bool:
        """Remove one; false when copies of it run (those go on if it is removed by force)."""
        directory = self._home.templates / key
        try:
            fd = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            remove_tree(directory)
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(fd, directory / LOCK):
                return False  # it is another one by now
            self._discard(directory)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def condemn(self, key: str) -> None:
        """Let nobody start from a template any more; its running copies hold what they need."""
        self._discard(self._home.templates / key)

    def _discard(self, directory: Path) -> None:
        aside = directory.with_name(f"{_REMOVED}{directory.name}-{os.urandom(4).hex()}")
        with contextlib.suppress(FileNotFoundError):
            directory.rename(aside)
        remove_tree(aside)
        (self._home.cache / f"verified-template-{directory.name}.json").unlink(missing_ok=True)

    def evict(self, keep: str) -> list[Template]:
        """Remove the longest unused until all fit below the cap; never ``keep`` or one in use."""
        self.remove_unreadable()
        found = self.all()
        total = sum(each.disk_bytes for each in found)
        evicted = []
        for each in reversed(found):
            if total <= cap():
                break
            if each.key != keep and self.remove(each.key):
                total -= each.disk_bytes
                evicted.append(each)
        return evicted

    def unreadable(self) -> list[Path]:
        """Directories that no vmjob of this version can use: damaged, or another version's."""
        found = []
        for directory in self._home.templates.iterdir():
            if not directory.name.startswith("."):
                try:
                    _read(directory)
                except TemplateUnusable:
                    found.append(directory)
        return found

    def remove_unreadable(self) -> list[Path]:
        """Remove those that no machine uses."""
        return [each for each in self.unreadable() if self.remove(each.name)]

    def sweep(self) -> None:
        """Finish removals that were cut off."""
        for directory in self._home.templates.glob(f"{_REMOVED}*"):
            remove_tree(directory)


def cap() -> int:
    """Bytes that all templates of a home may take; raises `UsageError`."""
    given = os.environ.get(CAP_VARIABLE)
    if given is None:
        return CAP
    if not given.isdecimal():
        raise UsageError(f"{CAP_VARIABLE} is not a number of MiB: {given!r}")
    return int(given) << 20


def room_for(home: Home, shape: MachineSpec) -> bool:
    """Whether this computer's disk holds a template of a machine of this size."""
    return shutil.disk_usage(home.templates).free > 2 * (shape.memory_mb << 20)


def _verify(template: Template) -> None:
    """Read all of it; raises `TemplateUnusable` unless it is what was published."""
    for name, file in template.manifest.files.items():
        try:
            found = digest(template.directory / name)
        except OSError as error:
            raise TemplateUnusable(f"the template {template.key} cannot be read: "
                                   f"{error.strerror}") from error
        if found != file.sha256:
            raise TemplateUnusable(f"the template {template.key} is damaged: {name}")


def _read(directory: Path) -> Template:
    try:
        manifest = _unsealed((directory / MANIFEST).read_bytes())
        if hash_of(manifest.identity) != directory.name:
            raise TemplateUnusable(f"the template {directory.name} is not what its name says")
        if manifest.format != FORMAT:
            raise TemplateUnusable(f"the template {directory.name} is of another vmjob")
        for name, file in manifest.files.items():
            if "/" in name or (directory / name).lstat().st_size != file.size:
                raise TemplateUnusable(f"the template {directory.name} is damaged: {name}")
        taken = sum(entry.lstat().st_blocks * 512 for entry in directory.iterdir())
        return Template(directory.name, directory, manifest, taken,
                        (directory / LOCK).stat().st_mtime)
    except (OSError, msgspec.MsgspecError) as error:
        raise TemplateUnusable(f"the template {directory.name} cannot be read: {error}") from error


class _Sealed(msgspec.Struct, frozen=True):
    """The file: a manifest, and the checksum of its bytes."""

    sha256: str
    template: msgspec.Raw


def _sealed(manifest: Manifest) -> bytes:
    raw = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Sealed(hashlib.sha256(raw).hexdigest(), msgspec.Raw(raw)))


def _unsealed(data: bytes) -> Manifest:
    sealed = msgspec.json.decode(data, type=_Sealed)
    if hashlib.sha256(sealed.template).hexdigest() != sealed.sha256:
        raise TemplateUnusable("a template's description is damaged")
    return msgspec.json.decode(sealed.template, type=Manifest)


def _seal(directory: Path, manifest: Manifest) -> dict[str, object]:
    try:
        return seal_of((directory / name, file.sha256) for name, file in manifest.files.items())
    except OSError as error:
        raise TemplateUnusable(f"the template {directory.name} cannot be read: "
                               f"{error.strerror}") from error


def _is_at(fd: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False
