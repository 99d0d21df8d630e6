"""Images: built from packages, equal when built twice, checked before use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import lend
from vmjob.errors import ImageCorrupt, ImageMissing, ImageOutdated, UsageError
from vmjob.home import Home
from vmjob.image import manifest
from vmjob.image.recipe import Recipe
from vmjob.image.store import Image, ImageStore

pytestmark = pytest.mark.vm


def test_the_default_image_is_small_and_says_what_it_is(default_image: Image) -> None:
    made = default_image.manifest
    assert made.total_size <= 60_000_000
    assert made.total_size == sum(
        (default_image.directory / part.file).stat().st_size for part in made.parts.values())
    names = {package.name for package in made.packages}
    assert {"python3", "libc6", "busybox-static"} <= names
    assert any(name.startswith("linux-image-") for name in names)
    assert made.kernel_version in {name.removeprefix("linux-image-") for name in names}


def test_the_same_recipe_gives_the_same_bytes(default_image: Image, home: Home) -> None:
    again = ImageStore(home).build(Recipe(), lambda fraction, text: None)
    assert again.manifest.packages == default_image.manifest.packages
    assert {name: part.sha256 for name, part in again.manifest.parts.items()} == \
        {name: part.sha256 for name, part in default_image.manifest.parts.items()}
    assert [path.name for path in home.images.iterdir()] == ["default"]


def test_added_packages_are_in_the_image_with_their_examples(science_image: Image) -> None:
    names = {package.name for package in science_image.manifest.packages}
    assert {"bc", "pari-gp", "hmmer-examples"} <= names


@pytest.mark.parametrize("part", manifest.PART_NAMES)
def test_a_flipped_byte_in_a_part_is_named(default_image: Image, home: Home, part: str) -> None:
    lend(default_image, home)
    image = ImageStore(home).verified("default")
    path = image.directory / image.manifest.parts[part].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # it is a link to the session's
    path.write_bytes(data)
    with pytest.raises(ImageCorrupt, match=part) as caught:
        ImageStore(home).verified("default")
    assert "image remove" in caught.value.advice
    path.write_bytes(data[:-1])
    with pytest.raises(ImageCorrupt, match="bytes instead of"):
        ImageStore(home).verify("default")
    path.unlink()
    with pytest.raises(ImageCorrupt, match="cannot be read"):
        ImageStore(home).verified("default")


def test_a_verified_image_is_not_read_again(default_image: Image, home: Home,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    lend(default_image, home)
    store = ImageStore(home)
    store.verified("default")
    monkeypatch.setattr(store, "verify", lambda name: pytest.fail("it was read again"))
    store.verified("default")


@pytest.mark.parametrize("change", [
    lambda m: m.update(format=99), lambda m: m["parts"].pop("root"),
    lambda m: m["parts"]["root"].update(file="../../etc/passwd"),
    lambda m: m["parts"]["root"].update(size=-1), lambda m: m.update(packages="x")])
def test_a_manifest_that_cannot_be_is_refused(default_image: Image, home: Home,
                                              change: object) -> None:
    lend(default_image, home)
    path = home.images / "default" / manifest.FILE
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.unlink()
    path.write_text(json.dumps(content))
    with pytest.raises(ImageCorrupt):
        ImageStore(home).get("default")


def test_an_image_of_another_protocol_is_outdated(default_image: Image, home: Home) -> None:
    lend(default_image, home)
    path = home.images / "default" / manifest.FILE
    content = json.loads(path.read_text())
    content["agent_protocol"] = 99
    path.unlink()
    path.write_text(json.dumps(content))
    with pytest.raises(ImageOutdated) as caught:
        ImageStore(home).verified("default")
    assert "--force" in caught.value.advice


def test_the_commands_tell_about_images(default_image: Image, home: Home) -> None:
    def image(*arguments: str) -> dict[str, object]:
        done = subprocess.run([sys.executable, "-m", "vmjob", "image", *arguments, "--json"],
                              capture_output=True, check=True)
        found: dict[str, object] = json.loads(done.stdout)
        return found

    lend(default_image, home)
    listed = image("list")["images"]
    assert isinstance(listed, list)
    assert [each["name"] for each in listed] == ["default"]
    assert image("inspect")["kernel_version"] == default_image.manifest.kernel_version
    assert image("verify")["intact"] is True
    assert image("build")["created"] == default_image.manifest.created, "it was built again"
    assert image("remove", "default")["removed"] is True
    assert list(home.images.iterdir()) == []
    with pytest.raises(ImageMissing):
        ImageStore(home).get("default")


@pytest.mark.parametrize("name", ["", "../x", "UPPER", ".hidden", "a/b", "x" * 64])
def test_a_name_that_could_leave_the_store_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Recipe(name)


@pytest.mark.parametrize("package", ["-y", "a b", "a;b", "a/b", "$(x)", ""])
def test_a_package_that_is_no_name_is_refused(package: str) -> None:
    with pytest.raises(UsageError):
        Recipe(packages=(package,))


def test_a_build_that_fails_leaves_the_old_image_and_nothing_else(
        default_image: Image, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lend(default_image, home)
    fake = tmp_path / "bin" / "mmdebstrap"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'E: no such package'; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    done = subprocess.run([sys.executable, "-m", "vmjob", "image", "build", "--force"],
                          capture_output=True, check=False)
    assert done.returncode == 125
    assert b"no such package" in done.stderr
    assert b"image-build-failed" in done.stderr
    assert ImageStore(home).verify("default").manifest == default_image.manifest
    assert [path.name for path in home.images.iterdir()] == ["default"]
