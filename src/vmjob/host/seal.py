"""Seals: what is equal as long as nobody touched some files since this computer started.

A file whose checksum was right under a seal need not be read again while the seal is unbroken.
Writing to a file changes its times, and ``ctime`` cannot be set back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from vmjob.host.facts import boot_id

__all__ = ["read_seal", "seal_of", "write_seal"]


def seal_of(files: Iterable[tuple[Path, str]]) -> dict[str, object]:
    """The seal of files with their expected checksums; raises `OSError` naming one that is gone."""
    parts: dict[str, object] = {}
    for path, checksum in files:
        facts = path.stat()
        parts[path.name] = [checksum, facts.st_ino, facts.st_size, facts.st_mtime_ns,
                            facts.st_ctime_ns]
    return {"boot": boot_id(), "parts": parts}


def read_seal(path: Path) -> object:
    """A seal that was written earlier; None when there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_seal(path: Path, seal: dict[str, object]) -> None:
    """Keep a seal."""
    temporary = path.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}")
    temporary.write_text(json.dumps(seal), encoding="utf-8")
    temporary.replace(path)
