"""A machine's memory and devices, on their way from QEMU to the disk while the guest runs.

QEMU tells which pages changed since it looked last. Under TCG, before QEMU 9.0, a look does not
reach pages that the guest is just writing to: what is written to them afterwards is lost to the
stream ("physmem: Fix migration dirty bitmap coherency with TCG memory access" mends it). So QEMU
looks only while the guest stands still: once before the pages are written, and once after, when the
guest has been stopped again. In between it runs, and the pages are written once.

    guest   stands, runs ------------------------------, stands -----------------------, runs
    QEMU    looks,  pages, from the first on             the rest, looks, pages, devices
    vmjob           reads them ------, near the end waits, reads
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from vmjob.errors import CheckpointFailed, MachineError
from vmjob.host.priority import lower_disk_priority
from vmjob.host.standstill import happens
from vmjob.machine.qemu.monitor import Monitor
from vmjob.machine.qemu.pages import PageTable, PageWriter
from vmjob.machine.qemu.stream import PAGE, Block, Reader, StreamError

__all__ = ["Devices", "Missed", "Taking"]

#: Seconds for all pages to be written once, while the guest runs.
PASS = 600.0
#: Seconds for what is left when the guest stands still.
FINISH = 60.0
#: What QEMU may write in a second, bytes: it is the reader that is slow.
BANDWIDTH = 1 << 40
#: Milliseconds for which QEMU may stop the guest by itself: it looks again when it thinks that the
#: rest takes no longer. With 0 it does so when nothing is left, and by then the guest stands still.
DOWNTIME = 0
#: Bytes of the socket's buffer, and read at once. QEMU is ahead of the reader by no more than twice
#: this.
BUFFER = 128 * 1024
#: Pages with data, at the end of the memory, before which the reader waits for the guest to be
#: stopped: four times what QEMU may be ahead, so it cannot come to its second look before.
LATE = 4 * 2 * BUFFER // PAGE
#: Seconds between two attempts to let the guest go on while QEMU clears up.
CLEAR_UP = 0.001

CAPABILITIES = [{"capability": "x-ignore-shared", "state": False},
                {"capability": "pause-before-switchover", "state": True},
                {"capability": "events", "state": True}]


class Devices(msgspec.Struct, frozen=True):
    """On disk, packed (which brings a checksum): what is before and behind a stream's pages."""

    head: bytes
    section: bytes
    tail: bytes


class Missed(Exception):
    """QEMU looked for changed pages while the guest ran: what it found cannot be trusted."""


