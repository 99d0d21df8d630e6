"""Making an image from Debian packages: which programs run, and in which order.

No root is needed where this user has subordinate ids (mmdebstrap's ``unshare`` mode). The
same recipe and the same packages give the same bytes; ``docs/explanation/images.md`` says
what is pinned and what is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from vmjob.errors import HostDiskFull, ImageBuildFailed, ProgramMissing
from vmjob.guest.agent.wire import PROTOCOL_VERSION
from vmjob.host.guard import guarded
from vmjob.image import guestfiles, manifest
from vmjob.image.initrd import initrd, module_name
from vmjob.image.manifest import Manifest, Package, Part
from vmjob.image.recipe import Recipe

__all__ = ["Progress", "build", "mke2fs_argv", "mksquashfs_argv", "mmdebstrap_argv"]

#: Called with the fraction done (0 to 1) and what is being done.
Progress = Callable[[float, str], None]

#: Every time in an image is this one (2023-11-14 22:13:20 UTC): with the build's own time in it,
#: no two builds would be equal.
SOURCE_DATE_EPOCH = 1_700_000_000
#: Seconds for a step: a slow line and an old disk, but not for ever.
DEADLINE = 3600.0
#: Seconds that a step gets to clean up after itself when it is cancelled.
TERM_PATIENCE = 10.0
#: Lines of a failed step's output that are shown.
LOG_SHOWN = 40

#: Every image has these: Python for the agent and for jobs; usr-is-merged in place of the
#: conversion program, which would bring 45 MB of Perl; netbase for service and protocol names.
BASE_PACKAGES = ("python3", "usr-is-merged", "netbase")
#: As root, mmdebstrap mounts /proc, /sys and more in the new root. When it is killed they would
#: stay, and removing the directory would reach through them; in namespaces of their own, mounts and
#: processes are gone with it. (Without root it makes a mount namespace itself.)
PRIVATE = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
           "--")

#: Not in an image: what nobody reads in a machine.
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*")
#: But examples are data: packages exist for nothing else, and jobs use them.
#: And licences go where the programs go.
KEPT = ("/usr/share/doc/*/examples/*", "/usr/share/doc/*/copyright")

#: Program -> Debian package.
PROGRAMS = {"mmdebstrap": "mmdebstrap", "mksquashfs": "squashfs-tools", "mke2fs": "e2fsprogs",
            "qemu-img": "qemu-utils", "dpkg-deb": "dpkg", "apt-get": "apt"}

#: The writable file system starts with this size and is grown by the agent.
SCRATCH_SIZE = 1 << 30
SCRATCH_UUID = "766d6a6f-6200-4000-8000-000000000001"

#: Packages whose files are taken and which are not installed (see ``guest/customize``).
FETCHED = ("kernel", "busybox", "isolinux", "syslinux")
#: Where the build leaves what is fetched from the new root (see ``guest/customize``).
_WORK = "/vmjob-build"

#: Steps of the build and the share of its time until each begins (measured: 30 s in all).
STEPS = (
    ("running apt-get update", 0.01, "asking for the package list"),
    ("downloading packages", 0.06, "downloading packages"),
    ("extracting archives", 0.12, "unpacking packages"),
    ("installing essential packages", 0.20, "installing packages"),
    ("installing remaining packages", 0.36, "installing packages"),
    ("running --customize-hook", 0.45, "adding the agent and the kernel"),
    ("creating tarball", 0.74, "collecting the files"),
)
COMPRESSING = 0.80
FINISHING = 0.95


def mmdebstrap_argv(recipe: Recipe, overlay: Path, work: Path) -> list[str]:
    """Make ``work/root.tar`` and fetch kernel, busybox, boot loader and package list beside it."""
    fetched = [f"--customize-hook=download {_WORK}/{name} {shlex.quote(str(work / name))}"
               for name in (*(f"{name}.tar" for name in FETCHED), "packages")]
    return [
        "mmdebstrap", "--variant=essential", "--format=tar", "--architectures=amd64",
        "--include=" + ",".join((*BASE_PACKAGES, *recipe.packages)),
        '--aptopt=APT::Install-Recommends "false"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        *(f"--dpkgopt=path-include={pattern}" for pattern in KEPT),
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        f"--customize-hook=tar-in {shlex.quote(str(overlay))} /",
        "--customize-hook=" + guestfiles.resource("customize").decode(),
        *fetched,
        f'--customize-hook=rm -rf "$1"{_WORK}',
        recipe.suite, str(work / "root.tar"),
    ]  # fmt: skip


def mksquashfs_argv(target: Path) -> list[str]:
    """Pack a tar archive from stdin.

    lz4, because a guest under emulation reads it fastest: Python's first start takes 0.3 s, with
    zstd 0.4, with xz 0.9 (measured), for 41 MB instead of 31 or 29.
    """
    return ["mksquashfs", "-", str(target), "-tar", "-comp", "lz4", "-Xhc", "-b", "128K",
            "-no-xattrs", "-quiet", "-no-progress"]


def mke2fs_argv(target: Path) -> list[str]:
    """Make the writable file system's start: no journal (nobody mounts it twice), growable.

    ``resize`` reserves room in the group descriptors for growing to 1 TiB while mounted.
    """
    blocks = (1 << 40) // 4096
    return ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^has_journal",
            "-E", f"lazy_itable_init=1,nodiscard,resize={blocks},hash_seed={SCRATCH_UUID}",
            "-U", SCRATCH_UUID, str(target)]


def build(recipe: Recipe, directory: Path, progress: Progress) -> Manifest:
    """Build an image into the empty ``directory``.

    Raises `ProgramMissing`, `HostDiskFull` or `ImageBuildFailed` (with the end of the log).
    """
    for program, package in PROGRAMS.items():
        if _find(program) is None:
            raise ProgramMissing(f"the program {program} is not installed",
                                 advice=f"Install it, on Debian and Ubuntu: apt install {package}",
                                 program=program, package=package)
    work = directory / "work"
    work.mkdir()
    progress(0.0, "starting")
    overlay = work / "overlay.tar"
    overlay.write_bytes(guestfiles.overlay_tar(guestfiles.agent_sources(),
                                               guestfiles.job_library(),
                                               guestfiles.resource("pid1"), SOURCE_DATE_EPOCH))
    # Without root it works as another user, who could not pass through our directories.
    as_root = os.geteuid() == 0
    _run([*(PRIVATE if as_root else ()), *mmdebstrap_argv(recipe, overlay, work)],
         environment={"TMPDIR": str(work)} if as_root else {}, on_line=_follow(progress))
    progress(COMPRESSING, "compressing the root file system")
    with (work / "root.tar").open("rb") as root:
        _run(mksquashfs_argv(directory / "root.squashfs"), stdin=root)
    progress(FINISHING, "making the initial ramdisk")
    version = _boot_files(work, directory)
    _loader(work, directory / "loader.zip")
    _scratch(work, directory / "scratch.qcow2")
    packages = parse_packages((work / "packages").read_text(encoding="utf-8"))
    shutil.rmtree(work)
    parts = {name: describe(directory / file) for name, file in
             (("kernel", "kernel"), ("initrd", "initrd"), ("root", "root.squashfs"),
              ("scratch", "scratch.qcow2"), ("loader", "loader.zip"))}
    made = Manifest(
        format=manifest.FORMAT, name=recipe.name, suite=recipe.suite, requested=recipe.packages,
        recipe_digest=recipe.digest(), created=datetime.now(UTC).isoformat(timespec="seconds"),
        agent_protocol=PROTOCOL_VERSION, kernel_version=version, parts=parts, packages=packages,
        total_size=sum(part.size for part in parts.values()))
    manifest.write(directory, made)
    progress(1.0, "done")
    return made


def describe(path: Path) -> Part:
    """A part's name, size and checksum."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Part(path.name, path.stat().st_size, digest)


