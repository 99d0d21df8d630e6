"""Which of VirtualBox's ways to run a guest's code work, by proof: a sector of code that boots.

``hm``: the processor's own virtualization, by VirtualBox's kernel driver. ``interpreter``: none of
these, so slowly that it is of use for tests only; it is never chosen but by name.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import anyio

from vmjob.errors import (
    Busy,
    HostDiskFull,
    HostMemoryLow,
    HypervisorSilent,
    VirtualizationInUse,
    VmjobError,
)
from vmjob.home import Home
from vmjob.host.facts import boot_id
from vmjob.machine import proofs
from vmjob.machine.contract import Foreign, MachineSpec
from vmjob.machine.proofs import Proof
from vmjob.machine.virtualbox import device, programs
from vmjob.machine.virtualbox.driver import VirtualBoxMachine

__all__ = ["PROBE", "prove"]

#: Seconds until the probe's guest must have spoken: it does 0.5 s after the start (measured).
DEADLINE = 30.0
PROOF = "vmjob-probe: ok"
#: Prints on the first serial port what follows it, up to a zero byte, and stands still: next byte;
#: wait for the port (bit 5 of 3fd); out; the rest is the end.
PROBE = bytes.fromhex("fc 31c0 8ed8 be217c ac 84c0 7411 88c4 bafd03 ec a820 74fb 88e0 b2f8 ee ebea "
                      "f4 ebfd")
DISK_SIZE = 1 << 20
#: What may be over at the next try, and so proves nothing for longer.
PASSING = (Busy, HostDiskFull, HostMemoryLow, HypervisorSilent, VirtualizationInUse)


async def prove(home: Home, accelerator: str) -> Proof:
    """Whether an accelerator works; from the cache unless something changed.

    Raises `ProgramMissing`, and what a VirtualBox that is too old or known to be bad raises.
    """
    found = programs.find()
    version = programs.usable_version(found.manage)
    if accelerator == "hm" and (missing := device.why_not()):
        return Proof(accelerator, False, missing)
    ground = f"{boot_id()}|{version.text}|{device.identity()}|{accelerator}"
    path = proofs.place(home, accelerator)
    known = proofs.remembered(path, ground, accelerator)
    if known is None:
        began = time.monotonic()
        try:
            known = await _boot(home, accelerator)
        except VmjobError as error:
            known = Proof(accelerator, False, error.message, time.monotonic() - began)
            if isinstance(error, PASSING):
                return known
        proofs.remember(path, ground, known)
    return known


async def _boot(home: Home, accelerator: str) -> Proof:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="probe-", dir=home.cache) as place:
        disk = Path(place) / "disk"
        text = PROOF.encode() + b"\n\0"
        code = (PROBE + text).ljust(510, b"\0") + b"\x55\xaa"
        disk.write_bytes(code.ljust(DISK_SIZE, b"\0"))
        directory = Path(place) / "machine"
        directory.mkdir()
        spec = MachineSpec(id="probe", directory=directory, boot=None, memory_mb=32,
                           accelerator=accelerator, foreign=Foreign(disk))
        # Not by the driver: it refuses disks where VirtualBox loses what is written to them.
        machine = VirtualBoxMachine(spec)
        try:
            await machine.define()
            await machine.start()
            with anyio.move_on_after(DEADLINE):
                while PROOF not in machine.console():  # noqa: ASYNC110 - a text, no event
                    await anyio.sleep(0.05)
            works = PROOF in machine.console()
        finally:
            await machine.destroy()
    spent = time.monotonic() - began
    if not works:
        return Proof(accelerator, False, f"a guest said nothing within {DEADLINE:g} s", spent)
    return Proof(accelerator, True, f"a guest booted in {spent:.1f} s", spent)
