"""A project's server for development, on loopback: see `DevServer`."""

from vmjob.project.devserver.records import Event, Result, Trickle
from vmjob.project.devserver.server import DevServer

__all__ = ["DevServer", "Event", "Result", "Trickle"]
