"""A Linux system of the job's own, on our kernel: found on its disk, started, and seen to its end.

    look [--iso] [--cache-disk]     find the system on the disk that the machine has besides, and
                                    mount it
    run WORD...                     start its init, and wait until it switches the machine off

It is a root task of a job like any other. Its init is process 1 of a process namespace, on a root
of its own: an overlay over its disk, which is never written. What it writes on its consoles is the
task's output. A CD and a second disk have the names there that they have in a PC. See
docs/explanation/old-images.md.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Collection, Iterator

from . import kernel
from .disks import SECTOR, partitions, vdi_runs

#: Where our kernel's modules are that only this needs.
MODULES = "/usr/lib/vmjob/modules"
#: A disk's name, by which a driver says which one it is and what it holds.
SERIAL = "vmjob-{}-"
#: Where disks are on a controller that gives them no names, and what they hold then.
PLACES = {"disk": {"0:0:3:0": "vdi", "0:0:4:0": "raw"}, "iso": {"0:0:5:0": "raw"},
          "cache_disk": {"0:0:6:0": "vdi", "0:0:7:0": "raw"}}
SCSI = "/sys/bus/scsi/devices"
#: Words for the disks that a job may have besides. An image that was built before does not know
#: them, and says so.
BESIDES = {"--iso": "iso", "--cache-disk": "cache_disk"}
#: What those are called in the system.
CD, CDROM, SECOND = "sr0", "cdrom", "sdb"
#: Below: the disk's system as it is, the machine's writable disk, and both together.
BASE = "/run/vmjob/system"
DISK, SCRATCH, ROOT = f"{BASE}/disk", f"{BASE}/scratch", f"{BASE}/root"
#: In the system: ours, and below it the machine's root while the system is put together.
OURS = "/.vmjob"
FOLDERS = f"{OURS}/folders"
MACHINE = f"{OURS}/machine"

#: As the kernel tries them; a shell alone is no system.
INITS = ("/sbin/init", "/etc/init", "/bin/init")
#: A system starts itself again when it was told to, as a PC does; one that does nothing else must
#: not do so for ever.
RESTARTS = 10

#: How a task ends that found no system, and how one start of a system ended.
NOT_FOUND = 3
OFF, AGAIN, FAILED = 0, 10, 1

#: Consoles that are the task's output. Without a screen nobody sees what is on the first.
CONSOLES = ("console", "tty1", "ttyS0")
READ = 65536

#: What util-linux and busybox call for ``mount -t vboxsf``; options of VirtualBox's own program.
MOUNT_VBOXSF = f"""#!/bin/sh
# Mounts a shared folder: vmjob keeps it here, in step with the host, so it has only to be bound.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
name= directory= options= seen=0
while [ $# -gt 0 ]; do
    case $1 in
    -o) shift; options=$options,$1 ;;
    -o*) options=$options,${{1#-o}} ;;
    -t | -N) shift ;;
    -*) ;;
    *)
        seen=$((seen + 1))
        case $seen in 1) name=$1 ;; 2) directory=$1 ;; esac
        ;;
    esac
    [ $# -eq 0 ] || shift
done
if [ $seen -ne 2 ]; then
    echo "usage: mount.vboxsf [-o OPTIONS] NAME DIRECTORY" >&2
    exit 1
fi
case $name in "" | . | .. | */*) known=no ;; *) known=yes ;; esac
if [ $known = no ] || [ ! -d "{FOLDERS}/$name" ]; then
    echo "mount.vboxsf: shared folder '$name' was not found (check VM settings / spelling)" >&2
    exit 1
fi
folder={FOLDERS}/$name
owner= group= way=
IFS=,
set -f
for option in $options; do
    case $option in
    uid=*) owner=${{option#uid=}} ;;
    gid=*) group=${{option#gid=}} ;;
    ro) way=ro ;;
    rw) way= ;;
    esac
done
unset IFS
mount -o bind -- "$folder" "$directory" || exit 1
[ "$way" != ro ] || mount -o remount,bind,ro -- "$directory" || exit 1
# VirtualBox shows every file as theirs; here those that are there become so.
[ -z "$owner" ] || chown -R -h -- "$owner" "$folder" 2> /dev/null
[ -z "$group" ] || chgrp -R -h -- "$group" "$folder" 2> /dev/null
exit 0
"""


def main(arguments: list[str]) -> int:
    """Do what is asked; the exit code of the task."""
    if arguments[:1] == ["look"] and set(arguments[1:]) <= set(BESIDES):
        return look(arguments[1:])
    if arguments[:1] == ["run"]:
        return System(arguments[1:]).run()
    _say("usage: look [--iso | --cache-disk]... | "
         "run [NAME=PATH | NAME=PATH:ro | --network | --display | --iso | --cache-disk]...")
    return 2


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# -- where it is -----------------------------------------------------------------------------


def look(words: list[str]) -> int:
    """Mount the first partition that has a system on it."""
    os.makedirs(DISK, mode=0o700, exist_ok=True)
    said = []
    try:
        for word in words:
            _find(BESIDES[word])
        for device in _candidates():
            try:
                # It is not ours to write, and a journal would have to be.
                kernel.mount(device, DISK, "ext4", kernel.MS_RDONLY, "noload")
            except OSError as error:
                said.append(f"{device}: {error.strerror}")
                continue
            if _in_root(DISK, _init) is not None:
                return 0
            said.append(f"{device}: no /sbin/init")
            kernel.umount(DISK)
    except (OSError, ValueError) as error:
        said.append(str(error))
    _say("; ".join(said)[:500] or "there is no disk")
    return NOT_FOUND


def _candidates() -> Iterator[str]:
    """The disk, if it has no partitions, or else these, as devices."""
    disk = _opened("disk")
    yield disk
    for number, (first, length) in _partitions(disk).items():
        yield kernel.map_disk(f"part{number}", disk, [(0, length, first)])


def _opened(part: str) -> str:
    """One of the job's disks as a device that has what is on the disk; it may not be written."""
    disk, kind = _find(part)
    _load("dm-mod", "dm-zero")
    if kind != "vdi":
        return disk
    with _reader(disk) as read:
        runs = vdi_runs(read)
    return kernel.map_disk(part, disk, runs)


def _load(*names: str) -> None:
    for name in names:
        kernel.load_module(f"{MODULES}/{name}.ko")


def _sectors(device: str) -> int:
    with _reader(device) as read:
        return os.lseek(read.fd, 0, os.SEEK_END) // SECTOR


def _partitions(device: str) -> dict[int, tuple[int, int]]:
    with _reader(device) as read:
        return partitions(read, os.lseek(read.fd, 0, os.SEEK_END) // SECTOR)


def _hide(device: str) -> None:
    """Let nobody find what is only a part of another disk, and has the same labels."""
    name = os.path.basename(device)
    for each in (name, *os.listdir(f"/sys/block/{name}")):
        if each.startswith(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/dev/{each}")


def _find(part: str) -> tuple[str, str]:
    """Where one of the job's disks is, and what it holds."""
    serial = SERIAL.format(part)
    for name in sorted(os.listdir("/sys/block")):
        try:
            with open(f"/sys/block/{name}/serial", encoding="ascii", errors="replace") as file:
                found = file.read().strip()
        except OSError:
            continue
        if found.startswith(serial):
            return f"/dev/{name}", found.removeprefix(serial)
    for place, kind in PLACES[part].items():
        with contextlib.suppress(OSError):
            name, = os.listdir(f"{SCSI}/{place}/block")
            return f"/dev/{name}", kind
    raise OSError(2, f"the machine has no {part.replace('_', ' ')} of the job's")


def _scratch_device() -> str:
    """The machine's writable disk: the one that jobs' files are on."""
    device = os.stat("/job").st_dev
    with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/uevent",
              encoding="ascii") as file:
        said = dict(line.strip().split("=", 1) for line in file)
    return "/dev/" + said["DEVNAME"]


class _Reader:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __call__(self, offset: int, count: int) -> bytes:
        parts = []
        while count > 0 and (data := os.pread(self.fd, count, offset)):
            parts.append(data)
            offset, count = offset + len(data), count - len(data)
        return b"".join(parts)


@contextlib.contextmanager
def _reader(path: str) -> Iterator[_Reader]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _Reader(fd)
    finally:
        os.close(fd)


def _init() -> str | None:
    """The system's init, from within its root, where links lead to what they mean."""
    for path in INITS:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def _in_root(root: str, what: object) -> str | None:
    """The answer of a function that is called in a process with another root."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.chroot(root)
            os.chdir("/")
            os.write(writer, (what() or "").encode())  # type: ignore[operator]
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read(4096).decode("utf-8", "surrogateescape")
    os.waitpid(pid, 0)
    return answer or None


# -- how it runs -----------------------------------------------------------------------------


class System:
    """One system, from the first start to its end."""

    def __init__(self, words: list[str]) -> None:
        self.network = "--network" in words
        self.display = "--display" in words
        self.has_cd, self.has_second = "--iso" in words, "--cache-disk" in words
        #: Its disks besides: their names there, and our devices.
        self.disks: dict[str, str] = {}
        #: Name -> path in the machine, and whether it is only to be read.
        self.folders = {}
        for word in words:
            if not word.startswith("--"):
                name, _, path = word.partition("=")
                self.folders[name] = (path.removesuffix(":ro"), path.endswith(":ro"))
        #: Our end of each console, and the path of the other one.
        self.consoles: dict[str, tuple[int, str]] = {}
        self._held: list[int] = []
        self.cgroup = ""
        self._cut = False

    def run(self) -> int:
        """Start it, again when it restarts itself; 0 when it has switched the machine off."""
        # Nobody but its processes sees what is mounted for them.
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        self._make_root()
        try:
            self._make_disks()
        except (OSError, ValueError) as error:
            _say(f"vmjob: what the system has besides its disk cannot be used: {error}")
            return FAILED
        self._make_cgroup()
        for name in CONSOLES[:1] if self.display else CONSOLES:
            master, slave = os.openpty()
            os.set_blocking(master, False)
            self.consoles[name] = master, os.ttyname(slave)
            self._held.append(slave)
        signal.signal(signal.SIGTERM, lambda number, frame: self._cut_off())
        try:
            for attempt in range(RESTARTS + 1):
                code = self._once(first=attempt == 0)
                if code != AGAIN:
                    return code
            _say(f"vmjob: the system restarted itself more than {RESTARTS} times")
            return FAILED
        finally:
            _remove_cgroups(self.cgroup)
            # It could have made our file systems read-only, by their mounts in its folders.
            for path in ("/", "/job"):
                with contextlib.suppress(OSError):
                    kernel.mount("none", path, flags=kernel.MS_REMOUNT)

    def _make_root(self) -> None:
        """The system's root: its disk, and above it what it writes, on the machine's disk."""
        for path in (SCRATCH, ROOT):
            os.makedirs(path, mode=0o700, exist_ok=True)
        kernel.mount(_scratch_device(), SCRATCH, "ext4", kernel.MS_NOATIME)
        upper, work = f"{SCRATCH}/system/upper", f"{SCRATCH}/system/work"
        os.makedirs(upper, mode=0o755)
        os.makedirs(work, mode=0o700)
        os.chmod(upper, 0o755)  # noqa: S103 - it is the root of a file system
        for name in ("", *self.folders):
            os.makedirs(f"{upper}{FOLDERS}/{name}")
        os.makedirs(f"{upper}{MACHINE}")
        kernel.mount("system", ROOT, "overlay", 0,
                     f"lowerdir={DISK},upperdir={upper},workdir={work}")

    def _make_disks(self) -> None:
        """What the system finds besides: a CD, and a second disk that it may write to."""
        if self.has_cd:
            _load("cdrom", "isofs")
            self.disks[CD], _ = _find("iso")
            kernel.forbid_writing(self.disks[CD])
        if self.has_second:
            _load("loop", "dm-bufio", "dm-snapshot")
            below = _opened("cache_disk")
            sectors = _sectors(below)
            written = f"{SCRATCH}/system/written"
            with open(written, "xb") as file:
                file.truncate(-(-sectors // kernel.DM_CHUNK) * kernel.DM_CHUNK * SECTOR)
            above = kernel.file_disk(written)
            disk = kernel.lay_above("second", below, above, sectors)
            self.disks[SECOND] = disk
            for device in (_find("cache_disk")[0], below, above):
                _hide(device)
            for number, (first, length) in _partitions(disk).items():
                self.disks[f"{SECOND}{number}"] = kernel.map_disk(
                    f"{SECOND}{number}", disk, [(0, length, first)], writable=True)

    def _make_cgroup(self) -> None:
        """A control group of its own: a system wants to divide its own, with no one else in it."""
        with open("/proc/self/cgroup", encoding="ascii") as file:
            own = next(line for line in file if line.startswith("0::")).strip()[3:]
        self.cgroup = f"/sys/fs/cgroup{own}/system"
        os.makedirs(self.cgroup, exist_ok=True)

    def _cut_off(self) -> None:
        """As when a PC is unplugged: the job's time is over."""
        self._cut = True
        with contextlib.suppress(OSError), open(f"{self.cgroup}/cgroup.kill", "w",
                                                encoding="ascii") as file:
            file.write("1")

    def _once(self, *, first: bool) -> int:
        """From one power-on to the next power-off."""
        pid = os.fork()
        if pid == 0:
            code = FAILED
            try:
                code = self._supply(first=first)
            except OSError as error:
                _say(f"vmjob: the system cannot be started: {error}")
            finally:
                os._exit(code)
        self._pass_on(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return FAILED if self._cut or code < 0 else code

    def _supply(self, *, first: bool) -> int:
        """In a process of its own: start the init, and say how it ended."""
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC
                       | kernel.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            try:
                self._become_init(first=first)
            except OSError as error:
                _say(f"vmjob: the system cannot be started: {error}")
            finally:
                os._exit(FAILED)
        status = os.waitpid(pid, 0)[1]
        # reboot(2) in a process namespace ends its init so (pid_namespaces(7)).
        if os.WIFSIGNALED(status):
            if os.WTERMSIG(status) == signal.SIGINT:
                return OFF
            if os.WTERMSIG(status) == signal.SIGHUP:
                return AGAIN
            _say(f"vmjob: the system's init was ended by signal {os.WTERMSIG(status)}")
        else:
            _say(f"vmjob: the system's init ended with status {os.WEXITSTATUS(status)}, without "
                 "switching the machine off")
        return FAILED

    def _become_init(self, *, first: bool) -> None:
        """Process 1 of the system, from our root to its own; returns only by raising."""
        os.setsid()
        with open(f"{self.cgroup}/cgroup.procs", "w", encoding="ascii") as file:
            file.write("0")  # not before: a process that it cannot see would be in its way
        kernel.pivot_root(ROOT, f"{ROOT}{MACHINE}")
        os.chdir("/")
        init = _init() or INITS[0]
        systemd = "systemd" in os.path.realpath(init)
        self._mount_kernel_files(systemd=systemd)
        for name, (_, terminal) in self.consoles.items():
            _bind_console(f"{MACHINE}{terminal}", name)
        for name, path in self.disks.items():
            _bind(f"{MACHINE}{path}", f"/dev/{name}")
        if self.has_cd:
            with contextlib.suppress(FileExistsError):
                os.symlink(CD, f"/dev/{CDROM}")
        for name, (path, read_only) in self.folders.items():
            target = f"{FOLDERS}/{name}"
            kernel.mount(f"{MACHINE}{path}", target, flags=kernel.MS_BIND)
            if read_only:
                kernel.mount("none", target,
                             flags=kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY)
        if first:
            self._help()
        kernel.umount(MACHINE, kernel.MNT_DETACH)
        console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
        for fd in range(3):
            os.dup2(console, fd)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        environment = {"HOME": "/", "TERM": "linux", "PATH": "/sbin:/usr/sbin:/bin:/usr/bin"}
        if systemd:  # it then leaves hardware alone, of which there is none
            environment["container"] = "vmjob"
        os.execve(init, [init], environment)

    def _mount_kernel_files(self, *, systemd: bool) -> None:
        for path in ("/proc", "/sys", "/dev"):
            os.makedirs(path, exist_ok=True)
        plain = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("proc", "/proc", "proc", plain)
        # It would end the machine behind our back.
        kernel.mount("/proc/sysrq-trigger", "/proc/sysrq-trigger", flags=kernel.MS_BIND)
        kernel.mount("none", "/proc/sysrq-trigger",
                     flags=kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY)
        # systemd takes this for "no devices are mine", and waits for none of /etc/fstab; an old
        # udev makes no devices without writing there.
        kernel.mount("sysfs", "/sys", "sysfs", plain | (kernel.MS_RDONLY if systemd else 0))
        kernel.mount("dev", "/dev", "devtmpfs", kernel.MS_NOSUID)
        for name, kind, data in (("pts", "devpts", "gid=5,mode=620,ptmxmode=666"),
                                 ("shm", "tmpfs", "mode=1777")):
            os.makedirs(f"/dev/{name}", exist_ok=True)
            kernel.mount(name, f"/dev/{name}", kind, kernel.MS_NOSUID, data)

    def _help(self) -> None:
        """What of the system is ours, in its own root so that its links are followed there."""
        _write("/sbin/mount.vboxsf", MOUNT_VBOXSF, 0o755)
        try:
            with open("/etc/fstab", encoding="utf-8", errors="surrogateescape") as file:
                _write("/etc/fstab", fstab(file.read(), self._names()), 0o644)
        except OSError:
            pass  # there is none
        if self.network:
            with contextlib.suppress(OSError):
                _write("/etc/resolv.conf", "nameserver 10.0.2.3\n", 0o644)

    def _names(self) -> set[str]:
        """Under which its disks besides are known."""
        return {f"/dev/{name}" for name in (*self.disks, *([CDROM] if self.has_cd else []))}

    # -- what it says ------------------------------------------------------------------------

    def _pass_on(self, pid: int) -> None:
        """Write what comes from its consoles to our output until the process has ended."""
        pidfd = os.pidfd_open(pid)
        with select.epoll() as waiting:
            waiting.register(pidfd, select.EPOLLIN)
            # A console that nobody has open reports that all the time: only changes count.
            for master, _ in self.consoles.values():
                waiting.register(master, select.EPOLLIN | select.EPOLLET)
            over = False
            while not over:
                over = any(fd == pidfd for fd, _ in waiting.poll())
                for master, _ in self.consoles.values():
                    _drain(master)
        os.close(pidfd)


def _drain(master: int) -> None:
    while True:
        try:
            data = os.read(master, READ)
        except OSError:  # nothing more now, or nobody has it open
            return
        if not data:
            return
        data = data.replace(b"\r\n", b"\n")
        while data:
            data = data[os.write(1, data):]


def fstab(text: str, there: Collection[str] = ()) -> str:
    """A system's table of file systems without those on disks that are not ``there``.

    A system that cannot check its root waits for somebody at its keyboard.
    """
    kept = []
    for line in text.splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        on_disk = words[0] not in there and words[0].startswith(
            ("/dev/", "UUID=", "LABEL=", "PARTUUID=", "PARTLABEL="))
        is_root = len(words) > 1 and words[1] == "/"
        if not on_disk and not is_root and words[2:3] != ["swap"]:
            kept.append(line)
    return "".join(f"{line}\n" for line in ("system / overlay defaults 0 0", *kept))


def _bind_console(terminal: str, name: str) -> None:
    """Let a terminal of ours be a console of the system's."""
    for target in ("/dev/tty1", "/dev/tty0") if name == "tty1" else (f"/dev/{name}",):
        _bind(terminal, target)


def _bind(source: str, target: str) -> None:
    if not os.path.exists(target):
        with open(target, "ab"):
            pass
    kernel.mount(source, target, flags=kernel.MS_BIND)


def _write(path: str, text: str, mode: int) -> None:
    """Put a file of ours in a place of the system's, whatever was there."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        os.fchmod(fd, mode)
        file.write(text)


def _remove_cgroups(path: str) -> None:
    """Remove a control group with those in it; what still has processes stays."""
    for directory, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
