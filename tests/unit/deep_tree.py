"""Trees that are deeper than a path can name."""

from __future__ import annotations

import os
from pathlib import Path


def deepen(top: Path, levels: int) -> None:
    """Make directories in directories, all named ``d``, by descriptors; a file in the last."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd))
    os.close(fd)
