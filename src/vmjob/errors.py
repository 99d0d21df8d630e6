"""Every error that vmjob reports, as one tree.

    VmjobError
    ├── UsageError       the caller asked for something that cannot be
    ├── HostError        this computer lacks something, or is out of it
    ├── ImageError       an image is missing, damaged or cannot be built
    ├── MachineError     the virtual machine did not start, or ended by itself
    ├── GuestError       what runs inside the machine broke the protocol, or refused a request
    └── JobError         the job ran, and its outcome is not what was declared

Each class carries a stable ``code`` (scripts may compare it), the exit code of
the command line, whether a retry on the same computer may help, and one line of
``advice``. The table in ``docs/reference/errors.md`` is made from this module.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = ["GuestError", "HostError", "ImageError", "JobError", "MachineError", "UsageError",
           "VmjobError", "all_errors"]

#: Exit code of the command line when vmjob itself failed (as ``docker run`` has it).
EXIT_VMJOB_FAILED = 125
EXIT_CANNOT_EXECUTE = 126
#: EX_TEMPFAIL of sysexits.h, which batch systems know.
EXIT_TRY_LATER = 75
EXIT_NOT_FOUND = 127


class VmjobError(Exception):
    """Base of all errors of vmjob.

    Parameters: ``message`` says what happened, in one sentence with the names that
    matter; ``advice`` replaces the class's standing advice; ``context`` holds further
    facts for logs and ``--json`` (JSON-compatible values only).
    """

    code: ClassVar[str] = "vmjob-error"
    exit_code: ClassVar[int] = EXIT_VMJOB_FAILED
    retryable: ClassVar[bool] = False
    standing_advice: ClassVar[str] = "Run `vmjob doctor`; if it finds nothing, report a bug."

    def __init__(self, message: str, *, advice: str | None = None, **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice or self.standing_advice
        self.context = context

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON-compatible data: the form that ``--json`` prints."""
        return {"code": self.code, "message": self.message, "advice": self.advice,
                "retryable": self.retryable, "context": self.context}


# -- the caller's input ----------------------------------------------------------------------


class UsageError(VmjobError):
    """The request cannot be carried out as it was put."""

    code = "usage"
    standing_advice = "Correct the request; `vmjob COMMAND --help` shows what is possible."


class InputMissing(UsageError):
    code = "input-missing"
    standing_advice = "Check the path given with --in."


class InputUnreadable(UsageError):
    code = "input-unreadable"
    standing_advice = "Give the user who runs vmjob the right to read it."


class BadPath(UsageError):
    code = "bad-path"
    standing_advice = "Use a path inside the job's directory, without '..'."


class DiskUnusable(UsageError):
    """A disk image that a job brings cannot be booted from, or would open other files."""

    code = "disk-unusable"
    standing_advice = ("Give a raw, qcow2 or VDI image that needs no other file: "
                       "`qemu-img convert -O qcow2 OLD NEW` makes one.")


class UnknownMachine(UsageError):
    code = "unknown-machine"
    standing_advice = "`vmjob machine list` shows what there is; `vmjob machine create` makes one."


class WrongState(UsageError):
    code = "wrong-state"
    standing_advice = "Look at the machine's status, and call what that status allows."


class NotSupported(UsageError):
    code = "not-supported"
    standing_advice = "See `capabilities` of the driver for what it can do."


class JobFileInvalid(UsageError):
    code = "job-file-invalid"
    standing_advice = "`vmjob job check FILE` names the lines, and what to write instead."


class PackageInvalid(UsageError):
    """An app version of a BOINC project cannot be made, or used, as it is."""

    code = "package-invalid"
    standing_advice = "Make it again with `vmjob project package`."


class KeyFileInvalid(UsageError):
    """A code signing key of a BOINC project cannot be used."""

    code = "key-file-invalid"
    standing_advice = "Give a file that `vmjob project keys` or BOINC's crypt_prog has written."


class SignatureInvalid(UsageError):
    code = "signature-invalid"
    standing_advice = "Sign it again: `vmjob project package --key FILE` with the project's key."


# -- this computer ---------------------------------------------------------------------------


class HostError(VmjobError):
    """This computer lacks something that the job needs."""

    code = "host"


class ProgramMissing(HostError):
    code = "program-missing"
    standing_advice = "Install the program named above (`vmjob doctor` names the package)."


class QemuTooOld(HostError):
    code = "qemu-too-old"
    standing_advice = "Install QEMU 7.2 or newer."


class VirtualBoxTooOld(HostError):
    code = "virtualbox-too-old"
    standing_advice = "Install VirtualBox 7.0 or newer."


class VirtualBoxKnownBad(HostError):
    """This version of VirtualBox has a fault that harms the job or this computer."""

    code = "virtualbox-known-bad"
    standing_advice = "Install a newer VirtualBox."


class VirtualBoxBroken(HostError):
    """VirtualBox is installed, and cannot be used as it is."""

    code = "virtualbox-broken"
    standing_advice = "Install VirtualBox again; `vmjob doctor` tells more."


