"""What the agent tells of a folder, believed only as far as it can be checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vmjob.errors import AgentProtocol
from vmjob.guest.agent.folders import MAX_TOLD, Stamp, check_path

__all__ = ["News", "Stamp", "parse_news", "split_names"]

#: Bytes of names in one request; JSON's brackets come on top.
NAMES_BYTES = 40 * 1024
#: Names in one request.
NAMES = 500
#: Longest wait that a guest may ask for, seconds.
MOST_SECONDS = 600.0


@dataclass(frozen=True)
class News:
    """What changed in a folder between version ``since`` and ``version``.

    ``since`` is 0 when the agent begins anew: then it tells all there is. ``entries``: names and
    what they are now; ``gone``: names that are no more. ``more``: this is not all.
    ``looks``: how often it was looked through; before the first time is over, a name that is not
    told means nothing. ``looking``: it is being looked through. ``over``: it has more entries than
    are looked at; ``left_out`` of them are of a kind or name that is never told. There can be
    something new to ask for in ``again`` seconds.
    """

    since: int
    version: int
    entries: dict[str, Stamp]
    gone: list[str]
    more: bool
    looks: int
    looking: bool
    over: bool
    left_out: int
    again: float


def parse_news(said: dict[str, Any], asked: int) -> News:
    """An answer of the agent; raises `AgentProtocol`."""
    try:
        since, version, looks, left_out = (
            _number(said[key]) for key in ("since", "version", "looks", "left_out"))
        if since not in (0, asked) or version < since or len(said["entries"]) > MAX_TOLD:
            raise ValueError("a version that cannot be")
        entries = {check_path(name): _stamp(*rest) for name, *rest in said["entries"]}
        gone = [check_path(name) for name in said["gone"]]
        more, looking, over = (said[key] is True for key in ("more", "looking", "over"))
        if more and version == since:
            raise ValueError("more without end")
        again = float(said["again_seconds"])
        if not 0 <= again < float("inf"):
            raise ValueError("a wait that cannot be")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, UnicodeError) as error:
        raise AgentProtocol(f"an answer about a folder that cannot be: {error}") from None
    return News(since, version, entries, gone, more, looks, looking, over, left_out,
                min(again, MOST_SECONDS))


def split_names(stamps: Iterable[tuple[str, Stamp]]) -> Iterator[list[list[Any]]]:
    """Names with what they are, as requests hold them: in lists of a bounded size."""
    batch: list[list[Any]] = []
    room = NAMES_BYTES
    for name, found in stamps:
        one = [name, *found]
        size = len(json.dumps(one)) + 2
        if batch and (size > room or len(batch) == NAMES):
            yield batch
            batch, room = [], NAMES_BYTES
        batch.append(one)
        room -= size
    if batch:
        yield batch


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a number that cannot be")
    return value


def _stamp(kind: object, size: object, mode: object, moment: object, inode: object) -> Stamp:
    if kind not in ("f", "d", "?"):
        raise ValueError("an entry of no known kind")
    return str(kind), _number(size), _number(mode) & 0o777, _number(moment), _number(inode)
