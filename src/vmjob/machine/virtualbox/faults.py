"""What VirtualBox's own words mean: texts of VBoxManage, VBoxHeadless and VBox.log as our errors.

Pure. One table, `RULES`, in the order in which it is searched: what says more comes first, for one
answer often holds a cause and its consequences. Texts are those of 7.2; where older versions were
reported with other words for the same, those are there too. Each rule's words are held by a real
text in the tests, or its source is named here.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Any

from vmjob.errors import (
    Busy,
    CheckpointUnusable,
    DiskUnusable,
    HomeUnusable,
    HostDiskFull,
    HostMemoryLow,
    HypervisorRefused,
    KernelModuleMissing,
    MachineError,
    MachineStartFailed,
    NotSupported,
    PortTaken,
    UsageError,
    VirtualBoxBroken,
    VirtualizationInUse,
    VirtualizationOff,
    VmjobError,
)

__all__ = ["Fault", "Kind", "check_memory", "classify", "error_lines", "warning_lines"]

#: Characters of VirtualBox's text that an error carries along.
TEXT_KEPT = 2000
#: Characters that are looked at: the end of a longer text, which has the causes.
TEXT_LOOKED_AT = 100_000
#: MB that VirtualBox itself takes besides a machine's memory: 29 of VBoxHeadless's own, measured
#: with the smallest guest, VBoxSVC, and some for a screen and the tables of a large guest.
OWN_MEMORY_MB = 64


class Kind(enum.StrEnum):
    """What a text says, as far as that makes a difference to us."""

    # this computer
    NO_DRIVER = "no-driver"  # the kernel module is not loaded, or may not be opened
    DRIVER_MISMATCH = "driver-mismatch"  # it is another version's
    NO_HARDWARE = "no-hardware-support"  # the processor has neither VT-x nor AMD-V
    HARDWARE_OFF = "hardware-support-off"  # it has, and the firmware has switched it off
    HARDWARE_IN_USE = "hardware-support-in-use"  # another hypervisor has it
    DRIVERLESS = "driverless"  # VirtualBox runs without its driver, and this needs it
    INSTALLATION = "installation"  # a part of VirtualBox is missing or damaged
    NO_HOME = "no-home"
    NO_MEMORY = "no-memory"
    DISK_FULL = "disk-full"
    PORT_TAKEN = "port-taken"
    NO_INTERFACE = "no-interface"  # a bridged or host-only adapter that is not there
    SERVICE_LOST = "service-lost"  # VBoxSVC could not be reached: nothing was done
    SERVICE_DIED = "service-died"  # VBoxSVC ended in the middle of a call
    # a machine
    NOT_READY = "not-ready"  # asked while it starts or goes
    LOCKED = "locked"  # another process has it
    NOT_REGISTERED = "not-registered"
    ALREADY_EXISTS = "already-exists"
    NOT_RUNNING = "not-running"
    WRONG_STATE = "wrong-state"
    NO_SNAPSHOT = "no-snapshot"
    SNAPSHOT_HAS_CHILD = "snapshot-has-child"
    STATE_UNUSABLE = "state-unusable"  # a saved state does not load
    SETTINGS_DAMAGED = "settings-damaged"
    ENDED_AT_START = "ended-at-start"  # the front end ended; its own words say why
    NO_ADDITIONS = "no-additions"
    # a medium, a folder, a rule
    MEDIUM_EXISTS = "medium-exists"
    MEDIUM_MISSING = "medium-missing"
    MEDIUM_DAMAGED = "medium-damaged"
    MEDIUM_IN_USE = "medium-in-use"
    FILE_REFUSED = "file-refused"  # a file or directory cannot be made or read
    NO_CONTROLLER = "no-controller"
    NO_FOLDER = "no-folder"
    # the question
    OUT_OF_RANGE = "out-of-range"
    BAD_REQUEST = "bad-request"  # an option or a value that this version does not know
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Rule:
    """``pattern`` found in a text means ``kind``; the search ignores no letter's case."""

    kind: Kind
    pattern: re.Pattern[str]