class KernelModuleMissing(HostError):
    """VirtualBox's kernel module is not there, is another version's, or may not be used."""

    code = "kernel-module-missing"
    standing_advice = ("Load it (modprobe vboxdrv); after an upgrade of the system, build it again "
                       "(/sbin/vboxconfig, or the package virtualbox-dkms).")


class VirtualizationOff(HostError):
    """The processor has no hardware support for virtual machines, or it is switched off."""

    code = "virtualization-off"
    standing_advice = ("Switch on virtualization (VT-x or AMD-V) in this computer's BIOS setup, or "
                       "use QEMU with --accel tcg, which needs none.")


class VirtualizationInUse(HostError):
    """Another hypervisor has the processor's hardware support for itself."""

    code = "virtualization-in-use"
    retryable = True
    standing_advice = "End the other hypervisor's machines; `vmjob doctor` tells whose they are."


class AcceleratorUnusable(HostError):
    code = "accelerator-unusable"
    standing_advice = "Use --accel auto, or --accel tcg, which needs no hardware support."


class HostDiskFull(HostError):
    code = "host-disk-full"
    retryable = True
    standing_advice = "Free some disk space, or point VMJOB_HOME at a larger disk."


class ArchiveDamaged(HostError):
    """Programs that came as an archive cannot be unpacked: it is not what was published."""

    code = "archive-damaged"
    standing_advice = "Get it again; under BOINC, reset the project."


class HostMemoryLow(HostError):
    code = "host-memory-low"
    retryable = True
    standing_advice = "Close other programs, or give the machine less memory with --memory."


class HomeUnusable(HostError):
    code = "home-unusable"
    standing_advice = "Point VMJOB_HOME at a directory that you own and may write to."


class PolicyForbids(HostError):
    """The owner of this computer does not allow what the job needs."""

    code = "policy-forbids"
    standing_advice = "Change the policy file named above if that is not what you want."


class PolicyInvalid(HostError):
    """The owner of this computer has forbidden something, and nobody can read what."""

    code = "policy-invalid"
    standing_advice = "Correct the file named above; nothing runs until then."


class PortTaken(HostError):
    """A port of this computer that was asked for cannot be had; any other may be."""

    code = "port-taken"
    retryable = True
    standing_advice = "Ask for another port, or for 0, which is any that is free."


class ClientFailed(HostError):
    """The BOINC client did not start, ended by itself, or did not answer in time."""

    code = "client-failed"
    retryable = True
    standing_advice = "Look at the client's own messages, named above."


class SlotUnusable(HostError):
    code = "slot-unusable"
    standing_advice = "Give the directory of a job that was run with --slot."


class CheckpointNewer(SlotUnusable):
    """The checkpoint is good, and kept: it needs the vmjob that made it."""

    code = "checkpoint-newer"
    standing_advice = "Continue with the vmjob that made it, or a newer one; nothing was changed."


class ProcessorChanged(HostError):
    """The checkpoint is good, and kept: it needs another computer, or the one it was made on."""

    code = "processor-changed"
    standing_advice = ("Continue the job on a computer like the one it began on; --accel tcg "
                       "--cpu baseline makes checkpoints that any computer can continue.")


class Busy(HostError):
    code = "busy"
    retryable = True
    standing_advice = "Another vmjob process is at work on this; wait for it to end."


# -- images ----------------------------------------------------------------------------------


class ImageError(VmjobError):
    """An image cannot be used."""

    code = "image"


class ImageMissing(ImageError):
    code = "image-missing"
    standing_advice = "`vmjob image list` shows what there is; `vmjob image build` makes one."


class ImageCorrupt(ImageError):
    code = "image-corrupt"
    standing_advice = "Remove it with `vmjob image remove` and build it again."


class ImageOutdated(ImageError):
    code = "image-outdated"
    standing_advice = "Build it again with `vmjob image build --force`."


class ImageBuildFailed(ImageError):
    code = "image-build-failed"
    retryable = True
    standing_advice = "Read the end of the build log above; a failed download may work again later."


# -- the virtual machine ---------------------------------------------------------------------


class MachineError(VmjobError):
    """The virtual machine did not start, or ended by itself."""

    code = "machine"
    retryable = True


class MachineStartFailed(MachineError):
    code = "machine-start-failed"
    standing_advice = "Run `vmjob doctor`; `--keep-on-failure` keeps the machine's logs."


class HypervisorSilent(MachineError):
    """A program of the hypervisor did not answer in time, and was ended."""

    code = "hypervisor-silent"
    retryable = True
    standing_advice = "The computer may be overloaded: try again when it is less busy."


class HypervisorRefused(MachineError):
    """The hypervisor answered with an error; ``context['kind']`` is our word for it."""

    code = "hypervisor-refused"
    standing_advice = "Run `vmjob doctor`; if it finds nothing, report a bug with the text above."


