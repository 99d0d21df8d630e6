"""What a machine is, in VBoxManage's words; pure functions from data."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmjob.errors import NotSupported
from vmjob.machine.contract import MachineSpec

__all__ = ["ATTACHED_PLACES", "CONSOLE", "EXCHANGE_PLACE", "GUEST_ADDRESS", "LANES_PLACE",
           "MAC_ADDRESS", "NAME", "SCRATCH_PLACE", "attach", "configure", "create", "flat_disk",
           "joined", "kernel_arguments", "processor", "shared_folder"]

#: Every machine has a registry of its own, so that all may have the same name.
NAME = "machine"
#: And the same UUID: a saved machine is loaded by none with another.
MACHINE_UUID = "766d6a6f-6200-4000-8000-0000000000ff"
#: Names of controllers.
SCSI, IDE, SATA, FLOPPY = "scsi", "ide", "sata", "floppy"
#: Places at the first, of the image's root, the writable disk and the one for exchange.
ROOT_PLACE, SCRATCH_PLACE, EXCHANGE_PLACE = 0, 1, 2
#: And of its user's disks besides: one that the guest sees as the VDI file that it is, or as what
#: it holds. The guest tells them by these (`vmjob.guest.agent.system`).
ATTACHED_PLACES = {("disk", "vdi"): 3, ("disk", "raw"): 4, ("iso", "raw"): 5,
                   ("cache_disk", "vdi"): 6, ("cache_disk", "raw"): 7}
#: Its network card's address, and the one that VirtualBox's NAT gives it.
MAC_ADDRESS, GUEST_ADDRESS = bytes.fromhex("525400766d6a"), bytes([10, 0, 2, 15])
#: What a machine's second serial port is for; the first is its console.
CONSOLE, LANES_PLACE = 1, 2
#: Ports and interrupts of a PC's serial ports.
SERIAL = {CONSOLE: ("0x3f8", "4"), LANES_PLACE: ("0x2f8", "3")}

#: Its own interpreter, and not what VirtualBox takes by itself: its kernel driver. A word that 7.0
#: and 7.1 may not know.
INTERPRETED = ("--vm-execution-engine", "interpreter")

KERNEL_ARGUMENTS = ("console=ttyS0", "quiet", "panic=-1", "cryptomgr.notests", "audit=0",
                    "random.trust_cpu=on", "8250.nr_uarts=2", "no_timer_check", "nowatchdog",
                    "psi=0", "vmjob.disks=scsi")
#: An interpreter does not speculate, and its own clock is as good as the host's: without the
#: kernel's self-tests and mitigations Debian's boots in 1 minute and not in 2.5 (measured).
INTERPRETED_KERNEL_ARGUMENTS = ("norandmaps", "mitigations=off", "nokaslr", "nopti",
                                "tsc=reliable", "clocksource=tsc", "no-kvmclock",
                                "init_on_alloc=0", "lsm=landlock,yama")


#: What a ``baseline`` processor does not have of this computer's: with these, libraries choose code
#: that rounds otherwise (docs/explanation/processors.md); FMA goes with AVX.
NOT_IN_BASELINE = ("AVX", "AVX2")
#: As with QEMU, for programs of a Linux before 2013 on a disk that its user brings.
ATTACHED_KERNEL_ARGUMENTS = ("vsyscall=xonly",)


@dataclass(frozen=True)
class Medium:
    """Something at a place of a controller; ``kind`` is ``hdd``, ``dvddrive`` or ``fdd``."""

    controller: str
    place: int
    kind: str
    path: str
    mode: str | None = None


def kernel_arguments(spec: MachineSpec) -> str:
    """The guest kernel's command line."""
    network = ("vmjob.net=nat",) if spec.network == "nat" else ()
    interpreted = INTERPRETED_KERNEL_ARGUMENTS if spec.accelerator == "interpreter" else ()
    display = ("console=tty0", "vmjob.display") if spec.display else ()
    words = [word for word in KERNEL_ARGUMENTS if not (spec.display and word == "quiet")]
    attached = ATTACHED_KERNEL_ARGUMENTS if spec.attached else ()
    return " ".join((*display, *words, *interpreted, *network, *attached))


def create(directory: Path) -> list[str]:
    """Make the machine; its settings are in ``directory``/machine."""
    return ["createvm", "--name", NAME, "--uuid", MACHINE_UUID, "--ostype", "Linux26_64",
            "--register", "--basefolder", str(directory)]


