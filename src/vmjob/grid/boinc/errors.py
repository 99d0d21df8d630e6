"""Why an app cannot have a slot, or its connection with the client."""

from __future__ import annotations

__all__ = ["ChannelsUnusable", "InitDataInvalid", "SlotTaken", "SlotUnusable"]


class SlotUnusable(Exception):
    """This directory cannot be used as a slot."""


class SlotTaken(SlotUnusable):
    """Another instance of the app holds the slot: leave it, with a temporary exit."""


class ChannelsUnusable(SlotUnusable):
    """The client's shared memory cannot be used."""


class InitDataInvalid(ValueError):
    """A file that is no ``init_data.xml``."""
