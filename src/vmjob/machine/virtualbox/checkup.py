"""What the doctor says about VirtualBox: facts of this computer, and what follows from them.

`look` gathers, within the deadline of one ``VBoxManage --version`` and without starting anything
else; `findings` is pure. Nothing here is a problem that stops all jobs: QEMU runs them.
"""

from __future__ import annotations

import os
import platform
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from vmjob.errors import VmjobError
from vmjob.host.checkup import Finding
from vmjob.machine.virtualbox import programs
from vmjob.machine.virtualbox.device import DEVICE
from vmjob.machine.virtualbox.programs import Version
from vmjob.machine.virtualbox.service import TEMPORARY

__all__ = ["Facts", "findings", "look"]

#: From this kernel on, KVM takes VT-x and AMD-V when it is loaded, not when a machine starts.
KVM_TAKES_ALL = (6, 12)
#: From this version on, VirtualBox asks KVM for them.
ASKS_KVM = (7, 2, 10)


@dataclass(frozen=True)
class Facts:
    """What decides whether a machine of VirtualBox can start here.

    ``problem``, ``advice``: why there is no VirtualBox to look at. Only on Linux is there more than
    ``where`` and ``version``. ``privileged``: VBoxHeadless gets root's rights when it starts, which
    opening the driver takes. ``module``: the loaded driver's version, "" unknown, None not loaded.
    ``hardware``: ``VT-x``, ``AMD-V`` or "". ``kvm_machines``: users of KVM's module.
    ``kvm_takes_all``: KVM keeps the hardware for itself while it is loaded.
    """

    system: str
    problem: str = ""
    advice: str = ""
    where: str = ""
    version: Version | None = None
    device: bool = False
    privileged: bool = False
    module: str | None = None
    hardware: str = ""
    kvm_machines: int = 0
    kvm_takes_all: bool = False
    temporary: bool = True


def look(root: Path = Path("/")) -> Facts:
    """The facts of this computer; ``root`` is another one's in tests."""
    system = platform.system()
    try:
        found = programs.find()
        version = programs.version(found.manage)
    except VmjobError as error:
        return Facts(system, error.message, error.advice)
    where = str(Path(found.headless).parent)
    if system != "Linux":
        return Facts(system, where=where, version=version)
    modules = root / "sys/module"
    loaded = (modules / "vboxdrv").exists()
    flags = re.search(r"(?m)^flags\s*:(.*)$", _text(root / "proc/cpuinfo"))
    words = flags[1].split() if flags else []
    kernel = re.match(r"(\d+)\.(\d+)", platform.release())
    return Facts(
        system, where=where, version=version,
        device=(root / DEVICE.relative_to("/")).exists(),
        privileged=_privileged(found.headless, _text(root / "proc/self/status")),
        module=_text(modules / "vboxdrv/version").strip() if loaded else None,
        hardware="VT-x" if "vmx" in words else "AMD-V" if "svm" in words else "",
        kvm_machines=max(_number(modules / name / "refcnt") for name in ("kvm_intel", "kvm_amd")),
        kvm_takes_all=(any((modules / name).exists() for name in ("kvm_intel", "kvm_amd"))
                       and kernel is not None
                       and (int(kernel[1]), int(kernel[2])) >= KVM_TAKES_ALL
                       and _text(modules / "kvm/parameters/enable_virt_at_load").strip() != "N"),
        temporary=os.access(TEMPORARY, os.W_OK | os.X_OK))


def _privileged(headless: str, status: str) -> bool:
    if os.geteuid() == 0:
        return True
    facts = Path(headless).stat()
    return (bool(facts.st_mode & stat.S_ISUID) and facts.st_uid == 0
            and not re.search(r"(?m)^NoNewPrivs:\s*1", status))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else 0


def findings(facts: Facts) -> list[Finding]:
    """What to tell: one line for VirtualBox, one for each thing about it that is not as it should.

    The last says whether its machines can start, when something is known about that.
    """
    version = facts.version
    if version is None:
        return [Finding("VirtualBox", "note", facts.problem, facts.advice)]
    told = f"{version.text} in {facts.where}"
    judged = programs.judge(version, facts.system)
    if judged is not None:
        source = f" ({judged.source})" if judged.source else ""
        return [Finding("VirtualBox", "note", f"{told} is not used: {judged.reason}{source}",
                        "Install VirtualBox 7.0 or newer." if judged.kind == "too-old"
                        else "Install a newer VirtualBox.")]
    found = [Finding("VirtualBox", "ok", told)]
    for flaw in programs.flaws(version, facts.system):
        told = f"{flaw.concerns}: {flaw.reason} ({flaw.source})"
        found.append(Finding("VirtualBox", "note", told, "Install a newer VirtualBox."))
    if facts.system == "Linux":
        found += [_start(facts, version)]
    return found


def _start(facts: Facts, version: Version) -> Finding:
    """Whether a machine can start: the first thing that stops it."""
    what = "VirtualBox's machines"

    def note(why: str, advice: str) -> Finding:
        return Finding(what, "note", why, advice)

    if facts.module is None or not facts.device:
        why = ("its kernel module vboxdrv is not loaded" if facts.module is None
               else f"its kernel module is loaded, and there is no {DEVICE}")
        return note(f"cannot start: {why}",
                    "Load it: modprobe vboxdrv. If there is none, build it: /sbin/vboxconfig, or "
                    "the package virtualbox-dkms; with Secure Boot it must be signed.")
    loaded = re.match(r"(\d+)\.(\d+)\.(\d+)", facts.module)
    if loaded and tuple(map(int, loaded.groups())) != version.numbers:
        return note(f"cannot start: the loaded kernel module is of {loaded[0]}, "
                    f"VirtualBox of {version.short}",
                    "Build it again (/sbin/vboxconfig), then: modprobe -r vboxnetadp vboxnetflt "
                    "vboxdrv; modprobe vboxdrv.")
    if not facts.privileged:
        return note("cannot start: VBoxHeadless does not get the rights to open the driver",
                    "It must be root's with the set-user-id bit, and what runs vmjob must allow "
                    "that (no NoNewPrivileges in its systemd unit).")
    if not facts.temporary:
        return note(f"cannot start: {TEMPORARY} cannot be written to, where VirtualBox's processes "
                    "meet", "Let this user write there (systemd: PrivateTmp=yes).")
    if not facts.hardware:
        return note("cannot start: the processor shows neither VT-x nor AMD-V",
                    "Switch on virtualization in this computer's BIOS setup, or use QEMU with "
                    "--accel tcg.")
    if facts.kvm_machines:
        return note(f"may not start: KVM uses {facts.hardware} for {facts.kvm_machines} of its "
                    "own", "End the machines that run with KVM, or use QEMU.")
    if facts.kvm_takes_all and version.numbers < ASKS_KVM:
        return note(f"cannot start: KVM keeps {facts.hardware} for itself while it is loaded",
                    "Unload it (modprobe -r kvm_intel kvm_amd), or load it with "
                    "enable_virt_at_load=0, or install VirtualBox 7.2.12 or newer.")
    return Finding(what, "ok", f"can start: kernel module {facts.module.split()[0]}, "
                   f"{facts.hardware}" if facts.module else f"can start, with {facts.hardware}")
