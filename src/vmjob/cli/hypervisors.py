"""Options of every command that makes a machine: on which hypervisor, and how it runs the code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["ACCELERATORS", "HYPERVISORS", "hypervisor_options"]

F = TypeVar("F", bound=Callable[..., Any])

#: Those of `vmjob.shape`, which takes long to import.
HYPERVISORS = ("qemu", "virtualbox")
ACCELERATORS = ("kvm", "hvf", "whpx", "tcg", "hm", "interpreter")


def hypervisor_options(command: F) -> F:
    """``--hypervisor`` and ``--accel``."""
    accel = click.option(
        "--accel", type=click.Choice(["auto", *ACCELERATORS]), default="auto", show_default=True,
        help="auto: the fastest that a guest boot has proved to work. hm, interpreter: "
             "VirtualBox's.")
    hypervisor = click.option(
        "--hypervisor", type=click.Choice(["auto", *HYPERVISORS]), default="auto",
        show_default=True, help="auto: the one with the fastest accelerator, QEMU first.")
    return hypervisor(accel(command))
