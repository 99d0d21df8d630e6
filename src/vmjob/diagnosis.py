"""The whole checkup, from programs to images to proved accelerators."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace

from vmjob.engine.templates import TemplateStore, cap
from vmjob.errors import VmjobError
from vmjob.home import Home
from vmjob.host import checkup
from vmjob.host.checkup import Finding
from vmjob.image.recipe import DEFAULT_NAME
from vmjob.image.store import Image, ImageStore
from vmjob.machine import proofs
from vmjob.machine.contract import BootParts
from vmjob.machine.qemu import accelerators, programs
from vmjob.shape import HYPERVISORS, choose

__all__ = ["INTERPRETED", "INTERPRETER", "diagnose"]

#: What is said of VirtualBox's interpreter where nothing else can run a job.
INTERPRETER = "interpreter"
#: How it is asked for: it is never taken by itself.
INTERPRETED = "`--hypervisor virtualbox --accel interpreter`"
#: What `vmjob.machine.virtualbox.checkup` calls the start of VirtualBox's machines.
MACHINES = "VirtualBox's machines"

#: Program -> what it is for; without these an image cannot be built.
BUILDERS = {"mmdebstrap": "mmdebstrap", "mksquashfs": "squashfs-tools", "mke2fs": "e2fsprogs"}


def diagnose(home: Home, *, fresh: bool = False) -> list[Finding]:
    """Everything that decides whether a job can run here; problems are those that stop it."""
    qemu = [_qemu(), _program("qemu-img")]
    others = [_program("setpriv"), *_virtualbox(), checkup.memory(), checkup.disk(home.root)]
    image = _image(home, others)
    if image is None:
        others.append(Finding("accelerators", "note", "not proved: that needs an image to boot",
                              "Run `vmjob image build`, then `vmjob doctor` again."))
    else:
        others.append(_templates(home))
        if not _problems(others):
            return asyncio.run(_proved(home, image, qemu, others, fresh))
    if _is_ok(others, MACHINES):  # what a boot would tell; building an image takes qemu-img
        qemu = [*_as_notes(qemu[:1]), *qemu[1:]]
    return qemu + others


def _qemu() -> Finding:
    name = programs.system_binary()
    try:
        return Finding("QEMU", "ok", f"{name} {programs.version(programs.find(name))}")
    except VmjobError as error:
        return Finding("QEMU", "problem", error.message, error.advice)


def _program(name: str) -> Finding:
    try:
        return Finding(name, "ok", programs.find(name))
    except VmjobError as error:
        return Finding(name, "problem", error.message, error.advice)


def _virtualbox() -> list[Finding]:
    from vmjob.machine.virtualbox import checkup as virtualbox

    return virtualbox.findings(virtualbox.look())


def _image(home: Home, findings: list[Finding]) -> Image | None:
    """The default image, with findings about it or about what is missing to build it."""
    store = ImageStore(home)
    try:
        image = store.verified(DEFAULT_NAME)
    except VmjobError as error:
        missing = {package for name, package in BUILDERS.items() if shutil.which(name) is None}
        building = checkup.namespaces()
        if missing or building.state != "ok":
            findings.append(building)
            findings.append(Finding(
                "image", "problem", error.message,
                f"apt install {' '.join(sorted(missing))}, then vmjob image build"
                if missing else building.advice))
        elif error.code == "image-missing":
            findings.append(Finding("image", "problem", "the default image was not built yet",
                                    "Run `vmjob image build` (the first `vmjob run` does it too)."))
        else:
            findings.append(Finding("image", "problem", error.message, error.advice))
        return None
    findings.append(Finding("image", "ok", f"{image.name}, kernel {image.manifest.kernel_version}, "
                            f"{image.manifest.total_size / 1e6:.1f} MB"))
    return image


def _templates(home: Home) -> Finding:
    found = TemplateStore(home).all()
    text = f"{len(found)} frozen, {sum(each.disk_bytes for each in found) / 1e6:.0f} MB of at most "
    text += f"{cap() / 1e6:.0f}"
    if not found:
        return Finding("templates", "note", text,
                       "The first job of each kind freezes one, so that the next start at once.")
    return Finding("templates", "ok", text)


async def _proved(home: Home, image: Image, qemu: list[Finding], others: list[Finding],
                  fresh: bool) -> list[Finding]:
    """With what boots tell. QEMU stops no job where jobs would not use it."""
    boot = BootParts.of(image)
    if not _problems(qemu):
        qemu = qemu + await _accelerators(home, boot, fresh)
    if fresh:
        for name in HYPERVISORS["virtualbox"]:
            proofs.place(home, name).unlink(missing_ok=True)
    try:
        chosen = (await choose(home, boot)).accelerator
    except VmjobError:
        chosen = None
    if chosen in HYPERVISORS["virtualbox"]:
        qemu = _as_notes(qemu)
    found = qemu + others
    if chosen is not None and not _problems(found):
        found.append(Finding("jobs will use", "ok", chosen))
    elif (_is_ok(others, "VirtualBox") and not await _runs(home, "hm")
          and await _runs(home, INTERPRETER)):
        found.append(Finding(INTERPRETER, "note", "works, slowly: jobs run only with "
                             f"{INTERPRETED}", "Mend what is wrong above: jobs run faster."))
    return found


async def _accelerators(home: Home, boot: BootParts, fresh: bool) -> list[Finding]:
    """What works with QEMU."""
    proved = [await accelerators.prove(home, name, boot, fresh=fresh)
              for name in accelerators.candidates()]
    working = any(proof.works for proof in proved)
    findings = []
    for proof in proved:
        if proof.works:
            findings.append(Finding(proof.accelerator, "ok", f"proved: {proof.why}"))
        elif working:
            findings.append(Finding(proof.accelerator, "note", f"not usable: {proof.why}",
                                    _advice(proof)))
        else:
            findings.append(Finding(proof.accelerator, "problem", proof.why, _advice(proof)))
    return findings


async def _runs(home: Home, accelerator: str) -> bool:
    """Whether VirtualBox runs machines in this way."""
    from vmjob.machine.virtualbox.accelerators import prove

    try:
        return (await prove(home, accelerator)).works
    except VmjobError:
        return False


def _problems(findings: list[Finding]) -> bool:
    return any(each.state == "problem" for each in findings)


def _is_ok(findings: list[Finding], what: str) -> bool:
    return any(each.what == what and each.state == "ok" for each in findings)


def _as_notes(findings: list[Finding]) -> list[Finding]:
    return [replace(each, state="note") if each.state == "problem" else each for each in findings]


def _advice(proof: accelerators.Proof) -> str:
    if "may not open" in proof.why:
        return "Let this user open it: usermod -aG kvm USER, then log in again."
    if "there is no /dev/kvm" in proof.why:
        return "If the processor has VT-x or AMD-V, switch it on in the firmware: jobs run faster."
    if proof.accelerator == "tcg":
        return "Run `vmjob doctor --fresh` when the computer is less busy; else report a bug."
    return "Nothing needs to be done: jobs run without it, more slowly."