def parse_packages(text: str) -> tuple[Package, ...]:
    """Lines of ``name version architecture``, sorted, each once."""
    rows = sorted({tuple(line.split()) for line in text.splitlines() if line.strip()})
    return tuple(Package(*row) for row in rows if len(row) == 3)


def _boot_files(work: Path, directory: Path) -> str:
    """Kernel and initial ramdisk from the fetched archives; returns the kernel's version."""
    modules: dict[str, bytes] = {}
    version = ""
    with tarfile.open(work / "kernel.tar") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if found := re.fullmatch(r"boot/vmlinuz-([\w.+~-]+)", name):
                version = found.group(1)
                (directory / "kernel").write_bytes(_content(archive, member))
            elif name.endswith(".ko") and ("/drivers/" in name or "/fs/" in name
                                           or "/net/" in name or "/lib/" in name):
                modules[module_name(Path(name).name)] = _content(archive, member)
    with tarfile.open(work / "busybox.tar") as archive:
        busybox = next(_content(archive, member) for member in archive
                       if member.name.endswith("bin/busybox"))
    if not version:
        raise ImageBuildFailed("the kernel's package has no kernel in it")
    try:
        archive_bytes = initrd(busybox, guestfiles.resource("init"), modules)
    except (KeyError, ValueError) as error:
        raise ImageBuildFailed(f"the kernel's package lacks a module: {error}") from error
    (directory / "initrd").write_bytes(archive_bytes)
    return version


