"""``python -m bundling [wrapper] [qemu]``: builds both, or one, into ``dist/``."""

from __future__ import annotations

import sys
from pathlib import Path

import vmjob
from bundling import emulator, interpreter
from bundling.content import archive

__all__ = ["main"]

PLATFORM = "linux-x86_64"


def main(wanted: list[str]) -> None:
    directory = Path(__file__).parents[2] / "dist"
    directory.mkdir(exist_ok=True)
    for what in wanted or ["wrapper", "qemu"]:
        if what == "wrapper":
            data = interpreter.one_file(interpreter.contents())
            path = directory / f"vmjob-{vmjob.__version__}-{PLATFORM}"
        else:
            tree, package, mtime = emulator.contents()
            data = archive(tree, mtime)
            version = emulator.version_in_name(package.version)
            path = directory / f"vmjob-qemu-{version}-{PLATFORM}.tar.gz"
        draft = path.with_name(f".{path.name}")
        draft.write_bytes(data)
        draft.chmod(0o755 if what == "wrapper" else 0o644)
        draft.replace(path)
        sys.stdout.write(f"{path}  {len(data) / 1e6:.1f} MB\n")


main(sys.argv[1:])
