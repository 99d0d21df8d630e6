"""The mailbox: two notes between host and guest on a disk of 28 KiB, as some old jobs expect it.

    0       for the guest: at most 14334 bytes and a NUL
    14335   for the host, the same
    28670   not 0: there is something for the guest
    28671   not 0: there is something for the host

That is the floppy disk of BOINC's vboxwrapper (``floppyIO``). Debian's cloud kernel has no driver
for floppy disks (it lacks CONFIG_ISA_DMA_API), so ``/dev/fd0`` is a disk in the guest's memory: it
is part of every checkpoint, and no device has to be there when the machine is made. A guest without
an agent, whose hypervisor has floppy disks, has a real one.
"""

from __future__ import annotations

from pathlib import Path

from vmjob.errors import AgentProtocol, GuestRefused, ImageOutdated, UsageError
from vmjob.guest.client import AgentClient
from vmjob.job.model import MAILBOX_HALF

__all__ = ["DEVICE", "MOST", "SIZE", "Mailbox", "make_floppy", "pack", "read_floppy",
           "unpack"]

#: Bytes of the disk, of each half of it, and of a note without its NUL.
SIZE = 28672
HALF = MAILBOX_HALF
MOST = HALF - 1
#: Bytes of a floppy disk that every system knows; the mailbox is its beginning.
FLOPPY_SIZE = 1440 << 10
#: Where the flags are.
FOR_GUEST, FOR_HOST = 2 * HALF, 2 * HALF + 1

#: The guest's name for it. In machines that are processes of this computer, whose devices are not
#: ours to make, it is a file in the job's directory.
DEVICE = "/dev/fd0"
FILE = "fd0"

#: What the image makes for it (``vmjob/image/guest/init``): the first RAM disk, major number 1.
NO_PLACE = 9
PUT = {
    DEVICE: f"""set -e
[ -b /dev/ram0 ] || exit {NO_PLACE}
[ -b "$0" ] || mknod -m 600 "$0" b 1 0
cat > "$0"
chown job "$0"
""",
    FILE: 'cat > "$0"',
}
#: A job that is root in its machine may have put something else there, which never ends.
DD = "timeout -k 1 10 dd status=none"
GET = f'exec {DD} if="$0" bs={SIZE} count=1 iflag=fullblock'
CLEAR = rf"""printf '\0' | {DD} of="$0" bs=1 seek={FOR_HOST} conv=notrunc"""


def pack(note: bytes) -> bytes:
    """The disk with a note for the guest and none for the host.

    Raises `UsageError` for one of more than `MOST` bytes, or with a NUL in it: the guest would see
    only a part.
    """
    if len(note) > MOST:
        raise UsageError(f"a mailbox holds {MOST} bytes, not {len(note)}")
    if b"\0" in note:
        raise UsageError("what goes into a mailbox ends at its first NUL byte; there is one in it")
    return note.ljust(2 * HALF, b"\0") + b"\1\0"


def unpack(disk: bytes) -> bytes | None:
    """The note for the host; None where there is none. Raises `ValueError` for no such disk."""
    if len(disk) != SIZE:
        raise ValueError(f"a mailbox of {len(disk)} bytes")
    if not disk[FOR_HOST]:
        return None
    return disk[HALF:2 * HALF].partition(b"\0")[0]


def make_floppy(path: Path, note: bytes) -> None:
    """Make the content of a floppy disk that is a mailbox; raises `UsageError`, `OSError`."""
    path.write_bytes(pack(note).ljust(FLOPPY_SIZE, b"\0"))


def read_floppy(path: Path) -> bytes | None:
    """The note for the host on it; None where there is none, or nothing that could be read."""
    try:
        with path.open("rb") as file:
            return unpack(file.read(SIZE))
    except (OSError, ValueError):
        return None


class Mailbox:
    """The mailbox of one machine. ``isolated``: `Capabilities.isolated` of its driver."""

    def __init__(self, client: AgentClient, *, isolated: bool) -> None:
        self._client = client
        self._path = DEVICE if isolated else FILE
        self._user = "root" if isolated else None

    async def put(self, note: bytes) -> None:
        """Make the mailbox, with a note for the guest; what was in it before is gone.

        Once per job: a machine that continues from a checkpoint has it. Raises `UsageError`,
        `ImageOutdated`, and what an agent's lane can.
        """
        code, _ = await self._run(PUT[self._path], pack(note))
        if code == NO_PLACE:
            raise ImageOutdated("the image has no place for a mailbox")
        if code != 0:
            raise GuestRefused("the machine's mailbox cannot be written")

    async def read(self) -> bytes | None:
        """What the guest has written for the host since the last time; None: nothing.

        At most `HALF` bytes, which may be anything. The guest sees that it was taken.
        """
        _, disk = await self._run(GET)
        try:
            note = unpack(disk)
        except ValueError as error:
            raise GuestRefused(f"the machine's mailbox cannot be read: {error}") from None
        if note is not None:
            await self._run(CLEAR)
        return note

    async def _run(self, script: str, given: bytes = b"") -> tuple[int | None, bytes]:
        """Run a script in the machine; its exit code and what it wrote."""
        wrote = b""

        async def take(stream: str, data: bytes) -> None:
            nonlocal wrote
            if stream == "stdout":
                wrote += data
            if len(wrote) > SIZE:
                raise AgentProtocol("a mailbox without end")

        left = [given, b""] if given else [b""]

        async def source() -> bytes:
            return left.pop(0)

        task = await self._client.start(["sh", "-c", script, self._path], user=self._user,
                                        stdin=True)
        await self._client.feed(task, source)
        end = await self._client.follow(task, take)
        self._client.forget(task)
        return end.exit_code, wrote
