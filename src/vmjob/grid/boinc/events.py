"""What the client tells an app, as `Runtime.listen` delivers it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmjob.grid.boinc.initdata import InitData

__all__ = ["Abort", "ClientGone", "Event", "Memory", "Network", "Quit", "Reread", "Resume",
           "Suspend", "TrickleDown", "Uploaded"]


@dataclass(frozen=True, slots=True)
class Suspend:
    """Stand still, and keep the memory. Under CPU throttling this comes every few seconds."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on."""


@dataclass(frozen=True, slots=True)
class Quit:
    """Leave, to be started again in this slot later; the client kills after 60 s."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Leave for good, at once; nothing of the job is wanted any more."""


@dataclass(frozen=True, slots=True)
class Reread:
    """``init_data.xml`` has changed, in practice the preferences or the proxy."""

    init: InitData


@dataclass(frozen=True, slots=True)
class Network:
    """Whether the app may use the network. Unknown until the first one of these."""

    available: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that the client counts as the app's, and that it allows to all apps together.

    None where it did not say.
    """

    used_bytes: int | None
    allowed_bytes: int | None


@dataclass(frozen=True, slots=True)
class TrickleDown:
    """A message from the project's server. Remove the file when it is dealt with.

    One that is still there when the app is started anew is told again.
    """

    path: Path


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The end of an upload that `Runtime.upload` asked for; 0 is success, others BOINC's errors."""

    name: str
    status: int


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The client has ended without a word: leave at once, another one may start us again."""


Event = (Suspend | Resume | Quit | Abort | Reread | Network | Memory | TrickleDown | Uploaded
         | ClientGone)
