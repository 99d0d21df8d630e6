"""Further names for files that never change: of images, of disks that a user brought."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from vmjob.errors import CheckpointUnusable
from vmjob.machine.contract import ATTACHED_PARTS, Attached

__all__ = ["attached_in", "link_attached", "link_or_copy"]


def link_or_copy(source: Path, target: Path) -> None:
    """Another name for a file; a copy where that cannot be. What is there already stays."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        beside = target.with_name(f"{target.name}.new")
        try:
            shutil.copyfile(source, beside)
            beside.rename(target)
        finally:
            beside.unlink(missing_ok=True)


def link_attached(attached: Attached | None, directory: Path) -> dict[str, str]:
    """Link what a machine has of its user's besides; the names by its fields, for a checkpoint."""
    names = {}
    for part, path in (attached.parts() if attached else {}).items():
        names[part] = f"attached-{part}"
        link_or_copy(path.resolve(), directory / names[part])
    return names


def attached_in(directory: Path, names: Mapping[str, str] | None) -> Attached | None:
    """What was linked; raises `CheckpointUnusable` for names that nobody has given."""
    if not names:
        return None
    if "disk" not in names or not set(names) <= set(ATTACHED_PARTS):
        raise CheckpointUnusable("a checkpoint with disks that no machine has")
    return Attached(**{part: directory / name for part, name in names.items()})
