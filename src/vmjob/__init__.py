"""Run a Linux job in a throw-away virtual machine."""

__version__ = "0.1.0"
