"""A project's VM image as it was made for VirtualBox: Debian, its start script, a boot loader.

BOINC's page on VirtualBox applications tells how: a small Debian, root logged in on the console,
and a script at the end of ``/root/.bashrc`` that mounts the shared folder, runs ``boinc_app`` in it
and shuts the machine down. Nothing of vmjob is in it. The kernel is Debian's ordinary one, whose
modules for VirtualBox are the kernel's own.

No root is needed where this user has subordinate ids. Programs: mmdebstrap, mke2fs, qemu-img,
mtools, syslinux.
"""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import shutil
import stat
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

from vmjob.image.build import PRIVATE
from vmjob.image.initrd import Entry, module_name, module_order, newc

__all__ = ["START", "build", "content", "digest", "run"]

MIB = 1 << 20
SECTOR = 512
#: The boot partition, and the one of the system, which is as large as a small VM image's.
BOOT_AT, BOOT_SIZE = 1 * MIB, 32 * MIB
ROOT_SIZE = 400 * MIB
#: Seconds for one step.
DEADLINE = 1200

#: As on BOINC's page, without its pauses for a person at the keyboard.
START = """
echo --- BOINC VM starting
echo --- Mounting shared directory
mount -t vboxsf shared /root/shared
if [ $? -ne 0 ]; then
    echo --- Failed to mount shared directory
    shutdown -hP 0
fi

echo -- Launching boinc_app
if [ -f /root/shared/boinc_app ]; then
    cd /root/shared
    ./boinc_app
    shutdown -hP 0
else
    echo --- Failed to launch script
fi
shutdown -hP 0
"""

#: Spares an interpreter of machine code what only real hardware needs.
KERNEL_ARGUMENTS = ("root=/dev/sda2 ro quiet mitigations=off nokaslr tsc=reliable clocksource=tsc "
                    "no-kvmclock cryptomgr.notests no_timer_check")
#: What finds the disk on either of VirtualBox's controllers.
BOOT_MODULES = ("ata_piix", "ahci", "sd_mod", "ext4", "crc32c_generic")
#: In the system: the guest's side of VirtualBox.
GUEST_MODULES = ("drivers/virt/vboxguest", "fs/vboxsf")

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
for module in /lib/*.ko; do insmod "$module"; done
until [ -b /dev/sda2 ]; do sleep 0.1; done
mount -t ext4 -o ro /dev/sda2 /newroot
umount /sys
mount -o move /dev /newroot/dev
umount /proc
exec /bin/busybox switch_root /newroot /sbin/init
"""

INITTAB = """id:2:initdefault:
si::sysinit:/etc/init.d/rcS
~~:S:wait:/sbin/sulogin --force
l0:0:wait:/etc/init.d/rc 0
l2:2:wait:/etc/init.d/rc 2
l6:6:wait:/etc/init.d/rc 6
1:2:respawn:/sbin/agetty --autologin root --noclear tty1 linux
"""
AUTOLOGIN = """[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear %I linux
"""
#: Device names that are right under VirtualBox, and nowhere else.
FSTAB = """/dev/sda2 / ext4 errors=remount-ro 0 1
/dev/sda3 none swap sw 0 0
proc /proc proc defaults 0 0
"""
SYSLINUX = f"DEFAULT linux\nLABEL linux\nKERNEL vmlinuz\nINITRD initrd\nAPPEND {KERNEL_ARGUMENTS}\n"

PACKAGES = {"sysvinit": ("sysvinit-core", "e2fsprogs", "kmod", "mount", "usr-is-merged"),
            "systemd": ("systemd-sysv", "dbus", "e2fsprogs", "kmod", "mount", "usr-is-merged")}
#: In the new system, or beside it: the kernel's modules, and what the builder takes from it.
CUSTOMIZE = """set -eu
root=$1
echo vm > "$root/etc/hostname"
mkdir -p "$root/root/shared" "$root/taken"
cd "$root/taken"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: *//p' | head -n 1)
apt-get -o APT::Sandbox::User=root download "$kernel" busybox-static
dpkg-deb --fsys-tarfile linux-image-*.deb > kernel.tar
dpkg-deb --fsys-tarfile busybox-static_*.deb > busybox.tar
rm ./*.deb
cd /
version=${kernel#linux-image-}
tar -x -C "$root" --keep-directory-symlink --wildcards -f "$root/taken/kernel.tar" \
    MODULES "./lib/modules/$version/modules.*"
chroot "$root" depmod "$version"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/* "$root"/usr/share/info
"""
#: Everything but what is mounted.
COPY = ('set -e; mkdir -m 755 "$1/../copy"; tar -C "$1" --one-file-system --exclude="./proc/*" '
        '--exclude="./sys/*" --exclude="./dev/*" -cf - . | tar -C "$1/../copy" -xpf -;')


def digest() -> str:
    """Changes when an image would be made in another way."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def build(directory: Path, *, init: str = "sysvinit", start: str = START) -> Path:
    """Make ``vm_image.vdi`` in ``directory``; ``init``: sysvinit or systemd."""
    target = directory / "vm_image.vdi"
    # mmdebstrap works as another user, who must be able to pass.
    with tempfile.TemporaryDirectory(prefix="old-image-") as name:
        work = Path(name)
        work.chmod(0o777)
        _system(work, init, start)
        _boot(work)
        disk = work / "disk.raw"
        _disk(disk, work / "boot.fat", work / "root.ext4")
        run(["qemu-img", "convert", "-f", "raw", "-O", "vdi", disk, target.with_suffix(".new")])
    target.with_suffix(".new").rename(target)
    return target


def _system(work: Path, init: str, start: str) -> None:
    """The system's partition, ``root.ext4``, and beside it what the boot partition is made of."""
    files = {"etc/fstab": FSTAB, "etc/modules": "vboxguest\nvboxsf\n"}
    if init == "sysvinit":
        files["etc/inittab"] = INITTAB
    else:
        files["etc/systemd/system/getty@tty1.service.d/autologin.conf"] = AUTOLOGIN
    with tarfile.open(work / "files.tar", "w") as archive:
        for path, text in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    (work / "start").write_text(start)
    modules = " ".join(f"'./lib/modules/*/kernel/{name}'" for name in GUEST_MODULES)
    image = shlex.quote(str(work / "root.ext4"))
    run([*(PRIVATE if os.geteuid() == 0 else ()), "mmdebstrap", "--variant=essential",
          "--format=null", "--architectures=amd64", "--include=" + ",".join(PACKAGES[init]),
          '--aptopt=APT::Install-Recommends "false"',
          *(f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("man", "doc", "locale")),
          "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
          "--customize-hook=" + CUSTOMIZE.replace("MODULES", modules),
          f"--customize-hook=tar-in {shlex.quote(str(work / 'files.tar'))} /",
          f'--customize-hook=cat {shlex.quote(str(work / "start"))} >> "$1/root/.bashrc"',
          *(f"--customize-hook=download /taken/{each}.tar {shlex.quote(str(work))}/{each}.tar"
            for each in ("kernel", "busybox")),
          '--customize-hook=rm -r "$1/taken"',
          # Here, where the files still have the owners that they are to have; and a copy of them,
          # without what mmdebstrap mounts among them.
          (f'--customize-hook={COPY} mke2fs -q -F -t ext4 -d "$1/../copy" {image} '
           f'{ROOT_SIZE // 1024}k; rm -r "$1/../copy"'),
          "bookworm", "/dev/null"], TMPDIR=str(work))


