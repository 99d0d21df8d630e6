"""FROM WHAT machines are made: images, built, verified and stored.

    store = ImageStore(Home())
    image = store.use("default", progress)   # built at first use, verified once per boot
    image.kernel, image.initrd, image.root, image.scratch   # paths of the parts
"""

from vmjob.image.manifest import Manifest, Package, Part
from vmjob.image.recipe import Recipe
from vmjob.image.store import Image, ImageStore

__all__ = ["Image", "ImageStore", "Manifest", "Package", "Part", "Recipe"]
