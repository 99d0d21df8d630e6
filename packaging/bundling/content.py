"""A tree of files in memory, and its archive: the same files always give the same bytes."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["File", "Tree", "archive", "read"]


@dataclass(frozen=True)
class File:
    """What is in a bundle's file."""

    data: bytes
    executable: bool = False


#: Path in the bundle -> file.
Tree = dict[str, File]


def read(path: Path, *, executable: bool = False) -> File:
    return File(path.read_bytes(), executable)


def archive(tree: Tree, mtime: int) -> bytes:
    """The tree as tar.gz: sorted, owned by root, every file of the time ``mtime``.

    One time for all, because it tells a QEMU from another (`vmjob.machine.qemu.programs.identity`).
    """
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, file in sorted(tree.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(file.data), mtime
            info.mode = 0o755 if file.executable else 0o644
            info.uname = info.gname = "root"
            tar.addfile(info, io.BytesIO(file.data))
    return gzip.compress(plain.getvalue(), compresslevel=9, mtime=0)
