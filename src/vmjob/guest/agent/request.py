"""One request of the host, and the answers to it."""

from __future__ import annotations

import errno
import json
import os
from typing import Any
from urllib.parse import parse_qs

from . import wire

_decoder = json.JSONDecoder()
#: Not `json.dumps`, which looks for circles, of which our answers have none.
_encoder = json.JSONEncoder(check_circular=False)


class Refused(Exception):
    """A request that gets an error for an answer: HTTP status, stable reason, text."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message

    @classmethod
    def from_os(cls, error: OSError) -> Refused:
        """What the kernel said, as an answer."""
        where = f"{os.fsdecode(error.filename)!r}: " if error.filename else ""
        text = where + (error.strerror or str(error))
        if isinstance(error, FileNotFoundError):
            return cls(404, "not-found", text)
        if isinstance(error, PermissionError):
            return cls(403, "denied", text)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return cls(507, "no-space", text)
        return cls(409, "io", text)


class Request:
    """``path`` is what follows ``/v1/``, split; ``query`` its parameters."""

    def __init__(self, method: str, target: str, fields: dict[str, str], body: bytes) -> None:
        path, _, query = target.partition("?")
        self.method = method
        self.path = path.strip("/").split("/")[1:] if path.startswith("/v1/") else []
        self.query = {} if not query else {
            key: values[0] for key, values in
            parse_qs(query, keep_blank_values=True, errors="surrogateescape").items()}
        self.fields = fields
        self.body = body

    @property
    def name(self) -> str:
        """The first part of the path."""
        return self.path[0] if self.path else ""

    def json(self) -> dict[str, Any]:
        """The body as an object; raises `Refused`."""
        try:
            text = self.body.decode()
            # Not `json.loads`: it matches white space by regular expressions, code that a copy of
            # a frozen machine would run, and have translated, for this alone: 10 ms.
            content, end = _decoder.raw_decode(text)
        except (ValueError, RecursionError):
            raise Refused(400, "malformed", "the body is not JSON") from None
        if text[end:].strip():
            raise Refused(400, "malformed", "there is more than one thing in the body")
        if not isinstance(content, dict):
            raise Refused(400, "malformed", "the body is not an object")
        return content

    def required(self, key: str) -> str:
        """A parameter that must be there; raises `Refused`."""
        try:
            return self.query[key]
        except KeyError:
            raise Refused(400, "malformed", f"the request lacks {key!r}") from None


def to_json(content: dict[str, Any]) -> bytes:
    """An object of an answer, as one line."""
    return _encoder.encode(content).encode()


def reply(status: int, content: dict[str, Any]) -> bytes:
    """A whole answer with a JSON body."""
    body = to_json(content)
    fields = {"content-type": "application/json", "content-length": str(len(body))}
    return wire.response_head(status, fields) + body


def refuse(refusal: Refused) -> bytes:
    """A whole answer that says no."""
    return reply(refusal.status, {"error": refusal.reason, "message": refusal.message})