def _loader(work: Path, target: Path) -> None:
    """The boot loader of a CD (`vmjob.image.iso`)."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as loader:
        for package, path in (("isolinux", "usr/lib/ISOLINUX/isolinux.bin"),
                              ("syslinux", "usr/lib/syslinux/modules/bios/ldlinux.c32")):
            with tarfile.open(work / f"{package}.tar") as archive:
                info = zipfile.ZipInfo(Path(path).name, (2023, 11, 14, 22, 13, 20))
                info.compress_type = zipfile.ZIP_DEFLATED
                loader.writestr(info, _content(archive, archive.getmember(f"./{path}")))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def _scratch(work: Path, target: Path) -> None:
    raw = work / "scratch.ext4"
    with raw.open("wb") as file:
        file.truncate(SCRATCH_SIZE)
    _run(mke2fs_argv(raw), environment={"E2FSPROGS_FAKE_TIME": str(SOURCE_DATE_EPOCH)})
    _run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(target)])


def _follow(progress: Progress) -> Callable[[str], None]:
    """Turns mmdebstrap's messages into progress."""

    def hear(line: str) -> None:
        for sign, fraction, text in STEPS:
            if line.startswith("I: ") and sign in line:
                progress(fraction, text)

    return hear


def _find(program: str) -> str | None:
    # mke2fs is in a directory that ordinary users do not search.
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _run(argv: Sequence[str], *, stdin: object = None, environment: dict[str, str] | None = None,
         on_line: Callable[[str], None] = lambda line: None) -> None:
    """Run a step to its end; on any other way out its whole process group is killed."""
    kept: deque[str] = deque(maxlen=LOG_SHOWN)
    # It dies with us even when we are killed; what it leaves then is swept by the next build.
    command = guarded([_find(argv[0]) or argv[0], *argv[1:]], os.getpid(),
                      drop_capabilities=False, may_gain_privileges=True)
    process = subprocess.Popen(
        command, stdin=stdin if stdin is not None else subprocess.DEVNULL,  # type: ignore[call-overload]
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH),
             "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin",
             **(environment or {})})
    late = threading.Timer(DEADLINE, _kill, (process,))
    late.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            kept.append(line.rstrip())
            on_line(line)
        process.wait()
    finally:
        late.cancel()
        if process.poll() is None:
            _kill(process)
        process.wait()
        process.stdout.close()
    if process.returncode != 0:
        log = "\n".join(kept)
        if "No space left on device" in log:
            raise HostDiskFull("no room left while building the image", log=log)
        raise ImageBuildFailed(f"{argv[0]} failed with status {process.returncode}; the end of "
                               f"its log:\n{log}", log=log)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a step: first so that it can clean up after itself, then for good."""
    for number, patience in ((signal.SIGTERM, TERM_PATIENCE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return