def _boot(work: Path) -> None:
    """The boot partition: kernel, initial ramdisk, boot loader."""
    modules: dict[str, bytes] = {}
    with tarfile.open(work / "kernel.tar") as archive:
        for member in archive:
            if "/boot/vmlinuz-" in member.name:
                (work / "vmlinuz").write_bytes(content(archive, member))
            elif member.name.endswith(".ko") and any(
                    f"/kernel/{part}/" in member.name
                    for part in ("drivers/ata", "drivers/scsi", "fs", "lib", "crypto",
                                 "arch/x86/crypto", "block")):
                modules[module_name(Path(member.name).name)] = content(archive, member)
    with tarfile.open(work / "busybox.tar") as archive:
        busybox = next(content(archive, member) for member in archive
                       if member.name.endswith("bin/busybox"))
    directories = ("bin", "dev", "lib", "newroot", "proc", "sys")
    (work / "initrd").write_bytes(newc([
        *(Entry(name, stat.S_IFDIR | 0o755) for name in directories),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("bin/busybox", stat.S_IFREG | 0o755, busybox),
        Entry("init", stat.S_IFREG | 0o755, INIT.encode()),
        *(Entry(f"lib/{turn:02d}-{name}.ko", stat.S_IFREG | 0o644, modules[name])
          for turn, name in enumerate(module_order(BOOT_MODULES, modules)))]))
    (work / "syslinux.cfg").write_text(SYSLINUX)
    fat = work / "boot.fat"
    fat.write_bytes(b"")
    os.truncate(fat, BOOT_SIZE)
    run(["mformat", "-i", fat, "-T", str(BOOT_SIZE // SECTOR), "-h", "64", "-s", "32",
          "-H", str(BOOT_AT // SECTOR), "::"])
    for name in ("vmlinuz", "initrd", "syslinux.cfg"):
        run(["mcopy", "-i", fat, work / name, f"::{name}"])
    run(["syslinux", "--install", fat], TMPDIR=str(work))


def _disk(target: Path, boot: Path, root: Path) -> None:
    """A disk with a boot record and these two partitions."""
    code = Path("/usr/lib/SYSLINUX/mbr.bin").read_bytes()
    root_at = BOOT_AT + BOOT_SIZE
    table = b"".join(
        struct.pack("<B3sB3sII", active, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", at // SECTOR,
                    size // SECTOR)
        for active, kind, at, size in ((0x80, 0x0e, BOOT_AT, BOOT_SIZE),
                                       (0, 0x83, root_at, root.stat().st_size)))
    with target.open("wb") as disk:
        disk.write(code.ljust(446, b"\0") + table.ljust(64, b"\0") + b"\x55\xaa")
        for at, part in ((BOOT_AT, boot), (root_at, root)):
            disk.seek(at)
            with part.open("rb") as file:
                shutil.copyfileobj(file, disk, MIB)


def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Of a file in an archive."""
    file = archive.extractfile(member)
    return file.read() if file else b""


def run(argv: list[str | Path], **environment: str) -> None:
    """Run a program that builds something; raises `RuntimeError` with what it said."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    done = subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, timeout=DEADLINE,
        stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C.UTF-8", "PATH": path,
                                       "MTOOLS_SKIP_CHECK": "1", **environment})
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]} failed: {done.stderr[-3000:]}")
