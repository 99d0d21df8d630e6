"""An app's connection with the client, for its life."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from vmjob.grid.boinc import files, initdata, lockfile, messages
from vmjob.grid.boinc.channels import Channels, has_client, open_channels
from vmjob.grid.boinc.errors import InitDataInvalid, SlotUnusable
from vmjob.grid.boinc.events import Event
from vmjob.grid.boinc.files import GraphicsState
from vmjob.grid.boinc.incoming import Incoming
from vmjob.grid.boinc.initdata import InitData
from vmjob.grid.boinc.lockfile import SlotLock
from vmjob.grid.boinc.messages import Status
from vmjob.grid.boinc.outgoing import Outgoing
from vmjob.grid.boinc.watch import ClientWatch

__all__ = ["Runtime"]

#: Seconds between looks at the channels: BOINC's library looks ten times a second.
POLL_PERIOD = 0.1
#: Seconds that `Runtime.finish` waits for the client, which looks once a second.
FINISH_WAIT = 2.0
#: Seconds that `Runtime.close` waits for a delivery that is under way.
CLOSE_WAIT = 2.0
#: Seconds between log lines about a slot that stays broken.
COMPLAINT_PERIOD = 60.0

_log = logging.getLogger(__name__)


class Runtime:
    """Made by `open`; a context manager that closes itself.

    Without a client (*standalone*: no ``init_data.xml``, or one that tells of no client) everything
    succeeds and nothing is written, but for the files of the end and `status_file`.
    """

    def __init__(self, directory: Path, init: InitData | None, lock: SlotLock | None,
                 channels: Channels | None, watch: ClientWatch) -> None:
        self._directory = directory
        self._init = init
        self._slot_lock = lock
        self._channels = channels
        self._watch = watch
        self._incoming: Incoming | None = None
        self._outgoing = (Outgoing(directory, init, channels)
                          if init is not None and channels is not None else None)
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    @classmethod
    def open(cls, directory: Path = Path(), *, lock_wait: float = lockfile.WAIT) -> Self:
        """Take a slot, and what an earlier run said at its end out of it.

        Waits at most ``lock_wait`` seconds for another instance of the app to leave, but not when
        our client ends meanwhile. Raises `SlotTaken`, `ChannelsUnusable`, and `SlotUnusable` for
        what else is wrong with the directory.
        """
        directory = directory.absolute()
        init = _read(directory)
        watch = ClientWatch(init.client_pid if init is not None else 0)
        lock, channels = None, None
        try:
            if init is not None and has_client(directory, init):
                lock = SlotLock(directory)
                lock.take(lock_wait, watch.gone)
                files.forget_the_end(directory)
                channels = open_channels(directory, init)
            else:
                files.forget_the_end(directory)
            return cls(directory, init, lock, channels, watch)
        except OSError as error:
            _close(channels, lock)
            raise SlotUnusable(f"cannot use the slot {directory}: {error}") from error
        except BaseException:
            _close(channels, lock)
            raise

    @property
    def init(self) -> InitData | None:
        """The newest ``init_data.xml``; None when there is none that can be read."""
        return self._incoming.init if self._incoming is not None else self._init

    @property
    def standalone(self) -> bool:
        """Whether no client started us."""
        return self._channels is None

    # -- hearing -------------------------------------------------------------------------------

    def listen(self, deliver: Callable[[Event], None]) -> None:
        """Start the thread that hears the client and sends what is due; call it once, soon.

        ``deliver`` is called in that thread and should only pass the event on: until it returns
        nothing else is heard, and after three minutes the client kills. An exception in it is
        logged, and the event is lost.
        """
        if self._thread is not None or self._closed.is_set():
            raise RuntimeError("this runtime listens already, or is closed")
        if self._init is None or self._channels is None or self._outgoing is None:
            return

        def guarded(event: Event) -> None:
            try:
                deliver(event)
            except (Exception, SystemExit):  # noqa: BLE001
                _log.exception("the receiver of %s failed", type(event).__name__)

        self._incoming = Incoming(self._directory, self._init, self._channels, self._watch,
                                  guarded)
        self._thread = threading.Thread(target=self._run, args=(self._incoming, self._outgoing),
                                        name="boinc", daemon=True)
        self._thread.start()

    def _run(self, incoming: Incoming, outgoing: Outgoing) -> None:
        quiet_until = 0.0
        while not self._closed.is_set() and not incoming.gone:
            for step in (incoming.poll, outgoing.send):
                try:
                    step()
                except Exception:  # noqa: BLE001
                    # A thread that died here would let the client kill the job.
                    if time.monotonic() >= quiet_until and not self._closed.is_set():
                        quiet_until = time.monotonic() + COMPLAINT_PERIOD
                        _log.exception("the connection with the client is disturbed")
                if incoming.gone:
                    outgoing.abandon()
            self._closed.wait(POLL_PERIOD)

    # -- telling; from any thread --------------------------------------------------------------

    def report(self, status: Status) -> None:
        """What the client is told from now on, once a second."""
        if self._outgoing is not None:
            self._outgoing.report(status)

    def checkpointed(self, cpu_seconds: float) -> None:
        """The job could be continued from here if it were killed now.

        ``cpu_seconds`` is what it has used in all. The client knows a checkpoint by a change of
        that number, so one that equals the last is made a thousandth larger.
        """
        if self._outgoing is not None:
            self._outgoing.checkpointed(cpu_seconds)

    def trickle_up(self, variety: str, text: str) -> bool:
        """Send a message to the project's server. False: the last one is still on its way, or
        younger than 1.1 s; ask again.

        Raises `ValueError` for a variety that is no plain name, or more than 256 KiB; `OSError`.
        """
        data = messages.trickle(variety, text)
        return self._outgoing is None or self._outgoing.trickle(data)

    def upload(self, logical_name: str) -> None:
        """Upload an output file now; `Uploaded` tells the end.

        It must be one that the client links, not one that it copies: only those it finds before
        the job has ended. Raises `ValueError` for what is no file's name, and `OSError`.
        """
        if self._outgoing is not None:
            self._outgoing.upload(logical_name)

    def web_address(self, url: str) -> None:
        """Where a browser shows the job; the client hands it to its manager. `ValueError` for
        blanks, markup, or more than 255 bytes.
        """
        text = messages.web_address(url)
        if self._outgoing is not None:
            self._outgoing.reply("web", text)

    def remote_desktop(self, address: str) -> None:
        """``host:port`` of the job's screen; as `web_address`."""
        text = messages.remote_desktop(address)
        if self._outgoing is not None:
            self._outgoing.reply("desktop", text)

    def status_file(self, *, cpu_seconds: float, elapsed_seconds: float,
                    fraction_done: float) -> None:
        """Write ``graphics_status.xml`` for a graphics program; raises `OSError`."""
        heard = self._incoming
        state = GraphicsState() if heard is None else GraphicsState(
            no_heartbeat=heard.gone, suspended=heard.suspended, quit_request=heard.quit,
            abort_request=heard.abort, network_suspended=heard.network is False)
        files.write_graphics(self._directory, state, updated_time=time.time(),
                             cpu_seconds=cpu_seconds, elapsed_seconds=elapsed_seconds,
                             fraction_done=fraction_done)

    # -- the end -------------------------------------------------------------------------------

    def finish(self, code: int, message: str = "", notice: bool = False) -> None:
        """The job has ended; exit with ``code`` after that, at once.

        Waits at most 2 s for the client to take the last status and the last trickle. ``message``
        (one line) goes to the client's event log, as a notice to the volunteer if wanted. Raises
        `OSError` when the file cannot be made: exit with another code than 0 then, or the client
        starts the job again.
        """
        if self._outgoing is not None:
            self._outgoing.end(FINISH_WAIT, finished=code == 0)
        files.write_finish(self._directory, code, message, notice=notice)

    def temporary_exit(self, seconds: float, reason: str, notice: bool = False) -> None:
        """Be started again after some time (0 to 86400 s); exit with 0 after that, at once.

        The client rounds up to its next minute, and ends a job after 101 of these without a
        checkpoint. ``reason`` is shown to the volunteer. Raises `OSError`.
        """
        if self._outgoing is not None:
            self._outgoing.send_last()
        files.write_temporary_exit(self._directory, seconds, reason, notice=notice)

    def close(self) -> None:
        """Leave the last status, stop the thread, give the slot back; a second time is fine."""
        if self._closed.is_set():
            return
        self._closed.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_WAIT)
        if self._outgoing is not None:
            self._outgoing.send_last()
            self._outgoing.abandon()
        # While a delivery hangs its thread may still touch the channels: then they, and the lock
        # that keeps another instance from them, end with the process.
        if thread is None or thread is threading.current_thread() or not thread.is_alive():
            _close(self._channels, self._slot_lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _read(directory: Path) -> InitData | None:
    try:
        return initdata.read(directory / initdata.FILE)
    except FileNotFoundError:
        return None
    except (OSError, InitDataInvalid) as error:
        _log.warning("no client is assumed: %s", error)
        return None


def _close(channels: Channels | None, lock: SlotLock | None) -> None:
    if channels is not None:
        channels.close()
    if lock is not None:
        lock.release()
