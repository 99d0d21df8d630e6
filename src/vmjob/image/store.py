"""Where images are: found, verified before they are used, built once, removed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmjob.errors import (
    HomeUnusable,
    HostDiskFull,
    ImageBuildFailed,
    ImageCorrupt,
    ImageMissing,
    ImageOutdated,
)
from vmjob.guest.agent.wire import OLDEST_PROTOCOL, PROTOCOL_VERSION
from vmjob.home import Home, locked, remove_tree
from vmjob.host import durable
from vmjob.host.seal import read_seal, seal_of, write_seal
from vmjob.image import manifest
from vmjob.image.manifest import Manifest
from vmjob.image.recipe import Recipe, check_image_name

if TYPE_CHECKING:
    from vmjob.image.build import Progress

__all__ = ["Image", "ImageStore"]

_BUILDING = ".building-"
#: What the names of images begin with whose files are elsewhere.
ADOPTED = "adopted-"
_REPLACED = ".replaced-"
_REMOVED = ".removed-"


@dataclass(frozen=True)
class Image:
    """An image in the store. Its files are only ever read."""

    name: str
    directory: Path
    manifest: Manifest

    @property
    def kernel(self) -> Path:
        return self._part("kernel")

    @property
    def initrd(self) -> Path:
        return self._part("initrd")

    @property
    def root(self) -> Path:
        return self._part("root")

    @property
    def scratch(self) -> Path:
        return self._part("scratch")

    @property
    def loader(self) -> Path | None:
        """None for an image that was built before there was one."""
        return self._part("loader") if "loader" in self.manifest.parts else None

    @property
    def digest(self) -> str:
        """Hash of all its parts; another one means another image."""
        parts = ((name, part.sha256) for name, part in sorted(self.manifest.parts.items()))
        return hashlib.sha256(repr(list(parts)).encode()).hexdigest()

    def _part(self, name: str) -> Path:
        return self.directory / self.manifest.parts[name].file


class ImageStore:
    """The images of one home."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def get(self, name: str) -> Image:
        """An image by name, not verified; raises `ImageMissing` or `ImageCorrupt`."""
        directory = self._home.images / check_image_name(name)
        if not directory.is_dir():
            raise ImageMissing(f"there is no image {name!r}")
        return Image(name, directory, manifest.read(directory))

    def list(self) -> list[Image]:
        """All images that can be read, by name."""
        found = []
        for directory in sorted(self._home.images.iterdir()):
            if not directory.name.startswith("."):
                with contextlib.suppress(ImageCorrupt):
                    found.append(Image(directory.name, directory, manifest.read(directory)))
        return found

    def verify(self, name: str) -> Image:
        """Read every part and compare its checksum; raises `ImageCorrupt` naming the part."""
        image = self.get(name)
        for part_name, part in image.manifest.parts.items():
            path = image.directory / part.file
            try:
                size = path.stat().st_size
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise ImageCorrupt(f"image {name!r}: its {part_name} cannot be read: "
                                   f"{error.strerror}", image=name, part=part_name) from error
            if size != part.size:
                raise ImageCorrupt(f"image {name!r}: its {part_name} has {size} bytes instead of "
                                   f"{part.size}", image=name, part=part_name)
            if digest != part.sha256:
                raise ImageCorrupt(f"image {name!r}: its {part_name} was changed (checksum "
                                   f"{digest[:12]} instead of {part.sha256[:12]})", image=name,
                                   part=part_name)
        return image

    def verified(self, name: str) -> Image:
        """An image that was verified since this computer started and was not touched since.

        Costs a full read the first time, then a look at each file's size and times. Raises also
        `ImageOutdated` for one whose agent this vmjob cannot talk to.
        """
        image = self.get(name)
        if not OLDEST_PROTOCOL <= image.manifest.agent_protocol <= PROTOCOL_VERSION:
            raise ImageOutdated(f"image {name!r} has an agent of protocol "
                                f"{image.manifest.agent_protocol}; this vmjob speaks "
                                f"{OLDEST_PROTOCOL} to {PROTOCOL_VERSION}")
        seal = _seal(image)
        path = self._home.cache / f"verified-{name}.json"
        if read_seal(path) != seal:
            self.verify(name)
            write_seal(path, seal)
        return image

    def current(self, recipe: Recipe) -> Image | None:
        """The image of this name when it was made from exactly this recipe and this vmjob."""
        with contextlib.suppress(ImageMissing, ImageCorrupt):
            image = self.get(recipe.name)
            if image.manifest.recipe_digest == recipe.digest():
                return image
        return None

    def ensure(self, recipe: Recipe, progress: Progress) -> Image:
        """The image of this name if there is a usable one, else a new one.

        One that another version of vmjob made is usable as long as its agent can be talked to.
        When several processes ask at once, one builds and the others wait.
        """

        def usable() -> Image | None:
            with contextlib.suppress(ImageMissing):
                image = self.get(recipe.name)
                if OLDEST_PROTOCOL <= image.manifest.agent_protocol <= PROTOCOL_VERSION:
                    return image
            return None

        found = usable()
        if found is None:
            with self._building(recipe.name):
                found = usable() or self._build(recipe, progress)
        return found

    def build(self, recipe: Recipe, progress: Progress) -> Image:
        """Build anew, replacing an image of the same name once the new one is whole."""
        with self._building(recipe.name):
            return self._build(recipe, progress)

    def adopt(self, described: Path, find: Callable[[str], Path]) -> Image:
        """An image whose files are elsewhere, and stay there: nothing is copied.

        ``described``: its manifest; ``find``: where a part of it is, by the file's name. It is
        known here by a name made of what it is. What was adopted earlier and is not there any more
        is forgotten. Raises `ImageCorrupt` or `ImageMissing`, and `HostDiskFull` or `HomeUnusable`
        for what is no fault of the image; it is not verified yet.
        """
        made = manifest.load(described)
        files = {part.file: find(part.file).absolute() for part in made.parts.values()}
        for file, path in files.items():
            if not path.is_file():
                raise ImageMissing(f"the image {made.name!r} lacks its file {file!r}",
                                   advice="Package the application version again.")
        # Two applications may have one image under different names; each has its own links.
        mark = repr((Image("", described.parent, made).digest, sorted(map(str, files.values()))))
        name = ADOPTED + hashlib.sha256(mark.encode()).hexdigest()[:16]
        target = self._home.images / name
        with self._building(name):
            self._forget_lost()
            if {file: _link(target / file) for file in files} != files:
                remove_tree(target)
                beside = self._home.images / f"{_BUILDING}{name}"
                remove_tree(beside)
                try:
                    beside.mkdir()
                    manifest.write(beside, made)
                    for file, path in files.items():
                        (beside / file).symlink_to(path)
                    beside.rename(target)
                except OSError as error:  # the image may be as good as ever
                    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                    raise (HostDiskFull if full else HomeUnusable)(
                        f"cannot keep the image in {self._home.images}: "
                        f"{error.strerror}") from error
        return Image(name, target, made)

    def remove(self, name: str) -> None:
        """Remove an image; machines that run from it keep their open files."""
        directory = self._home.images / check_image_name(name)
        if not directory.exists():
            raise ImageMissing(f"there is no image {name!r}")
        with self._building(name):
            self._discard(directory)
            (self._home.cache / f"verified-{name}.json").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Finish removals that were cut off."""
        for directory in self._home.images.glob(f"{_REMOVED}*"):
            remove_tree(directory)

    # -- inside ----------------------------------------------------------------------------------

    def _forget_lost(self) -> None:
        """Remove what was adopted and whose files have gone since, with their application."""
        for image in self.list():
            if image.name.startswith(ADOPTED) and not image.root.exists():
                remove_tree(image.directory)
                (self._home.cache / f"verified-{image.name}.json").unlink(missing_ok=True)

    def _building(self, name: str) -> contextlib.AbstractContextManager[None]:
        return locked(self._home.locks / f"image-{name}", wait=True, what=f"image {name!r}")

    def _build(self, recipe: Recipe, progress: Progress) -> Image:
        """Build beside, make durable, rename into place. The name's lock is held."""
        from vmjob.image.build import build  # not for those who only run jobs

        beside = self._home.images / f"{_BUILDING}{recipe.name}"
        target = self._home.images / recipe.name
        aside = target.with_name(f"{_REPLACED}{recipe.name}")
        if aside.exists() and not target.exists():
            aside.rename(target)  # an earlier replacement was cut off between its two steps
        self.sweep()
        remove_tree(beside)
        remove_tree(aside)
        try:
            # mmdebstrap without root works as another user, who must be able to pass through.
            beside.mkdir(mode=0o755)
            made = build(recipe, beside, progress)
            for path in beside.iterdir():
                durable.sync(path)
            durable.sync(beside)
            # The old one is only moved aside until the new one is in place.
            if target.exists():
                target.rename(aside)
            beside.rename(target)
            durable.sync(self._home.images)
            remove_tree(aside)
        except OSError as error:
            remove_tree(beside)
            raise ImageBuildFailed(f"cannot write the image in {self._home.images}: "
                                   f"{error.strerror}") from error
        except BaseException:
            remove_tree(beside)
            raise
        return Image(recipe.name, target, made)

    def _discard(self, directory: Path) -> None:
        # Not by the name of one that is replaced: that one comes back when its successor does not.
        remove_tree(directory.with_name(f"{_REPLACED}{directory.name}"))
        aside = directory.with_name(f"{_REMOVED}{directory.name}-{os.urandom(4).hex()}")
        directory.rename(aside)
        remove_tree(aside)


def _link(path: Path) -> Path | None:
    """Where a symbolic link leads; None where there is none."""
    try:
        return path.readlink()
    except OSError:
        return None


def _seal(image: Image) -> dict[str, object]:
    try:
        return seal_of((image.directory / part.file, part.sha256)
                       for part in image.manifest.parts.values())
    except OSError as error:
        raise ImageCorrupt(f"image {image.name!r}: {error.filename} cannot be read: "
                           f"{error.strerror}", image=image.name) from error
