"""Disks that more than one kind of machine boots; looks at clocks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests import old_image
from tests.clocks import Clocks
from tests.own_cd import Unavailable, digest, make_ramdisk, write_cd
from vmjob.guest.client import AgentClient
from vmjob.home import Home
from vmjob.image.store import Image


@pytest.fixture(scope="session")
def vdi(image_home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image, built once; it is kept where the session's images are."""
    kept = image_home.root / f"old-image-{old_image.digest()}.vdi"
    if not kept.exists():
        made = old_image.build(tmp_path_factory.mktemp("old-image"))
        shutil.copyfile(made, kept.with_suffix(".new"))
        kept.with_suffix(".new").rename(kept)
    return kept


@pytest.fixture(scope="session")
def own_cd(virtualbox: Path, image_home: Home, default_image: Image,
           tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CD with a system of its own, for VirtualBox; its ramdisk is kept where the images are."""
    release = default_image.manifest.kernel_version
    kept = image_home.root / f"own-cd-{digest()}-{release}"
    if not kept.exists():
        made = tmp_path_factory.mktemp("own-cd") / "ramdisk"
        try:
            make_ramdisk(made, release)
        except Unavailable as error:
            pytest.skip(str(error))
        shutil.copyfile(made, kept.with_name(f"{kept.name}.new"))
        kept.with_name(f"{kept.name}.new").rename(kept)
    target = tmp_path_factory.mktemp("cd") / "vm_isocontext.iso"
    write_cd(target, default_image, kept)
    return target


@pytest.fixture
def pretend(tmp_path: Path, virtualbox: Path, monkeypatch: pytest.MonkeyPatch,
            ) -> Callable[[str], Path]:
    """Puts a script in VBoxManage's place, which ends with the real one."""
    place = tmp_path / "programs"

    def put(before: str) -> Path:
        place.mkdir(exist_ok=True)
        for name in ("VBoxManage", "VBoxHeadless"):
            said = before if name == "VBoxManage" else ""
            beside = place / f"{name}.new"
            beside.write_text(f'#!/bin/sh\nreal="{virtualbox}/{name}"\n{said}\nexec "$real" "$@"\n')
            beside.chmod(0o755)
            beside.rename(place / name)
        monkeypatch.setenv("VMJOB_VIRTUALBOX", str(place))
        return place

    return put


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Knows how long the order took by which a machine's clock was set last."""
    found = Clocks()

    def timed(call: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def wrapped(*given: Any, **more: Any) -> None:
            began = time.monotonic()
            await call(*given, **more)
            found.late = time.monotonic() - began
        return wrapped

    for name in ("introduce", "set_clock"):
        monkeypatch.setattr(AgentClient, name, timed(getattr(AgentClient, name)))
    return found
