"""A CD that starts without a disk, as boinc2docker's: its guest mounts VirtualBox's shared folders.

Nothing of vmjob is in it. Its kernel is the image's, because Debian's ordinary one does not begin
within minutes in VirtualBox's interpreter. That one lacks VirtualBox's two modules; they are made
for it from Debian's source of the same version.

No root is needed where this user has subordinate ids. Programs: mmdebstrap, dpkg-deb, make, gcc,
strip.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
import tarfile
import tempfile
from pathlib import Path

from tests.old_image import content, run
from vmjob.image.build import PRIVATE
from vmjob.image.initrd import Entry, module_name, module_order, newc
from vmjob.image.iso import write_iso
from vmjob.image.store import Image
from vmjob.machine.virtualbox.definition import INTERPRETED_KERNEL_ARGUMENTS

__all__ = ["Unavailable", "digest", "make_ramdisk", "write_cd"]

KERNEL_ARGUMENTS = ("console=ttyS0", "quiet", "cryptomgr.notests", "no_timer_check")
#: Directories of the kernel's source, and what makes modules of them.
SOURCES = ("drivers/virt/vboxguest", "fs/vboxsf")
CHOSEN = ("CONFIG_VBOXGUEST=m", "CONFIG_VBOXSF_FS=m")

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
for module in /lib/*.ko; do insmod "$module"; done
mkdir -p /root/shared
echo --- the CD has started
mount -t vboxsf shared /root/shared && cd /root/shared && ./boinc_app
poweroff -f
"""

#: A kernel's headers say which version its source has; any kbuild of its series serves.
FETCH = """set -eu
mkdir "$1/taken"
cd "$1/taken"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
version=$(apt-cache show --no-all-versions linux-headers-RELEASE | sed -n 's/^Version: //p')
apt-get -o APT::Sandbox::User=root download "linux-headers-RELEASE=$version" \
    "linux-headers-COMMON=$version" "linux-source-SERIES=$version" linux-kbuild-SERIES \
    busybox-static
"""


class Unavailable(Exception):
    """Debian's packages cannot be had here; it says why."""


def digest() -> str:
    """Changes when a ramdisk would be made in another way."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def write_cd(target: Path, image: Image, ramdisk: Path) -> None:
    """Make the CD of an image's kernel and boot loader, and a ramdisk made for that kernel."""
    assert image.loader is not None
    write_iso(target, image.loader, image.kernel, ramdisk,
              " ".join((*KERNEL_ARGUMENTS, *INTERPRETED_KERNEL_ARGUMENTS)))


def make_ramdisk(target: Path, release: str) -> None:
    """Make the ramdisk for the kernel of this name; raises `Unavailable`."""
    # mmdebstrap works as another user, who must be able to pass.
    with tempfile.TemporaryDirectory(prefix="own-cd-") as name:
        work = Path(name)
        work.chmod(0o777)
        system = _packages(work, release)
        modules = _modules(work, system, release)
        busybox = (system / "bin/busybox").read_bytes()
    target.write_bytes(newc([
        *(Entry(each, stat.S_IFDIR | 0o755)
          for each in ("bin", "dev", "lib", "proc", "root", "sys")),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("bin/busybox", stat.S_IFREG | 0o755, busybox),
        Entry("init", stat.S_IFREG | 0o755, INIT.encode()),
        *(Entry(f"lib/{turn:02d}-{each}.ko", stat.S_IFREG | 0o644, modules[each])
          for turn, each in enumerate(module_order(sorted(modules), modules)))]))


def _packages(work: Path, release: str) -> Path:
    """What is needed, unpacked into a directory."""
    hook = FETCH.replace("RELEASE", release).replace("SERIES", _series(release)).replace(
        "COMMON", re.sub(r"^([\d.]+-\d+)-.*", r"\1-common", release))
    try:
        run([*(PRIVATE if os.geteuid() == 0 else ()), "mmdebstrap", "--variant=custom",
              "--format=null", "--architectures=amd64", f"--customize-hook={hook}",
              f"--customize-hook=copy-out /taken {shlex.quote(str(work))}", "bookworm",
              "/dev/null"], TMPDIR=str(work))
    except (RuntimeError, OSError) as error:
        said = [line for line in str(error).splitlines() if line.startswith("E: ")]
        raise Unavailable(f"no modules of VirtualBox for the kernel {release}: "
                          f"{said[0] if said else error}") from error
    system = work / "system"
    for package in (work / "taken").glob("*.deb"):
        run(["dpkg-deb", "-x", package, system])
    return system


def _modules(work: Path, system: Path, release: str) -> dict[str, bytes]:
    """VirtualBox's modules for this kernel, by their names."""
    source, headers = work / "source", system / f"usr/src/linux-headers-{release}"
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace(" /usr/src/", f" {system}/usr/src/"))
    name = f"linux-source-{_series(release)}"
    with tarfile.open(system / f"usr/src/{name}.tar.xz", "r|xz") as archive:
        for member in archive:
            path = member.name.removeprefix(f"{name}/")
            if member.isfile() and path.startswith(tuple(f"{each}/" for each in SOURCES)):
                (source / path).parent.mkdir(parents=True, exist_ok=True)
                (source / path).write_bytes(content(archive, member))
    (source / "Kbuild").write_text("".join(f"obj-m += {each}/\n" for each in SOURCES))
    # By its plain name: Debian's kernel asks for the one of its release.
    run(["make", "-C", headers, f"M={source}", "CC=gcc", *CHOSEN, "modules"])
    modules = {}
    for path in source.rglob("*.ko"):
        run(["strip", "--strip-debug", path])
        modules[module_name(path.name)] = path.read_bytes()
    return modules


def _series(release: str) -> str:
    """6.1 of 6.1.0-56-cloud-amd64."""
    return ".".join(release.split(".")[:2])
