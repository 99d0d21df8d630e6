"""The texts in the channels, built and read; nothing here touches a file.

BOINC reads them by looking for a tag anywhere in the text, so order and unknown tags do not matter,
neither to the client nor here. Readers never raise.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

__all__ = ["Command", "Heartbeat", "Status", "app_status", "commands", "heartbeat", "one_line",
           "outgoing_flags", "remote_desktop", "trickle", "trickle_flags", "upload_status",
           "web_address"]

#: Seconds, bytes: what a hostile or broken caller could make longer than a channel.
_MOST = 1e15
#: Characters of an address: the client keeps 256 bytes.
MAX_ADDRESS = 255
MAX_VARIETY = 200
#: Bytes of a trickle: the client repeats it in each request to the server until it is acknowledged.
MAX_TRICKLE = 256 * 1024

_TAG = re.compile(r"<(\w{1,32}) ?/>", re.ASCII)
_NUMBER = r"\s*([+-]?\d{1,20}(?:\.\d{0,20})?(?:[eE][+-]?\d{1,3})?)"


class Command(Enum):
    """What process control asks for."""

    SUSPEND = "suspend"
    RESUME = "resume"
    QUIT = "quit"
    ABORT = "abort"
    REREAD = "reread_app_info"
    NETWORK_AVAILABLE = "network_available"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Bytes; None where the client did not say."""

    used_bytes: int | None = None
    allowed_bytes: int | None = None
    network_suspended: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """What the client is told of the job, as totals since its beginning, over all restarts.

    `other_pid`: a process that the client counts as the job's and kills as soon as ours has ended;
    say one only while it is our unreaped child, else a stranger may have its number. None is not
    sent, and the client keeps what it knew. `memory_bytes` is heard by clients from 8.2 on, the
    bytes of the network by those before.
    """

    cpu_seconds: float
    fraction_done: float | None = None
    other_pid: int | None = None
    bytes_sent: float | None = None
    bytes_received: float | None = None
    want_network: bool = False
    memory_bytes: float | None = None


_COMMANDS = {each.value: each for each in Command}


def commands(text: str) -> tuple[Command, ...]:
    """What a text of the process control channel asks for, in its order."""
    return tuple(_COMMANDS[name] for name in _TAG.findall(text) if name in _COMMANDS)


def heartbeat(text: str) -> Heartbeat | None:
    """None for what is no heartbeat."""
    if not _has(text, "heartbeat"):
        return None
    return Heartbeat(_size(text, "wss"), _size(text, "max_wss"), _has(text, "network_suspended"))


def app_status(status: Status, checkpoint_cpu_seconds: float, first: float = 0.0,
               last: float = 1.0) -> str:
    """The text of the status channel.

    Both CPU times are in it each time: the client sets both to 0 before it reads. They have
    microseconds: it takes any *change* of the second for a checkpoint, and the 7 digits of BOINC's
    own library would hide one after some days. ``first``, ``last``: the part of the whole that this
    job is (``fraction_done_start`` and ``..._end``).
    """
    checkpoint = seconds(checkpoint_cpu_seconds)
    parts = [_element("current_cpu_time", f"{max(seconds(status.cpu_seconds), checkpoint):.6f}"),
             _element("checkpoint_cpu_time", f"{checkpoint:.6f}")]
    if status.fraction_done is not None and math.isfinite(status.fraction_done):
        fraction = first + min(max(status.fraction_done, 0.0), 1.0) * (last - first)
        parts.append(_element("fraction_done", f"{fraction:.9f}"))
    if status.other_pid is not None and 1 < status.other_pid < 1 << 31:
        parts.append(_element("other_pid", str(status.other_pid)))
    for name, value in (("bytes_sent", status.bytes_sent),
                        ("bytes_received", status.bytes_received), ("wss", status.memory_bytes)):
        if value is not None:
            parts.append(_element(name, f"{seconds(value):.0f}"))
    if status.want_network:
        parts.append(_element("want_network", "1"))
    return "".join(parts)


def seconds(value: float) -> float:
    """A number that can be sent: finite, not negative, not longer than a channel."""
    return min(max(value, 0.0), _MOST) if math.isfinite(value) else 0.0


def outgoing_flags(*, trickle: bool, upload: bool) -> str:
    """The text of the trickle-up channel."""
    return "<have_new_trickle_up/>\n" * trickle + "<have_new_upload_file/>\n" * upload


def trickle_flags(text: str) -> tuple[bool, bool]:
    """Of the trickle-down channel: is there a message from the server, the end of an upload."""
    return _has(text, "have_trickle_down"), _has(text, "upload_file_status")


def web_address(url: str) -> str:
    """Raises `ValueError` for what the client could not show."""
    return _element("web_graphics_url", _address(url))


def remote_desktop(address: str) -> str:
    """``host:port``; raises `ValueError` for what the client could not show."""
    return _element("remote_desktop_addr", _address(address))


def upload_status(text: str) -> int | None:
    """What a ``boinc_ufs_`` file says; None for nonsense."""
    found = re.search(r"<status>\s*([+-]?\d{1,9})\b", text, re.ASCII)
    return int(found[1]) if found else None


#: The client copies a trickle between these tags, without any escape, and a server looks for them.
_FORGERY = re.compile(rb"<\s*/?\s*(?:msg_from_host|result_name)\b", re.IGNORECASE)


def trickle(variety: str, text: str) -> bytes:
    """A ``trickle_up.xml``; raises `ValueError` for a variety or a text that cannot be sent."""
    if not variety or len(variety) > MAX_VARIETY or re.search(r"[<>&\x00-\x1f\x7f]", variety):
        raise ValueError("the variety of a trickle is a name without markup, of at most "
                         f"{MAX_VARIETY} characters")
    data = f"{_element('variety', variety)}{text}".encode("utf-8", "replace")
    if len(data) > MAX_TRICKLE:
        raise ValueError(f"a trickle has at most {MAX_TRICKLE} bytes")
    if b"\0" in data:
        raise ValueError("a trickle is text, without zero bytes")
    if _FORGERY.search(data):
        raise ValueError("a trickle that ends its own frame could speak for another job")
    return data


def one_line(text: str, most: int) -> str:
    """``text`` on one line of at most ``most`` bytes in UTF-8, without control characters."""
    text = "".join(c if c.isprintable() else " " for c in text[:4 * most])
    data = " ".join(text.split()).encode("utf-8", "replace")[:most]
    return data.decode("utf-8", "ignore").rstrip()


def _element(name: str, value: str) -> str:
    return f"<{name}>{value}</{name}>\n"


def _has(text: str, name: str) -> bool:
    """``<name/>``, ``<name />``, or ``<name>INT`` with an INT that is not 0."""
    if f"<{name}/>" in text or f"<{name} />" in text:
        return True
    found = re.search(rf"<{name}>\s*([+-]?\d{{1,9}})", text, re.ASCII)
    return found is not None and int(found[1]) != 0


def _size(text: str, name: str) -> int | None:
    found = re.search(rf"<{name}>{_NUMBER}", text, re.ASCII)
    value = float(found[1]) if found else math.inf
    return int(value) if 0.0 <= value <= _MOST else None


def _address(text: str) -> str:
    if not text or len(text.encode("utf-8", "replace")) > MAX_ADDRESS \
            or re.search(r"[<>\s]", text) or not text.isprintable():
        raise ValueError(f"an address has 1 to {MAX_ADDRESS} bytes, no blanks and no markup")
    return text
