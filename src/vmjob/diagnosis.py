"""The whole checkup, from programs to images to proved accelerators."""

from __future__ import annotations

import asyncio
import shutil

from vmjob.engine.templates import TemplateStore, cap
from vmjob.errors import VmjobError
from vmjob.home import Home
from vmjob.host import checkup
from vmjob.host.checkup import Finding
from vmjob.image.recipe import DEFAULT_NAME
from vmjob.image.store import Image, ImageStore
from vmjob.machine.contract import BootParts
from vmjob.machine.qemu import accelerators, programs

__all__ = ["diagnose"]

#: Program -> what it is for; without these an image cannot be built.
BUILDERS = {"mmdebstrap": "mmdebstrap", "mksquashfs": "squashfs-tools", "mke2fs": "e2fsprogs"}


def diagnose(home: Home, *, fresh: bool = False) -> list[Finding]:
    """Everything that decides whether a job can run here; problems are those that stop it."""
    findings = [_qemu(), _program("qemu-img"), _program("setpriv")]
    findings += [checkup.memory(), checkup.disk(home.root)]
    image = _image(home, findings)
    if image is None:
        findings.append(Finding("accelerators", "note", "not proved: that needs an image to boot",
                                "Run `vmjob image build`, then `vmjob doctor` again."))
    else:
        findings.append(_templates(home))
    if image is not None and all(finding.state != "problem" for finding in findings):
        findings += asyncio.run(_accelerators(home, image, fresh))
    return findings


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


async def _accelerators(home: Home, image: Image, fresh: bool) -> list[Finding]:
    boot = BootParts.of(image)
    proofs = [await accelerators.prove(home, name, boot, fresh=fresh)
              for name in accelerators.candidates()]
    working = [proof for proof in proofs if proof.works]
    findings = []
    for proof in proofs:
        if proof.works:
            findings.append(Finding(proof.accelerator, "ok", f"proved: {proof.why}"))
        elif working:
            findings.append(Finding(proof.accelerator, "note", f"not usable: {proof.why}",
                                    _advice(proof)))
        else:
            findings.append(Finding(proof.accelerator, "problem", proof.why, _advice(proof)))
    if working:
        findings.append(Finding("jobs will use", "ok", working[0].accelerator))
    return findings


def _advice(proof: accelerators.Proof) -> str:
    if "may not open" in proof.why:
        return "Let this user open it: usermod -aG kvm USER, then log in again."
    if "there is no /dev/kvm" in proof.why:
        return "If the processor has VT-x or AMD-V, switch it on in the firmware: jobs run faster."
    if proof.accelerator == "tcg":
        return "Run `vmjob doctor --fresh` when the computer is less busy; else report a bug."
    return "Nothing needs to be done: jobs run without it, more slowly."
