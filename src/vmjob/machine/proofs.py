"""What was proved about an accelerator, kept for as long as its ground is the same.

A device that opens proves nothing: only a guest that boots does.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from vmjob.home import Home

__all__ = ["Proof", "doubt", "place", "remember", "remembered"]

#: Causes of failed starts that are remembered.
MOST_DOUBTS = 20


@dataclass(frozen=True)
class Proof:
    """Whether an accelerator works, and how that is known; ``seconds`` the probe took."""

    accelerator: str
    works: bool
    why: str
    seconds: float = 0.0


def place(home: Home, accelerator: str) -> Path:
    """Where the proof of an accelerator is kept."""
    return home.cache / f"accelerator-{accelerator}.json"


def remembered(path: Path, ground: str, accelerator: str) -> Proof | None:
    """The proof in a file, if it has the same ground."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["ground"] == ground:
            return Proof(accelerator, bool(content["works"]), str(content["why"]),
                         float(content["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no proof, or a damaged one: prove again
    return None


def remember(path: Path, ground: str, proof: Proof) -> None:
    """Keep a proof."""
    try:
        doubts = json.loads(path.read_text(encoding="utf-8")).get("doubts", [])
    except (OSError, ValueError, AttributeError):
        doubts = []
    _write(path, {"ground": ground, "works": proof.works, "why": proof.why,
                  "seconds": proof.seconds, "doubts": doubts})


def doubt(path: Path, cause: str) -> None:
    """A real start failed with ``cause``: prove the accelerator again, once for each cause."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        doubts = content.get("doubts", [])
        if not content["works"] or cause in doubts:
            return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # it will be proved in any case
    _write(path, {**content, "ground": "doubted", "doubts": [*doubts[-MOST_DOUBTS:], cause]})


def _write(path: Path, content: dict[str, object]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)
