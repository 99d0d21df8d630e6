"""What a simulated machine can run: programs whose whole state is a few plain values.

    hash-chain N EVERY [FILE]   the SHA-256 of the SHA-256 of... N times, beginning with 32 zero
                                bytes; prints it every EVERY steps and at the end, and appends the
                                same to FILE in the job's directory. With N = 0 the end is when
                                it is to print and there is something of the name ``stop``
    count N                     prints 1 to N, one per line
    report N                    says ``fraction_done`` N times, as messages
    cat                         prints its input
    wait                        does nothing until it is ended by a signal
    fail CODE                   exits with that code
    true                        exits with 0
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LONGEST_LINE", "PROGRAMS", "World", "hash_chain"]

#: Bytes that one step of a program prints at most.
LONGEST_LINE = 128
#: What a chain begins with.
FIRST_HASH = bytes(32).hex()


@dataclass(frozen=True)
class World:
    """What a program can reach: its directory, and the host's ear."""

    workdir: str
    tell: Callable[[str], None]


#: One step: arguments and state (JSON-compatible, {} at first, changed); what is printed, and the
#: exit code at the end. Raises `ValueError` for arguments that make no sense.
Step = Callable[[list[str], dict[str, Any], World], tuple[bytes, int | None]]


def hash_chain(steps: int, every: int) -> bytes:
    """What the program of this name prints in all."""
    state: dict[str, Any] = {}
    lines: list[bytes] = []
    code: int | None = None
    while code is None:
        line, code = _hash_chain([str(steps), str(every)], state, World("", lambda text: None))
        lines.append(line)
    return b"".join(lines)


def _hash_chain(args: list[str], state: dict[str, Any], world: World) -> tuple[bytes, int | None]:
    steps, every = int(args[0]), int(args[1])
    state["step"] = state.get("step", 0) + 1
    known = bytes.fromhex(state.get("hash", FIRST_HASH))
    state["hash"] = hashlib.sha256(known).hexdigest()
    if steps:
        over = state["step"] >= steps
    else:
        over = state["step"] % every == 0 and Path(world.workdir, "stop").exists()
    if not over and state["step"] % every:
        return b"", None
    line = f"{state['hash']}\n".encode()
    if len(args) > 2:
        with Path(world.workdir, args[2]).open("ab") as file:
            file.write(line)
    return line, 0 if over else None


def _count(args: list[str], state: dict[str, Any], world: World) -> tuple[bytes, int | None]:
    state["at"] = state.get("at", 0) + 1
    if state["at"] > int(args[0]):
        return b"", 0
    return b"%d\n" % state["at"], None


def _report(args: list[str], state: dict[str, Any], world: World) -> tuple[bytes, int | None]:
    state["at"] = state.get("at", 0) + 1
    if state["at"] > int(args[0]):
        return b"", 0
    world.tell(f"fraction_done {state['at'] / int(args[0])}")
    return b"", None


def _wait(args: list[str], state: dict[str, Any], world: World) -> tuple[bytes, int | None]:
    return b"", None


def _fail(args: list[str], state: dict[str, Any], world: World) -> tuple[bytes, int | None]:
    return b"", int(args[0])


def _true(args: list[str], state: dict[str, Any], world: World) -> tuple[bytes, int | None]:
    return b"", 0


#: ``cat`` is what `_wait` is: its input comes, and ends it, from outside.
PROGRAMS: dict[str, Step] = {
    "hash-chain": _hash_chain, "count": _count, "report": _report, "cat": _wait, "wait": _wait,
    "fail": _fail, "true": _true}
