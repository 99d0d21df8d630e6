"""Which accelerators work, by proof: a short guest boot with a deadline.

A device that opens proves nothing. On one computer of ours ``/dev/kvm`` opens, a VM
can be created and the firmware runs, and still no Linux kernel gets past its first
instructions; only a boot tells. The proof is kept for as long as its ground is the
same: this boot of the computer, this QEMU, this device.
"""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

import anyio
import anyio.to_thread

from vmjob.errors import AcceleratorUnusable
from vmjob.home import Home, locked
from vmjob.host.facts import boot_id, device_identity
from vmjob.host.guard import guarded
from vmjob.host.standstill import run_tool
from vmjob.machine import proofs
from vmjob.machine.contract import BootParts
from vmjob.machine.proofs import Proof, remember, remembered
from vmjob.machine.qemu import argv, programs

__all__ = ["Proof", "candidates", "choose", "prove"]

#: Seconds for the probe's boot: with working hardware support it takes well under one, and an
#: accelerator that needs this long is not worth using.
HARDWARE_DEADLINE = 10.0
#: Seconds for the same under TCG, where a slow, loaded computer may need a minute.
TCG_DEADLINE = 120.0
#: What QEMU says of what may be over at the next try: another hypervisor has the processor's
#: virtualization, there is too little memory.
PASSING = (os.strerror(errno.EBUSY), os.strerror(errno.ENOMEM))
#: Printed by the image's ramdisk when it was started with `PROBE_ARGUMENT`.
PROBE_PROOF = b"vmjob-probe: ok"
PROBE_ARGUMENT = "vmjob.probe"
PROBE_MEMORY_MB = 128


def candidates() -> list[str]:
    """The accelerators of this kind of computer, the fastest first; `tcg` always last."""
    hardware = {"Linux": ["kvm"], "Darwin": ["hvf"], "Windows": ["whpx"]}
    return [*hardware.get(platform.system(), []), "tcg"]


def probe_command(binary: str, accelerator: str, boot: BootParts) -> list[str]:
    """A machine without disks that boots the image's kernel to its ramdisk and says so."""
    accel = "tcg,thread=multi" if accelerator == "tcg" else accelerator
    arguments = " ".join((*argv.KERNEL_ARGUMENTS, PROBE_ARGUMENT))
    return [binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-sandbox", argv.SANDBOX, "-machine", argv.MACHINE, "-accel", accel,
            "-cpu", argv.CPU_MODELS[accelerator], "-m", f"{PROBE_MEMORY_MB}M", "-nic", "none",
            "-serial", "stdio", "-kernel", str(boot.kernel), "-initrd", str(boot.initrd),
            "-append", arguments]


async def prove(home: Home, accelerator: str, boot: BootParts, *, fresh: bool = False) -> Proof:
    """Whether ``accelerator`` works; from the cache unless ``fresh`` or something changed."""
    if accelerator == "kvm" and device_identity("/dev/kvm") is None:
        why = ("this user may not open /dev/kvm" if Path("/dev/kvm").exists()
               else "there is no /dev/kvm")
        return Proof(accelerator, False, why)
    binary = programs.find(programs.system_binary())
    ground = "|".join((boot_id(), programs.identity(binary), str(device_identity("/dev/kvm")),
                       accelerator))
    path = proofs.place(home, accelerator)
    if not fresh and (known := remembered(path, ground, accelerator)):
        return known

    def probe() -> Proof:
        with locked(home.locks / f"probe-{accelerator}", wait=True, what="the probe"):
            if not fresh and (other := remembered(path, ground, accelerator)):
                return other
            found = _boot(binary, accelerator, boot)
            if found.works or not any(cause in found.why for cause in PASSING):
                remember(path, ground, found)
            return found

    return await anyio.to_thread.run_sync(probe)


async def choose(home: Home, wanted: str, boot: BootParts,
                 allowed: Collection[str] | None = None) -> Proof:
    """The accelerator to use: ``wanted``, or for ``auto`` the first that is proved.

    TCG is taken without a probe: it needs nothing of the computer, and there is nothing
    below it. ``allowed``: no other than these; None: any. Raises `AcceleratorUnusable` when
    ``wanted`` does not work, or nothing that is allowed does; `ProgramMissing`.
    """
    if allowed is not None and wanted not in ("auto", *allowed):
        raise AcceleratorUnusable(f"{wanted} is not allowed here",
                                  advice=f"What is allowed: {', '.join(sorted(allowed)) or '-'}")
    if wanted == "tcg":
        return Proof("tcg", True, "asked for")
    if wanted != "auto":
        if wanted not in candidates():
            raise AcceleratorUnusable(f"{wanted} is not an accelerator of this computer")
        proof = await prove(home, wanted, boot)
        if not proof.works:
            raise AcceleratorUnusable(f"{wanted} does not work here: {proof.why}")
        return proof
    failed = []
    for name in candidates():
        if allowed is not None and name not in allowed:
            continue
        if name == "tcg":
            programs.find(programs.system_binary())  # else another hypervisor may run the job
            return Proof("tcg", True, "no hardware accelerator works here")
        proof = await prove(home, name, boot)
        if proof.works:
            return proof
        failed.append(f"{name}: {proof.why}")
    why = "; ".join(failed)
    raise AcceleratorUnusable(
        "no accelerator that may be used works here" + (f" ({why})" if why else ""),
        advice=_how_to_mend(why))


def _how_to_mend(why: str) -> str:
    """What the owner of this computer can do about hardware support that does not work."""
    if "may not open /dev/kvm" in why:
        return (f"Add the user that runs this ({_user()}) to the group kvm, and restart what "
                "started it.")
    if "there is no /dev/kvm" in why:
        return "Switch on virtualization (VT-x or AMD-V) in this computer's BIOS setup."
    return "`vmjob doctor` tells more; emulation (tcg) needs nothing, where it is allowed."


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _boot(binary: str, accelerator: str, boot: BootParts) -> Proof:
    deadline = TCG_DEADLINE if accelerator == "tcg" else HARDWARE_DEADLINE
    command = guarded(probe_command(binary, accelerator, boot), os.getpid(),
                           drop_capabilities=os.geteuid() == 0)
    began = time.monotonic()
    try:
        done = run_tool(command, deadline)
        output, errors, code = done.stdout, done.stderr, done.returncode
        late = False
    except subprocess.TimeoutExpired as expired:
        output, errors, code = expired.stdout or b"", expired.stderr or b"", None
        late = True
    spent = time.monotonic() - began
    if PROBE_PROOF in output:
        return Proof(accelerator, True, f"a guest booted in {spent:.1f} s", spent)
    text = errors.decode("utf-8", "replace").strip().splitlines()
    if late:
        why = f"a Linux kernel did not boot within {deadline:g} s"
    elif text:
        why = f"QEMU ended: {text[-1][:200]}"
    else:
        why = f"a Linux kernel did not boot (QEMU ended with status {code})"
    return Proof(accelerator, False, why, spent)