def _rule(kind: Kind, *patterns: str) -> Rule:
    return Rule(kind, re.compile("|".join(patterns)))


RULES: tuple[Rule, ...] = (
    # -- asked at a wrong moment: before all else, as these come with whatever was asked
    _rule(Kind.NO_HOME, r"Cannot determine user home directory", r"Failed to initialize COM",
          r"global settings directory '.{0,500}' is not accessible"),
    _rule(Kind.NOT_READY, r"The object is not ready", r"session state: Unlocked\)",
          r"The object functionality is limited"),
    _rule(Kind.SERVICE_DIED, r"NS_ERROR_CALL_FAILED", r"NS_ERROR_ABORT"),
    _rule(Kind.SERVICE_LOST, r"NS_ERROR_SOCKET_FAIL",
          r"the VirtualBox COM server is not running or failed to start"),
    # -- the driver (rc=-1908, -1912: VirtualBox's numbers, which older versions show alone)
    _rule(Kind.DRIVER_MISMATCH, r"VERR_VM_DRIVER_VERSION_MISMATCH", r"rc=-1912\b", r"Error -1912\b",
          r"kernel modules? (?:do|does) not match", r"VERR_SUPDRV_COMPONENT"),
    _rule(Kind.NO_DRIVER, r"Kernel driver not installed", r"Error -1908\b", r"rc=-1908\b",
          r"VERR_VM_DRIVER_NOT_INSTALLED", r"VERR_VM_DRIVER_NOT_ACCESSIBLE", r"rc=-1909\b",
          r"Error -1909\b", r"failed to open /dev/vbox", r"VERR_SUPDRV_NOT_FOUND"),
    _rule(Kind.DRIVERLESS, r"VERR_SUP_DRIVERLESS"),
    # -- VT-x and AMD-V. Words of the running kernel's KVM: issues 81, 139, 713 of VirtualBox.
    _rule(Kind.HARDWARE_IN_USE, r"VERR_SVM_IN_USE", r"VERR_VMX_IN_VMX_ROOT_MODE",
          r"VERR_SVM_HOST_SVME_NOT_ENABLED", r"VERR_VMX_NOT_IN_VMX_ROOT_MODE",
          r"VERR_VMX_HOST_VMXE_NOT_ENABLED"),
    _rule(Kind.HARDWARE_OFF, r"VERR_VMX_MSR_\w{0,60}DISABLED", r"VERR_VMX_MSR_\w{0,60}LOCK\w{0,60}",
          r"VERR_SVM_DISABLED", r"VERR_VMX_MSR_\w{1,60}_VMX_DISABLED"),
    _rule(Kind.NO_HARDWARE, r"VERR_VMX_NO_VMX", r"VERR_SVM_NO_SVM", r"VERR_UNSUPPORTED_CPU\b"),
    # -- a saved state that does not load, whatever the reason
    _rule(Kind.STATE_UNUSABLE, r"VERR_SSM_\w{1,60}", r"Failed to load unit '",
          r"VERR_CPUM_INVALID_XCR0",
          r"saved state file '[^'\n]{0,500}' (?:is invalid|does not exist)",
          r"Failed to restore the saved state", r"VERR_CPUM_(?:RAISE|IN)\w{0,60}COMPAT\w{0,60}"),
    # -- ports and interfaces
    _rule(Kind.PORT_TAKEN, r"A NAT rule for this host port and this host IP already exists"),
    _rule(Kind.NO_INTERFACE, r"Nonexistent host networking interface",
          r"Failed to (?:create|open|attach) the (?:host-only adapter|network)",
          r"VERR_INTNET_FLT_IF_NOT_FOUND", r"Interface \"[^\"\n]{0,500}\" doesn't seem to exist"),
    # -- room
    _rule(Kind.DISK_FULL, r"VERR_DISK_FULL", r"No space left on device", r"VERR_FILE_TOO_BIG",
          r"_DISKFULL\b"),
    _rule(Kind.NO_MEMORY, r"VERR_NO_MEMORY", r"VERR_NO_PHYS_MEMORY", r"VERR_NO_PAGE_MEMORY",
          r"VERR_GMM_\w{1,60}", r"HostMemoryLow", r"E_OUTOFMEMORY", r"NS_ERROR_OUT_OF_MEMORY",
          r"VERR_EM_NO_MEMORY"),
    _rule(Kind.OUT_OF_RANGE, r"must be in range \[", r"VERR_OUT_OF_RANGE"),
    # -- the machine and its lock
    _rule(Kind.NOT_REGISTERED, r"Could not find a registered machine"),
    _rule(Kind.MEDIUM_IN_USE, r"Medium '[^'\n]{0,500}' (?:is locked|is already in use)",
          r"is locked for (?:reading|writing)", r"Cannot close medium '",
          r"Locking of attached media failed",
          r"is attached to a virtual machine", r"VERR_SHARING_VIOLATION", r"VERR_LOCK_FAILED"),
    _rule(Kind.LOCKED, r"is already locked (?:by|for) a session", r"while it is locked",
          r"is being (?:un)?locked", r"already has a lock request pending"),
    _rule(Kind.SNAPSHOT_HAS_CHILD, r"Snapshot '[^'\n]{0,500}' .{0,500}cannot be deleted"),
    _rule(Kind.NO_SNAPSHOT, r"Could not find a snapshot", r"does not have any snapshots"),
    _rule(Kind.NOT_RUNNING, r"is not currently running", r"is not running \(currently"),
    _rule(Kind.WRONG_STATE, r"is not mutable", r"Already paused", r"is not paused",
          r"VBOX_E_INVALID_VM_STATE", r"0x80bb0002", r"\(machine state: \w{1,60}\)"),
    _rule(Kind.NO_ADDITIONS, r"Guest Additions are not installed"),
    _rule(Kind.NO_FOLDER, r"Could not find a shared folder named"),
    # -- disks
    _rule(Kind.MEDIUM_DAMAGED, r"VERR_VD_\w{0,60}(?:INVALID|CORRUPT|HEADER|UNKNOWN)\w{0,60}",
          r"VERR_VD_GEN_INVALID_HEADER", r"invalid pre-header",
          r"Could not get the storage format of the medium", r"VERR_VD_BLOCK_FREE\b",
          r"VERR_ZIP_CORRUPTED"),
    _rule(Kind.MEDIUM_MISSING, r"Could not find file for the medium",
          r"error VERR_FILE_NOT_FOUND opening",
          r"Failed to open image '[^'\n]{0,500}' in read-write mode \(VERR_FILE_NOT_FOUND",
          r"Could not find an open hard disk", r"error: File not found\. \(VERR_FILE_NOT_FOUND\)"),
    _rule(Kind.MEDIUM_EXISTS, r"cannot create image '.{0,500}VERR_ALREADY_EXISTS",
          r"Could not create the medium storage unit.{0,500}VERR_ALREADY_EXISTS"),
    _rule(Kind.ALREADY_EXISTS, r"Machine settings file '.{0,500}' already exists",
          r"Shared folder named '.{0,500}' already exists",
          r"A NAT rule of this name already exists",
          r"Storage controller named '.{0,500}' already exists", r"VERR_ALREADY_EXISTS"),
    _rule(Kind.NO_CONTROLLER, r"Could not find a controller named",
          r"Could not find a storage controller named"),
    # -- the installation
    _rule(Kind.INSTALLATION, r"Could not launch the VM process", r"VERR_SUPLIB_\w{1,60}",
          r"Unable to load R3 module", r"VERR_SUP_VP_\w{1,60}", r"VERR_LDR_\w{1,60}",
          r"REGDB_E_CLASSNOTREG", r"error while loading shared libraries",
          r"Implementation of the USB .{0,20} controller not found"),
    _rule(Kind.SETTINGS_DAMAGED, r"Location: '.{0,500}', line \d+",
          r"Could not (?:load|read) the settings",
          r"VERR_XML_\w{1,60}"),
    _rule(Kind.ENDED_AT_START, r"has terminated unexpectedly during startup",
          r"The VM session was (?:aborted|closed) before", r"VERR_INTERNAL_ERROR"),
    _rule(Kind.FILE_REFUSED, r"RTPathQueryInfo failed"),
    # -- the question itself
    _rule(Kind.BAD_REQUEST, r"Unknown option:", r"Invalid command '", r"Invalid frontend name",
          r"Too many storage controllers", r"Invalid (?:argument|value|parameter)",
          r"Incorrect parameters", r"Syntax error", r"NS_ERROR_INVALID_ARG", r"0x80070057"),
    _rule(Kind.FILE_REFUSED, r"Could not create the directory", r"RawFile#\d+ failed",
          r"VERR_ACCESS_DENIED", r"VERR_FILE_NOT_FOUND",
          r"NamedPipe#\d+ failed", r"VERR_PATH_NOT_FOUND", r"VBOX_E_FILE_ERROR"),
    # A start does not fail by this alone: what stands beside it is the cause.
    _rule(Kind.PORT_TAKEN, r"VERR_NAT_REDIR_SETUP", r"failed to set up redirection of \d+"),
    _rule(Kind.WRONG_STATE, r"VBOX_E_INVALID_OBJECT_STATE", r"VBOX_E_OBJECT_IN_USE"),
)

