"""Images in their store, whatever cuts off what is done with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.small_image import small_image
from vmjob.cli.main import cli
from vmjob.errors import ImageBuildFailed, ImageMissing
from vmjob.home import Home
from vmjob.image import store
from vmjob.image.recipe import Recipe
from vmjob.image.store import ImageStore


class Cut(BaseException):
    """Here the process is killed."""


@pytest.fixture
def images(home: Home) -> ImageStore:
    """A store with one image, ``lab``."""
    small_image(home)
    return ImageStore(home)


@pytest.fixture
def cut_off(home: Home, images: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's removal was cut off when one of its files was gone."""

    def cut(path: Path) -> None:
        if path.exists():
            (path / "root.bin").unlink()
            raise Cut

    with monkeypatch.context() as killed:
        killed.setattr(store, "remove_tree", cut)
        with pytest.raises(Cut):
            images.remove("lab")
    assert list(home.images.iterdir()) != []


def no_build(*given: object) -> None:
    raise ImageBuildFailed("no network")


@pytest.mark.usefixtures("cut_off")
def test_what_was_being_removed_does_not_come_back(home: Home, images: ImageStore,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.image.build.build", no_build)
    with pytest.raises(ImageBuildFailed):
        images.build(Recipe("lab"), lambda fraction, text: None)
    with pytest.raises(ImageMissing):
        images.get("lab")
    assert list(home.images.iterdir()) == []


@pytest.mark.usefixtures("cut_off")
def test_a_removal_that_was_cut_off_is_finished_by_clean(home: Home) -> None:
    assert CliRunner().invoke(cli, ["clean"]).exit_code == 0
    assert list(home.images.iterdir()) == []


def test_what_was_being_replaced_comes_back(home: Home, images: ImageStore,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    (home.images / "lab").rename(home.images / ".replaced-lab")
    monkeypatch.setattr("vmjob.image.build.build", no_build)
    with pytest.raises(ImageBuildFailed):
        images.build(Recipe("lab"), lambda fraction, text: None)
    assert images.get("lab").root.read_text() == "root"