class TemplateUnusable(MachineError):
    """A frozen machine is damaged; it is made anew by itself."""

    code = "template-unusable"
    retryable = True
    standing_advice = "Run it again; `vmjob clean --templates` removes all frozen machines."


class CheckpointFailed(MachineError):
    """The machine goes on, and earlier checkpoints stay good."""

    code = "checkpoint-failed"
    retryable = True
    standing_advice = "The job goes on; the next checkpoint is tried as usual."


class CheckpointUnusable(MachineError):
    code = "checkpoint-unusable"
    standing_advice = "The checkpoint before it is used, or else the job begins anew."


class BootTimeout(MachineError):
    code = "boot-timeout"
    standing_advice = "The computer may be overloaded: try again, or give it more time."


class ClockWrong(MachineError):
    """The guest's kernel measured its processor's clock while the computer was too busy."""

    code = "clock-wrong"
    retryable = True
    standing_advice = "Try again when the computer is less busy."


class MachineDied(MachineError):
    """The machine's process ended while a job ran: nobody knows how far the job got."""

    code = "machine-died"
    standing_advice = "Run the job again; `--keep-on-failure` keeps the machine's logs."


class KeeperLost(MachineError):
    """The process that held a machine of `vmjob machine` ended, or does not answer."""

    code = "keeper-lost"
    standing_advice = ("`vmjob machine logs NAME` may tell why; `vmjob machine restore NAME` goes "
                       "on from its newest checkpoint, if it has one.")


class MachineKept(MachineError):
    """The machine went to the disk while a command ran, which goes on when the machine does."""

    code = "machine-kept"
    standing_advice = ("`vmjob machine resume NAME`, then `vmjob machine exec NAME --attach TASK` "
                       "for the rest of its output.")


class GuestPanic(MachineError):
    code = "guest-panic"
    standing_advice = "If the console speaks of memory, give the machine more; else report a bug."


# -- inside the machine ----------------------------------------------------------------------


class GuestError(VmjobError):
    """The agent inside the machine broke the protocol, or refused a request."""

    code = "guest"


class AgentProtocol(GuestError):
    code = "agent-protocol"
    retryable = True
    standing_advice = "The machine is no longer trustworthy: run the job again in a new one."


class AgentVersion(GuestError):
    code = "agent-version"
    standing_advice = "Build the image again with `vmjob image build --force`."


class AgentSilent(GuestError):
    code = "agent-silent"
    retryable = True
    standing_advice = "The machine hangs, or the computer is overloaded: run the job again."


class AgentLost(GuestError):
    code = "agent-lost"
    retryable = True
    standing_advice = "Something inside the machine ended the agent: run the job again."


class GuestRefused(GuestError):
    """The agent answered a request with an error; ``context['reason']`` is its word for it."""

    code = "guest-refused"
    standing_advice = "Look at the path or the command named above."


# -- the job ---------------------------------------------------------------------------------


class JobError(VmjobError):
    """The job ran, and something that was declared about it did not come true."""

    code = "job"
    standing_advice = "Look at the job's stderr."


class CommandNotFound(JobError):
    code = "command-not-found"
    exit_code = EXIT_NOT_FOUND
    standing_advice = "Give a program that is in the image, or bring it along with --in."


class CommandNotExecutable(JobError):
    code = "command-not-executable"
    exit_code = EXIT_CANNOT_EXECUTE
    standing_advice = "Check its mode (chmod +x), its first line, and that it is a Linux program."


class OutputMissing(JobError):
    code = "output-missing"
    standing_advice = "Check the name given with --out; paths are relative to the job's directory."


class OutputUnsafe(JobError):
    code = "output-unsafe"
    standing_advice = "Outputs may hold files, directories and links that stay inside the output."


class OutputTooLarge(JobError):
    code = "output-too-large"
    standing_advice = "Raise --output-limit, or write less."


class HeartbeatStopped(JobError):
    code = "heartbeat-stopped"
    standing_advice = ("Look at the job's own logs for what it hung in; raise "
                       "minimum_heartbeat_interval when it was only slow.")


class Postponed(JobError):
    """The job asked to be continued later; with a slot, it can be."""

    code = "postponed"
    exit_code = EXIT_TRY_LATER
    retryable = True
    standing_advice = "Continue it after that time: `vmjob run --resume DIR`."


class FolderFull(JobError):
    """What is in the folder already stays; what is too much does not come from the machine."""

    code = "folder-full"
    standing_advice = "Let the job write less there, or raise the folder's limits."


class ResultOverdue(JobError):
    """A result was not reported to the development server in time."""

    code = "result-overdue"
    retryable = True
    standing_advice = "Look at the client's messages; give it more time."


class TimeLimit(JobError):
    code = "time-limit"
    standing_advice = "Raise --time-limit, or give the job less to do."


def all_errors() -> list[type[VmjobError]]:
    """Every error class, parents before children: the source of the table in the docs."""

    def below(cls: type[VmjobError]) -> list[type[VmjobError]]:
        found = [cls]
        for child in cls.__subclasses__():
            found += below(child)
        return found

    return below(VmjobError)
