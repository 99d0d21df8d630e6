"""What the client says, made into events. Used by one thread only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from vmjob.grid.boinc import events, files, initdata, messages
from vmjob.grid.boinc.channels import Channel, Channels
from vmjob.grid.boinc.errors import InitDataInvalid
from vmjob.grid.boinc.events import Event
from vmjob.grid.boinc.initdata import InitData
from vmjob.grid.boinc.messages import Command
from vmjob.grid.boinc.watch import ClientWatch

__all__ = ["Incoming"]

#: Looks without a heartbeat, ten a second, after which the client is taken to want us to leave:
#: where it ends while a message of its waits for us, it never sends <quit/>, and kills after 60 s.
#: Looks and not seconds: while a computer sleeps, or we are stopped, nobody is silent.
MOST_SILENT = 200

_log = logging.getLogger(__name__)


class Incoming:
    """``deliver`` is called with each event, and must not raise."""

    def __init__(self, directory: Path, init: InitData, channels: Channels, watch: ClientWatch,
                 deliver: Callable[[Event], None]) -> None:
        self.init = init
        self.suspended = self.quit = self.abort = self.gone = False
        self.network: bool | None = None
        self._directory = directory
        self._channels = channels
        self._watch = watch
        self._deliver = deliver
        self._memory: events.Memory | None = None
        #: Looks since the last sign of life; None: nothing was ever heard.
        self._silent: int | None = None
        #: Files that have been told; the client rewrites one with another time.
        self._told: set[tuple[str, int]] = set()
        # An earlier run may have been told of files, and have ended before it dealt with them.
        self._look_for_trickles = self._look_for_uploads = True

    def poll(self) -> None:
        """Deliver all that is new. Raises only what a broken slot makes it raise; then call again.

        Nothing is taken from the channels once the client has ended: they may be those of another
        instance already, which a new client has started in this slot.
        """
        if self.gone:
            return
        if self._watch.gone():
            self.gone = True
            self._deliver(events.ClientGone())
            return
        if (text := self._channels.get(Channel.PROCESS_CONTROL_REQUEST)) is not None:
            self._silent = 0  # it may be about to end before its first heartbeat
            for command in messages.commands(text):
                self._control(command)
        if (text := self._channels.get(Channel.HEARTBEAT)) is not None:
            self._silent = 0
            self._heartbeat(text)
        elif self._silent is not None:
            self._silent += 1
            if self._silent == MOST_SILENT and not self.quit:
                self._control(Command.QUIT)
        if (text := self._channels.get(Channel.TRICKLE_DOWN)) is not None:
            trickle, upload = messages.trickle_flags(text)
            self._look_for_trickles |= trickle
            self._look_for_uploads |= upload
        self._files()

    def _control(self, command: Command) -> None:
        match command:
            case Command.SUSPEND:
                self.suspended = True
                self._deliver(events.Suspend())
            case Command.RESUME:
                self.suspended = False
                self._deliver(events.Resume())
            case Command.QUIT:
                self.quit = True
                self._deliver(events.Quit())
            case Command.ABORT:
                self.abort = True
                self._deliver(events.Abort())
            case Command.REREAD:
                self._reread()
            case Command.NETWORK_AVAILABLE:
                self._set_network(available=True)

    def _reread(self) -> None:
        try:
            self.init = initdata.read(self._directory / initdata.FILE)
        except (OSError, InitDataInvalid) as error:
            _log.warning("the client's new %s cannot be read, the old one stays: %s",
                         initdata.FILE, error)
        else:
            self._deliver(events.Reread(self.init))

    def _heartbeat(self, text: str) -> None:
        heartbeat = messages.heartbeat(text)
        if heartbeat is None:
            return
        self._set_network(available=not heartbeat.network_suspended)
        memory = events.Memory(heartbeat.used_bytes, heartbeat.allowed_bytes)
        if memory != self._memory and memory != events.Memory(None, None):
            self._memory = memory
            self._deliver(memory)

    def _set_network(self, *, available: bool) -> None:
        if available != self.network:
            self.network = available
            self._deliver(events.Network(available))

    def _files(self) -> None:
        if self._look_for_trickles:
            # Forgotten only after the look: one that fails is repeated.
            for path, stamp in files.incoming_trickles(self._directory):
                if self._is_new(path.name, stamp):
                    self._deliver(events.TrickleDown(path))
            self._look_for_trickles = False
        if self._look_for_uploads:
            for name, status, stamp in files.upload_results(self._directory):
                if self._is_new(files.UPLOAD_STATUS + name, stamp):
                    self._deliver(events.Uploaded(name, status))
            self._look_for_uploads = False

    def _is_new(self, name: str, stamp: int) -> bool:
        if (name, stamp) in self._told:
            return False
        if len(self._told) >= 2 * files.MAX_NAMES:
            self._told.clear()  # told twice is better than without bound
        self._told.add((name, stamp))
        return True
