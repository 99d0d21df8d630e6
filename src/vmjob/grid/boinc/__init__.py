"""The BOINC client's side of an app, in plain Python: no library of BOINC's, no compiler.

    with Runtime.open() as runtime:
        runtime.listen(queue.put)
        runtime.report(Status(cpu_seconds=1.5, fraction_done=0.25))
        ...
        runtime.finish(0)

It needs the standard library only and nothing else of vmjob, so it may be used on its own; the page
``docs/reference/boinc-runtime.md`` tells how, and what of it was proved against what.
"""

from __future__ import annotations

from vmjob.grid.boinc import exitcodes
from vmjob.grid.boinc.channels import Channel, Channels, open_channels
from vmjob.grid.boinc.errors import ChannelsUnusable, InitDataInvalid, SlotTaken, SlotUnusable
from vmjob.grid.boinc.events import (
    Abort,
    ClientGone,
    Event,
    Memory,
    Network,
    Quit,
    Reread,
    Resume,
    Suspend,
    TrickleDown,
    Uploaded,
)
from vmjob.grid.boinc.files import resolve
from vmjob.grid.boinc.initdata import GlobalPreferences, Host, InitData, Proxy
from vmjob.grid.boinc.lockfile import SlotLock
from vmjob.grid.boinc.messages import Status
from vmjob.grid.boinc.process import clean_environment, close_inherited
from vmjob.grid.boinc.runtime import Runtime

__all__ = [
    "Runtime", "Status",
    # what the client tells
    "Event", "Suspend", "Resume", "Quit", "Abort", "ClientGone", "Reread", "Network", "Memory",
    "TrickleDown", "Uploaded",
    "InitData", "GlobalPreferences", "Host", "Proxy",
    # why there is no connection
    "SlotUnusable", "SlotTaken", "ChannelsUnusable", "InitDataInvalid",
    # what an app does first, and how it finds its files
    "close_inherited", "clean_environment", "resolve",
    "exitcodes",
    # the parts
    "Channel", "Channels", "open_channels", "SlotLock",
]
