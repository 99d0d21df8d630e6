"""What an image is to be made of: the input of a build, and its digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from vmjob.errors import UsageError

__all__ = ["BUILDER_VERSION", "DEFAULT_NAME", "Recipe", "check_image_name"]

#: Raise this when the same recipe gives a different image than before.
BUILDER_VERSION = 4

DEFAULT_NAME = "default"

_IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SUITE = re.compile(r"[a-z][a-z0-9-]{0,30}")
# Debian policy 5.6.1 and 5.6.12, which also keeps apt's own operators (-, +, /) out.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+.](=[0-9][A-Za-z0-9.+:~-]*)?")


def check_image_name(name: str) -> str:
    """Return ``name`` when it may name an image; raises `UsageError` otherwise.

    Names become directories: lower-case letters, digits, ``.``, ``_`` and ``-``, at most
    63 characters, the first a letter or a digit.
    """
    if not _IMAGE_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name an image: use at most 63 of a-z 0-9 . _ -, first a-z or 0-9")
    return name


@dataclass(frozen=True)
class Recipe:
    """What goes into an image.

    ``name`` is the image's name, ``suite`` the Debian release, ``packages`` what it holds besides
    the base (``name`` or ``name=version``); their order and repetitions do not matter.
    Raises `UsageError` for a name that cannot be one.
    """

    name: str = DEFAULT_NAME
    suite: str = "bookworm"
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_image_name(self.name)
        if not _SUITE.fullmatch(self.suite):
            raise UsageError(f"{self.suite!r} is not the name of a Debian release")
        for package in self.packages:
            if not _PACKAGE.fullmatch(package):
                raise UsageError(f"{package!r} is not the name of a Debian package")
        object.__setattr__(self, "packages", tuple(sorted(set(self.packages))))

    def digest(self) -> str:
        """SHA-256 over everything that decides the image's content, except what Debian serves."""
        from vmjob.image import guestfiles

        return digest_of(self, guestfiles.digest_input())


def digest_of(recipe: Recipe, files: Iterable[tuple[str, bytes]]) -> str:
    """The digest of ``recipe`` with these guest files (name, content).

    The image's name is left out: two images of the same content may bear different names.
    """
    listed = [[name, hashlib.sha256(data).hexdigest()] for name, data in sorted(files)]
    text = json.dumps([BUILDER_VERSION, recipe.suite, recipe.packages, listed])
    return hashlib.sha256(text.encode()).hexdigest()
