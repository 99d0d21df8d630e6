"""What a keeper and who asks it say to each other: lines of JSON. Pure functions.

    keeper   {"vmjob": 1, "state": "running", "since": 1700000000.0}
    client   {"vmjob": 1, "do": "exec", "with": {"argv": ["cat"], "stdin": true}}
    keeper   {"task": 1}                                   the command's number in the machine
    keeper   {"want": "stdin"}
    client   {"stdin": "aGVsbG8="}                         empty: the end of the input
    keeper   {"out": "stdout", "data": "aGVsbG8="}
    client   {"signal": 2}
    keeper   {"done": {...}}    or    {"error": {...}}     the form of `VmjobError.as_dict`

``attach`` (`Attach`) instead of ``exec`` goes on following a command that a checkpoint had. One
request for each connection. A client that goes away ends what it has asked for.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from vmjob.errors import VmjobError, all_errors

__all__ = ["Attach", "Command", "MAX_LINE", "VERSION", "Request", "WireError", "decode", "encode",
           "error_of", "packed", "pieces", "request_of", "unpacked"]

#: Raise this when an older vmjob would misunderstand what this one says.
VERSION = 1
#: Longest line, bytes: a request with a long command line, a piece of output, a console's end.
MAX_LINE = 1 << 20
#: Bytes of a stream in one line.
PIECE = 64 * 1024


class WireError(Exception):
    """The other side says what cannot be."""


class Request(msgspec.Struct, frozen=True):
    """What a client wants done, and with what."""

    do: str
    arguments: dict[str, Any]


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command to run; see `vmjob.api.AsyncMachine.run`. ``detach``: it goes on without us."""

    argv: list[str]
    env: dict[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    stdin: bool = False
    detach: bool = False


class Attach(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command to follow that was started before; so much of its streams was taken already."""

    task: int
    stdout: int = 0
    stderr: int = 0


def encode(content: Mapping[str, Any]) -> bytes:
    """One line; raises `WireError` when it would be too long, `ValueError` for what is no JSON."""
    # ASCII, so that any file name of Linux passes (as surrogates).
    line = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    if len(line) > MAX_LINE:
        raise WireError(f"a line of {len(line)} bytes where at most {MAX_LINE} are allowed")
    return line


def decode(line: bytes) -> dict[str, Any]:
    """The object of one whole line; raises `WireError`."""
    if not line.endswith(b"\n") or len(line) > MAX_LINE:
        raise WireError("a line that is cut off or too long")
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise WireError("a line that is no JSON") from None
    if not isinstance(content, dict):
        raise WireError("a line that is no object")
    return content


def request_of(content: Mapping[str, Any]) -> Request:
    """A client's first line; raises `WireError`."""
    if content.get("vmjob") != VERSION:
        raise WireError("a request of another version of vmjob")
    do, arguments = content.get("do"), content.get("with", {})
    if not isinstance(do, str) or not isinstance(arguments, dict):
        raise WireError("a request that asks for nothing")
    return Request(do, arguments)


def packed(data: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(data).decode("ascii")


def unpacked(text: object) -> bytes:
    """The reverse of `packed`; raises `WireError`."""
    if not isinstance(text, str):
        raise WireError("data that is no text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise WireError("data that is no base64") from None


def pieces(stream: str, data: bytes) -> Iterator[bytes]:
    """Output of a command as lines."""
    for at in range(0, len(data), PIECE):
        yield encode({"out": stream, "data": packed(data[at:at + PIECE])})


def error_of(said: object) -> VmjobError:
    """The error whose `VmjobError.as_dict` was said; raises `WireError`."""
    if not isinstance(said, dict):
        raise WireError("an error that is none")
    code, message, advice = said.get("code"), said.get("message"), said.get("advice")
    context = said.get("context")
    if not (isinstance(message, str) and isinstance(advice, str) and isinstance(context, dict)):
        raise WireError("an error without words")
    kind = next((each for each in all_errors() if each.code == code), VmjobError)
    error = kind(message, advice=advice)
    error.context = context
    return error
