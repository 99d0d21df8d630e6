"""Recorded words of VirtualBox: `texts.toml`, as objects."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TEXTS", "Text"]


@dataclass(frozen=True)
class Text:
    """``exit``, ``stdout`` and ``stderr`` of one call.

    ``kind``: what it means; ``line``: the words that a user gets.
    """

    name: str
    kind: str
    exit: int
    asked: str = ""
    stdout: str = ""
    stderr: str = ""
    source: str = ""
    line: str = ""


TEXTS = [Text(**each) for each in tomllib.loads(
    Path(__file__).with_name("texts.toml").read_text(encoding="utf-8"))["text"]]
