"""Taking outputs from clients: bounded, resumed where a transfer was cut off, checked by MD5.

The body of an upload is a header of tags, ``<data>`` and a newline, then the file's bytes from
``offset`` on to the end of the body. Files of 8192 bytes or more are preceded by a question how
much of them is here already.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from vmjob.project import signing
from vmjob.project.tags import block, tag

__all__ = ["DONE", "GIVE_UP", "LATER", "Header", "answer", "read_header", "size_answer", "store"]

#: Statuses of an answer: the client takes the file off its list, tries again later, or gives up.
DONE, LATER, GIVE_UP = 0, 1, -1
#: A header has 400 bytes and the signature that the server itself has sent.
MAX_HEADER = 16 << 10
_BLOCK = 1 << 20
_TAG = re.compile(rb"<(\w+)>([^<\0]*)</\1>")
_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Header:
    """What an upload says of itself. ``asks``: it only wants to know what is here of ``name``."""

    name: str
    asks: bool = False
    nbytes: int = 0
    offset: int = 0
    md5: str = ""


def read_header(body: BufferedIOBase, length: int) -> tuple[Header, int] | None:
    """The header and how many bytes follow it; None where there is no sense in it."""
    taken = bytearray()
    while not taken.endswith(b"<data>\n") and len(taken) < min(length, MAX_HEADER):
        line = body.readline(min(MAX_HEADER, length) - len(taken))
        if not line:
            break
        taken += line
    tags = {name.decode(): value.strip().decode("ascii", "replace")
            for name, value in _TAG.findall(bytes(taken))}
    if name := tags.get("get_file_size"):
        return Header(name, asks=True), length - len(taken)
    try:
        header = Header(tags["name"], nbytes=int(float(tags["nbytes"])),
                        offset=int(float(tags["offset"])), md5=tags["md5_cksum"])
    except (KeyError, ValueError, OverflowError):
        return None
    if (not taken.endswith(b"<data>\n") or header.nbytes < 0 or header.offset < 0
            or not _MD5.fullmatch(header.md5)):
        return None
    return header, length - len(taken)


def store(header: Header, body: BufferedIOBase, length: int, path: Path, max_nbytes: int) -> int:
    """Write what comes to ``path``; the status to answer.

    ``length``: bytes that follow the header. More than the header or ``max_nbytes`` allow is never
    written, and a gap is never left.
    """
    if header.nbytes > max_nbytes:
        return GIVE_UP
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "r+b") as file:
        if header.offset > file.seek(0, os.SEEK_END):
            return LATER
        file.seek(header.offset)
        file.truncate()
        left = min(length, header.nbytes - header.offset)
        while left > 0:
            data = body.read(min(_BLOCK, left))
            if not data:
                return LATER
            file.write(data)
            left -= len(data)
        if file.tell() < header.nbytes:
            return LATER
    if signing.md5_of(path) != header.md5:
        path.unlink()  # or the next try would continue what is wrong
        return LATER
    return DONE


def answer(status: int, message: str = "") -> str:
    """What the client is told."""
    return block("data_server_reply", [tag("status", status),
                                       tag("message", message) if message else ""])


def size_answer(size: int) -> str:
    """How much of a file is here, bytes."""
    return block("data_server_reply", [tag("status", DONE), tag("file_size", size)])
