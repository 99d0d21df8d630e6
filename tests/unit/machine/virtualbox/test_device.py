"""VirtualBox's kernel driver, as users see it from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmjob.machine.virtualbox import device


def test_a_driver_that_only_root_may_open_may_well_work(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VBoxHeadless is set-user-id root: the device of its packages has mode 600."""
    node = tmp_path / "vboxdrv"
    monkeypatch.setattr(device, "DEVICE", node)
    assert "not loaded" in str(device.why_not())
    assert device.identity() == "none"
    node.touch(mode=0)
    assert device.why_not() is None
    assert device.identity() != "none"
