"""What to do so that both sides of a folder become the same: decided without touching anything.

A side is a dictionary of names with what they are (`Stamp`). What both sides agreed on at last
tells which of them has changed since. Where both have, the guest's file is the one; but a file
beats its absence, whoever removed it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from vmjob.guest.folders import Stamp

__all__ = ["Pair", "Plan", "make_plan", "same_content"]


class Pair(NamedTuple):
    """What a name was on each side when both were of one mind; None: nothing."""

    host: Stamp | None
    guest: Stamp | None


@dataclass
class Plan:
    """Names, parents before what is in them.

    ``agree``: the same on both sides already. ``forget``: on neither side. ``fetch``: from the
    guest; ``push``: into it. ``drop_host``, ``drop_guest``: to be removed there, children first.
    """

    agree: dict[str, Pair] = field(default_factory=dict)
    forget: list[str] = field(default_factory=list)
    fetch: list[str] = field(default_factory=list)
    push: list[str] = field(default_factory=list)
    drop_host: list[str] = field(default_factory=list)
    drop_guest: list[str] = field(default_factory=list)


def same_content(one: Stamp | None, other: Stamp | None) -> bool:
    """Whether a file is a copy of another, as far as its size, mode and time can tell."""
    if one is None or other is None:
        return one is other
    return one[:4] == other[:4]


def make_plan(agreed: Mapping[str, Pair], host: Mapping[str, Stamp], guest: Mapping[str, Stamp], *,
              into_guest: bool, into_host: Callable[[str], bool],
              changing_host: Collection[str] = (), changing_guest: Collection[str] = ()) -> Plan:
    """What to do; ``into_guest`` and ``into_host(name)`` say what may be changed there.

    What is changing waits until it is whole; a file of the host waits for that of the guest, too.
    """
    plan = Plan()
    nothing = Pair(None, None)
    for name in sorted({*agreed, *host, *guest}):
        before, ours, theirs = agreed.get(name, nothing), host.get(name), guest.get(name)
        comes = into_host(name)
        if comes and name in changing_guest:
            continue
        guest_changed = comes and theirs != before.guest
        host_changed = ours != before.host
        if guest_changed:
            if same_content(ours, theirs):
                _settled(plan, name, ours, theirs)
            elif theirs is not None:
                plan.fetch.append(name)
            elif ours is None or not host_changed:
                (plan.forget if ours is None else plan.drop_host).append(name)
            elif into_guest and name not in changing_host:
                plan.push.append(name)
        elif host_changed and name not in changing_host:
            if comes and same_content(ours, theirs):
                _settled(plan, name, ours, theirs)
            elif not into_guest:
                continue
            elif ours is not None:
                plan.push.append(name)
            elif theirs is not None:
                plan.drop_guest.append(name)
            else:
                plan.forget.append(name)
        elif name in agreed and ours is None and theirs is None:
            plan.forget.append(name)
    plan.drop_host.reverse()
    plan.drop_guest.reverse()
    return plan


def _settled(plan: Plan, name: str, ours: Stamp | None, theirs: Stamp | None) -> None:
    if ours is None:
        plan.forget.append(name)
    else:
        plan.agree[name] = Pair(ours, theirs)
