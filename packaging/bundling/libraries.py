"""Which shared libraries a program needs, and without what they can be carried."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bundling.content import File, Tree

__all__ = ["LOADER", "closure", "parse_list", "stripped", "libraries_of"]

#: The program that loads others. It is carried along with the C library, of which it is a part: so
#: nothing depends on the libraries of the computer where the bundle runs.
LOADER = Path("/lib64/ld-linux-x86-64.so.2")
#: What glibc loads by name when a thread is cancelled.
BY_NAME = ("libgcc_s.so.1",)
#: Seconds for the loader to list a program's libraries, and for strip.
DEADLINE = 60.0


def parse_list(text: str) -> dict[str, Path]:
    """Output of ``ld.so --list``: name that is asked for -> file that answers to it.

    Raises `ValueError` naming a library that is missing.
    """
    if missing := re.findall(r"^\s*(\S+) => not found", text, re.MULTILINE):
        raise ValueError(f"libraries are missing here: {', '.join(missing)}")
    return {name: Path(path)
            for name, path in re.findall(r"^\s*(\S+) => (/\S+) \(0x", text, re.MULTILINE)}


def closure(programs: Iterable[Path]) -> dict[str, Path]:
    """All libraries that some programs and modules need, themselves and through others."""
    found: dict[str, Path] = {}
    for program in programs:
        listed = subprocess.run([LOADER, "--list", program], capture_output=True, text=True,
                                check=True, timeout=DEADLINE).stdout
        found |= parse_list(listed)
    if found:
        beside = found["libc.so.6"].parent
        found |= {name: beside / name for name in BY_NAME if (beside / name).exists()}
    return found


def stripped(path: Path) -> bytes:
    """A program or library without what only debuggers need."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / path.name
        subprocess.run(["strip", "--strip-unneeded", "-o", target, path], check=True,
                       timeout=DEADLINE)
        return target.read_bytes()


def libraries_of(programs: Iterable[Path]) -> tuple[Tree, set[Path]]:
    """``lib/`` of a bundle, with the loader; and the files of this system that it was made of."""
    found = closure(programs)
    tree: Tree = {f"lib/{name}": File(stripped(path)) for name, path in found.items()}
    tree[f"lib/{LOADER.name}"] = File(stripped(LOADER.resolve()), executable=True)
    return tree, {*found.values(), LOADER}