class Taking:
    """One checkpoint's memory and devices, on their way from QEMU to the disk."""

    def __init__(self, monitor: Monitor, directory: Path, name: str, table: PageTable | None,
                 template: Path | None, suspended: Callable[[], bool]) -> None:
        self._suspended = suspended
        self._monitor = monitor
        self._directory = directory
        self._name = name
        self._table = table.copy() if table else None
        self._template = template
        self._writer: PageWriter | None = None
        self._reader = Reader(self._begin)
        self._reading: asyncio.Future[None] | None = None
        self._completed = self._goes_on = self._whole = False
        #: Set when only the last pages are left; when the first, and the last ones, may be read.
        self._late = asyncio.Event()
        self._first = threading.Event()
        self._go = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._main = self._late_page = 0

    @property
    def written_bytes(self) -> int:
        return self._writer.written_bytes if self._writer else 0

    async def catch_up(self, *, live: bool) -> None:
        """Write all memory, while the guest runs if ``live``; returns when it stands still.

        Raises `Missed`; then once more, without ``live``.
        """
        monitor = self._monitor
        await self._leave_migration()
        monitor.forget_migration()
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self._reading = asyncio.ensure_future(anyio.to_thread.run_sync(self._read, ours))
        with theirs:
            await monitor.execute("migrate-set-capabilities", capabilities=CAPABILITIES)
            await monitor.execute("migrate-set-parameters", **{
                "max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME})
            await monitor.pass_descriptor("checkpoint", theirs.fileno())
            await monitor.execute("stop")
            await monitor.execute("migrate", uri="fd:checkpoint")
        if not await self._reaches("active", FINISH):
            raise CheckpointFailed("QEMU did not begin to write the machine's memory")
        if live:
            if not self._suspended():
                await monitor.execute("cont")
            self._first.set()
            await self._nearly_done()
            await monitor.execute("stop")
            looks = (await monitor.execute("query-migrate"))["ram"]["dirty-sync-count"]
            if looks != 1:
                raise Missed
        self._first.set()
        self._go.set()
        if not await self._reaches("pre-switchover", FINISH):
            raise CheckpointFailed("QEMU did not write the machine's memory in time")

    async def _leave_migration(self) -> None:
        """Of a machine that stayed suspended: QEMU makes no second checkpoint in the state behind
        one, which it leaves by no other way; and it comes there only a moment after the end.
        """
        try:
            with anyio.fail_after(FINISH):
                while (status := await self._status()) == "finish-migrate":  # noqa: ASYNC110
                    await anyio.sleep(CLEAR_UP)
                if status == "postmigrate":
                    with anyio.CancelScope(shield=True):  # its user wants it to stand still
                        await self._continue()
                        await self._monitor.execute("stop")
        except TimeoutError:
            raise CheckpointFailed("QEMU does not end the checkpoint before") from None

    async def _status(self) -> str:
        return str((await self._monitor.execute("query-status"))["status"])

    async def _nearly_done(self) -> None:
        assert self._reading is not None
        late = asyncio.ensure_future(self._late.wait())
        over = asyncio.ensure_future(self._monitor.migration_reaches("pre-switchover", PASS))
        waiting: list[asyncio.Future[Any]] = [late, over, self._reading]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            late.cancel()
            over.cancel()
            await asyncio.gather(late, over, return_exceptions=True)
        if self._late.is_set():
            return
        if self._reading.done():
            await self._read_all()
            raise CheckpointFailed("QEMU ended its stream in the middle")
        if not over.cancelled() and over.exception() is None and over.result():
            raise Missed
        raise CheckpointFailed("QEMU did not write the machine's memory")

    async def finish(self) -> tuple[PageTable, Devices, str]:
        """Write the last pages and the devices."""
        await self._monitor.execute("migrate-continue", state="pre-switchover")
        if not await self._reaches("completed", FINISH):
            raise CheckpointFailed("QEMU did not write the machine's devices in time")
        self._completed = True
        await self._go_on()
        self._goes_on = True
        await self._read_all()
        self._whole = True
        assert self._table is not None
        reader = self._reader
        return (self._table, Devices(reader.head, reader.section, reader.tail),
                reader.machine_type)

    async def end(self) -> None:
        """Whatever has happened, let the guest go on; of what is not whole, nothing is left."""
        self._first.set()
        self._go.set()
        if self._whole:
            return
        if not self._goes_on:
            await self._recover()
        for path in self._directory.glob(f"{self._name}.*"):
            path.unlink(missing_ok=True)

    async def _recover(self) -> None:
        with anyio.CancelScope(shield=True):
            if not self._completed:
                with contextlib.suppress(MachineError):  # it has it only if it did not begin
                    await self._monitor.execute("closefd", fdname="checkpoint")
                with contextlib.suppress(MachineError):
                    await self._monitor.execute("migrate_cancel")
            try:
                await self._go_on()
            except (MachineError, TimeoutError):
                # A guest that stands still for ever is worse than a job that is resumed.
                self._monitor.end_machine()
            with contextlib.suppress(Exception):  # what failed was told already
                await self._read_all()

    async def _go_on(self) -> None:
        """Let the guest run, unless it is suspended."""
        with anyio.fail_after(FINISH):
            await self._continue(self._suspended)

    async def _continue(self, unless: Callable[[], bool] = lambda: False) -> None:
        """QEMU refuses while it still clears up behind a migration."""
        while not unless():
            try:
                await self._monitor.execute("cont")
            except MachineError as error:
                if "not finalized" not in error.message:
                    raise
                await anyio.sleep(CLEAR_UP)
            else:
                return

    async def _reaches(self, status: str, deadline: float) -> bool:
        """See `Monitor.migration_reaches`; what the reader failed of is the better story."""
        assert self._reading is not None
        try:
            return await self._monitor.migration_reaches(status, deadline)
        except MachineError:
            await self._read_all()
            raise

    async def _read_all(self) -> None:
        """Wait for the reader's end; raises what it failed of."""
        if self._reading is None:
            return
        try:
            with anyio.fail_after(FINISH):
                await asyncio.shield(self._reading)
        except StreamError as error:
            raise CheckpointFailed(f"QEMU wrote what vmjob does not know: {error}") from error

    # -- in a thread ---------------------------------------------------------------------------

    def _begin(self, blocks: list[Block]) -> Callable[[int, int, memoryview | None], None]:
        if self._table is None:
            self._table = PageTable(blocks)
        elif self._table.blocks != blocks:
            raise StreamError("the machine's memory has other blocks than before")
        self._writer = PageWriter(self._table, self._template, self._directory, self._name)
        self._main = max(range(len(blocks)), key=lambda block: blocks[block].size)
        self._late_page = self._writer.late_page(self._main, LATE)
        return self._writer.page

    def _read(self, sock: socket.socket) -> None:
        lower_disk_priority()
        buffer = memoryview(bytearray(BUFFER))
        try:
            with sock:
                happens(self._first, FINISH)
                while count := sock.recv_into(buffer):
                    self._reader.feed(buffer[:count])
                    if not self._late.is_set() and self._is_late():
                        self._loop.call_soon_threadsafe(self._late.set)
                        if not happens(self._go, FINISH):
                            raise StreamError("nobody wants the rest of it")
            self._reader.finish()
        finally:
            if self._writer is not None:
                self._writer.close()

    def _is_late(self) -> bool:
        block, number = self._reader.position
        return block > self._main or (block == self._main and number >= self._late_page)