#: What each kind is to whoever asked for the job: the error, and advice where the standing one of
#: its class does not fit.
ERRORS: dict[Kind, tuple[type[VmjobError], str | None]] = {
    Kind.NO_DRIVER: (KernelModuleMissing, None),
    Kind.DRIVER_MISMATCH: (KernelModuleMissing,
                           ("Build VirtualBox's kernel module again (/sbin/vboxconfig, or the "
                            "package virtualbox-dkms), then load it.")),
    Kind.DRIVERLESS: (KernelModuleMissing, None),
    Kind.NO_HARDWARE: (VirtualizationOff, None),
    Kind.HARDWARE_OFF: (VirtualizationOff, None),
    Kind.HARDWARE_IN_USE: (VirtualizationInUse, None),
    Kind.INSTALLATION: (VirtualBoxBroken, None),
    Kind.NO_HOME: (HomeUnusable, None),
    Kind.NO_MEMORY: (HostMemoryLow, None),
    Kind.DISK_FULL: (HostDiskFull, None),
    Kind.PORT_TAKEN: (PortTaken, None),
    Kind.NO_INTERFACE: (NotSupported, "Use --network nat or none."),
    Kind.LOCKED: (Busy, None),
    Kind.STATE_UNUSABLE: (CheckpointUnusable, None),
    Kind.SERVICE_LOST: (VirtualBoxBroken,
                        ("Its service VBoxSVC did not start, or does not answer: it needs a /tmp "
                         "that this user may write to (also inside a systemd unit).")),
    Kind.MEDIUM_DAMAGED: (DiskUnusable, None),
    Kind.ENDED_AT_START: (MachineStartFailed, None),
    Kind.OUT_OF_RANGE: (UsageError, "Give the machine what its hypervisor can give it."),
}


