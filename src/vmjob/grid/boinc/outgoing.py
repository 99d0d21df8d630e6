"""What an app says to the client: one channel at a time, as soon as it is empty. Any thread."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from vmjob.grid.boinc import files, messages
from vmjob.grid.boinc.channels import Channel, Channels
from vmjob.grid.boinc.initdata import InitData
from vmjob.grid.boinc.messages import Status, seconds

__all__ = ["Outgoing"]

#: Seconds between statuses, as often as the client looks.
STATUS_PERIOD = 1.0
#: Seconds between trickles: the client names them by the second.
TRICKLE_PERIOD = 1.1
#: CPU seconds by which a checkpoint moves that came without any: the client's files keep six
#: decimals, and nobody minds a thousandth.
CHECKPOINT_STEP = 0.001
#: Seconds between looks whether the client has taken the last word; the memory wakes nobody.
LOOK_PERIOD = 0.02


class Outgoing:
    """One app's words, kept until the client has taken them."""

    def __init__(self, directory: Path, init: InitData, channels: Channels) -> None:
        self._directory = directory
        self._channels = channels
        self._part = (init.fraction_done_start, init.fraction_done_end)
        self._lock = threading.Lock()
        #: One trickle at a time; apart, for the thread that hears the client must not wait for a
        #: disk.
        self._writing = threading.Lock()
        self._status: Status | None = None
        self._checkpoint = self._sent_checkpoint = seconds(init.wu_cpu_time)
        self._next_status = self._next_trickle = 0.0
        self._ended = self._abandoned = False
        self._replies: dict[str, str] = {}
        # The client clears the channels before it starts an app, so what an earlier run asked for
        # may lie there unheard.
        self._trickle = (directory / files.TRICKLE_UP).is_file()
        self._upload = files.pending_upload_requests(directory)

    def report(self, status: Status) -> None:
        with self._lock:
            if not self._ended:
                self._status = status

    def checkpointed(self, cpu_seconds: float) -> None:
        cpu_seconds = seconds(cpu_seconds)
        with self._lock:
            # The client sees only a change, from what it was told last; and the one before this
            # may not have been told yet.
            known = (self._checkpoint, self._sent_checkpoint)
            if any(abs(cpu_seconds - each) < CHECKPOINT_STEP / 2 for each in known):
                cpu_seconds = max(known) + CHECKPOINT_STEP
            self._checkpoint = cpu_seconds
            if self._status is None:
                self._status = Status(cpu_seconds)

    def trickle(self, data: bytes) -> bool:
        with self._writing:
            path, now = self._directory / files.TRICKLE_UP, time.monotonic()
            if self._abandoned or now < self._next_trickle or path.exists():
                return False
            files.write_whole(path, data, durable=True)
            self._next_trickle = now + TRICKLE_PERIOD
            with self._lock:
                self._trickle = True
                self._send_flags()
        return True

    def upload(self, logical_name: str) -> None:
        files.request_upload(self._directory, logical_name)
        with self._lock:
            self._upload = True
            self._send_flags()

    def reply(self, kind: str, text: str) -> None:
        with self._lock:
            self._replies[kind] = text
            self._send_replies()

    def abandon(self) -> None:
        """Say nothing any more: the channels are closed, or their client has ended and another
        instance has them.
        """
        with self._lock:
            self._abandoned = True

    def send(self) -> None:
        """What is due; call it often."""
        with self._lock:
            if not self._ended and time.monotonic() >= self._next_status:
                self._send_status()
            self._send_flags()
            self._send_replies()

    def send_last(self) -> None:
        """Leave a status for the client if there is room, whenever the last one was."""
        with self._lock:
            if not self._ended:
                self._send_status()
            self._send_flags()

    def end(self, wait: float, *, finished: bool) -> bool:
        """Send the last status, and wait for the client to take it; False when it did not.

        No other status is sent after that. ``finished``: all of the work is done.
        """
        with self._lock:
            self._ended = True
            status = self._status
            if status is not None and finished:
                status = Status(status.cpu_seconds, 1.0, bytes_sent=status.bytes_sent,
                                bytes_received=status.bytes_received)
            self._status = status
        until = time.monotonic() + wait
        told = status is None
        while True:
            with self._lock:
                if self._abandoned:
                    return False
                told = told or self._send_status()
                self._send_flags()
                if told and not self._trickle and not self._upload and not any(
                        map(self._channels.is_full, (Channel.APP_STATUS, Channel.TRICKLE_UP))):
                    return True
            if time.monotonic() >= until:
                return False
            time.sleep(LOOK_PERIOD)

    # -- with the lock held --------------------------------------------------------------------

    def _send_status(self) -> bool:
        if self._status is None or self._abandoned:
            return False
        text = messages.app_status(self._status, self._checkpoint, *self._part)
        if not self._channels.put(Channel.APP_STATUS, text):
            return False
        self._sent_checkpoint = self._checkpoint
        self._next_status = time.monotonic() + STATUS_PERIOD
        return True

    def _send_flags(self) -> None:
        if self._abandoned or not (self._trickle or self._upload):
            return
        text = messages.outgoing_flags(trickle=self._trickle, upload=self._upload)
        if self._channels.put(Channel.TRICKLE_UP, text):
            self._trickle = self._upload = False

    def _send_replies(self) -> None:
        # One at a time: a text holds one address.
        if self._abandoned:
            return
        for kind, text in list(self._replies.items()):
            if not self._channels.put(Channel.GRAPHICS_REPLY, text):
                break
            del self._replies[kind]
