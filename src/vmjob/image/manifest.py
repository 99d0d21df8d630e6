"""``manifest.json``: what an image is, and the checksums that tell whether it still is that."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from vmjob.errors import ImageCorrupt

__all__ = ["FILE", "FORMAT", "PART_NAMES", "Manifest", "Package", "Part", "load", "read", "write"]

FILE = "manifest.json"
#: Version of the manifest's own form.
FORMAT = 1
#: A manifest with 500 packages has 50 KB; nothing honest is larger than this.
MAX_SIZE = 4 * 1024 * 1024

PART_NAMES = ("kernel", "initrd", "root", "scratch")
#: What images have since VirtualBox is known: a boot loader.
LATER_PART_NAMES = ("loader",)


_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Part(msgspec.Struct, frozen=True):
    """One file of an image; ``size`` in bytes, ``sha256`` in hexadecimal."""

    file: str
    size: int
    sha256: str


class Package(msgspec.Struct, frozen=True):
    """A Debian package that is in an image."""

    name: str
    version: str
    architecture: str


class Manifest(msgspec.Struct, frozen=True):
    """What an image is. ``created`` is ISO 8601 in UTC; ``total_size`` bytes of all parts.

    ``recipe_digest`` is `Recipe.digest`: equal digests with equal packages give equal parts.
    """

    format: int
    name: str
    suite: str
    requested: tuple[str, ...]
    recipe_digest: str
    created: str
    agent_protocol: int
    kernel_version: str
    parts: dict[str, Part]
    packages: tuple[Package, ...]
    total_size: int


def read(directory: Path) -> Manifest:
    """The manifest of the image in ``directory``; raises `ImageCorrupt` for anything odd."""
    return load(directory / FILE)


def load(path: Path) -> Manifest:
    """A manifest, wherever it is; raises `ImageCorrupt` for anything odd."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise ImageCorrupt(f"cannot read {path}: {error.strerror}") from error
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ImageCorrupt(f"{path} cannot be understood: {error}") from error
    if manifest.format != FORMAT:
        raise ImageCorrupt(f"{path} has format {manifest.format}, this vmjob reads {FORMAT}")
    if set(manifest.parts) - set(LATER_PART_NAMES) != set(PART_NAMES):
        raise ImageCorrupt(f"{path} does not list the parts {', '.join(PART_NAMES)}")
    for part in manifest.parts.values():
        if not _FILE_NAME.fullmatch(part.file) or part.size < 0 \
                or not _SHA256.fullmatch(part.sha256):
            raise ImageCorrupt(f"{path} names a part that cannot be: {part.file[:80]!r}")
    return manifest


def write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, readable by people."""
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (directory / FILE).write_bytes(data + b"\n")