@dataclass(frozen=True)
class Fault:
    """What a text was understood as.

    ``line``: the line of it that says most; ``text``: its end, for reports.
    """

    kind: Kind
    line: str
    text: str

    @property
    def error_class(self) -> type[VmjobError]:
        return ERRORS.get(self.kind, (HypervisorRefused, None))[0]

    @property
    def retryable(self) -> bool:
        """Whether the same may work on this computer later."""
        return self.error_class.retryable

    def error(self, what: str = "VirtualBox", **context: Any) -> VmjobError:
        """The error to raise; ``what`` begins its sentence (``VBoxManage startvm``)."""
        cls, advice = ERRORS.get(self.kind, (HypervisorRefused, None))
        return cls(f"{what}: {self.line}", advice=advice,
                   **{"kind": str(self.kind), "text": self.text, **context})


def classify(*texts: str) -> Fault:
    """What VirtualBox's texts mean together: stderr of VBoxManage, of VBoxHeadless, VBox.log.

    Never raises; what nobody knows is `Kind.UNKNOWN` with the first line that looks like an error,
    and VirtualBox's code for it where there is one.
    """
    text = "\n".join(each for each in texts if each)[-TEXT_LOOKED_AT:]
    for rule in RULES:
        if found := rule.pattern.search(text):
            return Fault(rule.kind, _line_at(text, found.start()), text[-TEXT_KEPT:])
    lines = error_lines(text) or [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0][:TEXT_KEPT] if lines else "it said nothing"
    if code := _CODE.search(text):
        line = f"{line} ({code[1]})"
    return Fault(Kind.UNKNOWN, line, text[-TEXT_KEPT:])


