"""A command's input, handed on piece by piece."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio.to_thread

__all__ = ["in_pieces"]

#: Bytes that are read of a file at once.
PIECE = 1 << 20


def in_pieces(stdin: bytes | str | os.PathLike[str]) -> Callable[[], Coroutine[Any, Any, bytes]]:
    """What returns the next piece, ``b""`` at the end; a path object's file is read as it goes."""
    if isinstance(stdin, os.PathLike):
        file = Path(stdin).open("rb")  # noqa: SIM115 - closed with its last piece

        async def read() -> bytes:
            data = await anyio.to_thread.run_sync(file.read, PIECE)
            if not data:
                file.close()
            return data

        return read
    pieces = iter([stdin.encode() if isinstance(stdin, str) else stdin])

    async def given() -> bytes:
        return next(pieces, b"")

    return given
