"""An image that nothing boots."""

from __future__ import annotations

from vmjob.home import Home
from vmjob.image import manifest
from vmjob.image.manifest import Manifest, Part
from vmjob.image.store import Image, ImageStore


def small_image(home: Home) -> Image:
    """The image ``lab``, of a few small files."""
    directory = home.images / "lab"
    directory.mkdir()
    parts = {}
    for name in manifest.PART_NAMES:
        (directory / f"{name}.bin").write_text(name)
        parts[name] = Part(f"{name}.bin", len(name), "ab" * 32)
    manifest.write(directory, Manifest(manifest.FORMAT, "lab", "bookworm", (), "d", "2026", 1, "6",
                                       parts, (), 22))
    return ImageStore(home).get("lab")