#: Of VBoxManage and VBoxHeadless; the last is what a VBoxHeadless says on its stdout.
_ERROR = re.compile(r"^(?:VBox\w+(?:\.exe)?: (?:fatal )?error: ?"
                    r"|Error: failed to start machine\. Error message: )(.*)$", re.IGNORECASE)
_WARNING = re.compile(r"^(?:VBox\w+(?:\.exe)?): warning: ?(.*)$", re.IGNORECASE)
#: What VBoxManage adds to an error: true, and of no use to a reader.
_DETAILS = re.compile(r"^(?:Details: code |Context: \"|Code \w+ \(0x)")
#: The code in it; it is all that is known of what has no words of its own.
_CODE = re.compile(r"^VBox\w+(?:\.exe)?: error: (?:Details: code|Code) (\w{1,60}) \(0x",
                   re.MULTILINE)


def error_lines(text: str) -> list[str]:
    """What stands behind ``VBoxManage: error:``, without the lines of details."""
    found = (_ERROR.match(line.strip()) for line in text.splitlines())
    lines = [match[1].strip() for match in found if match]
    return [line for line in lines if not _DETAILS.match(line)] or lines


def warning_lines(text: str) -> list[str]:
    """What stands behind ``VBoxManage: warning:``."""
    found = (_WARNING.match(line.strip()) for line in text.splitlines())
    return [match[1].strip() for match in found if match]


def _line_at(text: str, place: int) -> str:
    """The line that holds ``place``, without what VirtualBox puts before it.

    A line of details has the code only: then the first line of the error says more.
    """
    line = text[text.rfind("\n", 0, place) + 1:].split("\n", 1)[0].strip()
    if match := _ERROR.match(line) or _WARNING.match(line):
        line = match[1].strip()
    if _DETAILS.match(line) and (lines := error_lines(text)):
        line = lines[0]
    line = re.sub(r"^\d\d:\d\d:\d\d\.\d+ (?:\S+ +)?", "", line)
    return line[:TEXT_KEPT] or "it said nothing"


def check_memory(wanted_mb: int, available_mb: int) -> None:
    """Raise `HostMemoryLow` when a machine's memory cannot be had; VirtualBox itself does not look.

    It starts a machine of any size and takes its memory as the guest touches it, until the kernel
    kills something. ``available_mb``: what programs can still get (Linux: MemAvailable).
    """
    if wanted_mb + OWN_MEMORY_MB > available_mb:
        raise HostMemoryLow(
            f"the machine needs {wanted_mb} MB of memory (and VirtualBox {OWN_MEMORY_MB} MB), and "
            f"{available_mb} MB are free", wanted_mb=wanted_mb, available_mb=available_mb)


assert all(issubclass(cls, VmjobError) for cls, _ in ERRORS.values())
assert issubclass(HypervisorRefused, MachineError)