def configure(spec: MachineSpec) -> list[str]:
    """Everything but disks and the host's ends of serial ports."""
    nic = ["--nic1", "none"]
    if spec.network == "nat":
        # Systems that know no virtio know the other card.
        nic = ["--nic1", "nat", "--nic-type1", "82540EM" if spec.foreign else "virtio",
               "--mac-address1", MAC_ADDRESS.hex(), "--nat-localhostreachable1", "off"]
    ports = [word for number, (base, interrupt) in SERIAL.items()
             for word in (f"--uart{number}", base, interrupt, f"--uart-type{number}", "16550A")]
    return [
        "modifyvm", NAME, "--memory", str(spec.memory_mb), "--cpus", str(spec.cpus),
        "--vram", "16", "--graphicscontroller", "vboxvga",
        "--chipset", "piix3", "--ioapic", "on", "--acpi", "on", "--rtc-use-utc", "on",
        "--paravirt-provider", "none" if spec.accelerator == "interpreter" else "default",
        *(INTERPRETED if spec.accelerator == "interpreter" else ()),
        "--firmware-logo-fade-in", "off", "--firmware-logo-fade-out", "off",
        "--firmware-logo-display-time", "0", "--firmware-boot-menu", "disabled",
        "--audio-enabled", "off", "--usb-ohci", "off", "--usb-ehci", "off", "--usb-xhci", "off",
        "--mouse", "ps2", "--clipboard-mode", "disabled", "--drag-and-drop", "disabled",
        "--boot1", "disk" if spec.foreign and not spec.foreign.iso_first else "dvd",
        "--boot2", "dvd" if spec.foreign and not spec.foreign.iso_first else "disk",
        "--boot3", "none", "--boot4", "none", *nic, *ports,
    ]


def processor(spec: MachineSpec) -> list[list[str]]:
    """The processor that the guest sees; raises `NotSupported` for models of other hypervisors."""
    if spec.cpu_model == "host":
        return []
    if spec.cpu_model != "baseline":
        raise NotSupported(f"VirtualBox has no processor {spec.cpu_model!r}: use host or baseline")
    return [["setextradata", NAME, f"VBoxInternal/CPUM/IsaExts/{name}", "0"]
            for name in NOT_IN_BASELINE]


def joined(serial_ports: Mapping[int, str], packets: str | None) -> list[str]:
    """Join it to what is ours, by paths that VirtualBox opens when it starts.

    Serial ports to sockets; a port that is given none is joined to nothing. ``packets``: where each
    packet of its network is written to.
    """
    words = ["modifyvm", NAME]
    for number, path in serial_ports.items():
        words += [f"--uart-mode{number}", "client", path]
    if packets is not None:
        words += ["--nic-trace1", "on", "--nic-trace-file1", packets]
    return words


def controllers(spec: MachineSpec) -> list[list[str]]:
    """The machine's disk controllers."""
    ide = ["storagectl", NAME, "--name", IDE, "--add", "ide", "--controller", "PIIX4",
           "--hostiocache", "on"]
    if spec.foreign:
        floppy = ["storagectl", NAME, "--name", FLOPPY, "--add", "floppy"]
        return [ide, ["storagectl", NAME, "--name", SATA, "--add", "sata", "--controller",
                      "IntelAhci", "--portcount", "2", "--hostiocache", "on"],
                *((floppy,) if spec.foreign.floppy else ())]
    # A saved machine has as many places as it had: most have no use for the last ones.
    places = 8 if spec.attached and len(spec.attached.parts()) > 1 else 5
    return [ide, ["storagectl", NAME, "--name", SCSI, "--add", "virtio", "--controller",
                  "VirtIO", "--portcount", str(places), "--hostiocache", "on", "--bootable",
                  "off"]]


def shared_folder(name: str, path: str, *, writable: bool) -> list[str]:
    """A directory of this computer that the guest can mount by this name."""
    return ["sharedfolder", "add", NAME, "--name", name, "--hostpath", path,
            *(() if writable else ("--readonly",))]


def attach(medium: Medium) -> list[str]:
    """Put a medium at its place."""
    port, device = divmod(medium.place, 2) if medium.controller == IDE else (medium.place, 0)
    mode = ["--mtype", medium.mode] if medium.mode else []
    return ["storageattach", NAME, "--storagectl", medium.controller, "--port", str(port),
            "--device", str(device), "--type", medium.kind, "--medium", medium.path, *mode]


def flat_disk(path: str, size: int, own: uuid.UUID) -> str:
    """A description (VMDK) of a disk whose content is the file ``path``, byte by byte.

    Raises `ValueError` for a path that no description can hold.
    """
    if '"' in path or "\n" in path:
        raise ValueError("the path has a quotation mark or a line's end in it")
    return "\n".join((
        "# Disk DescriptorFile", "version=1", "CID=766d6a6f", "parentCID=ffffffff",
        'createType="monolithicFlat"', "", f'RW {size // 512} FLAT "{path}" 0', "",
        'ddb.virtualHWVersion = "4"', 'ddb.adapterType="lsilogic"',
        f'ddb.uuid.image="{own}"', f'ddb.uuid.modification="{own}"',
        'ddb.uuid.parent="00000000-0000-0000-0000-000000000000"',
        'ddb.uuid.parentmodification="00000000-0000-0000-0000-000000000000"', ""))
