"""What a machine is told about itself: randomness first, and nothing that does not fit."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from vmjob.guest.agent import identity
from vmjob.guest.agent.place import Place

GIVEN = {"seed": "ab" * 64, "time": 1.5, "hostname": "vmjob-x", "machine_id": "c" * 32}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path), str(tmp_path / "run"), None, None, owns_kernel=True)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is done to the kernel, in order, instead of doing it to this computer's."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(identity.fcntl, "ioctl",
                        lambda fd, number, data=b"": found.append(("ioctl", number, data)))
    monkeypatch.setattr(time, "clock_settime", lambda clock, t: found.append(("clock", clock, t)))
    monkeypatch.setattr(socket, "sethostname", lambda name: found.append(("hostname", name)))
    monkeypatch.setattr(identity, "_rewrite", lambda path, text: found.append((path, text)))
    monkeypatch.setattr(identity, "_kept", lambda path: -1)
    return found


def test_randomness_comes_before_everything_else(place: Place,
                                                 done: list[tuple[Any, ...]]) -> None:
    identity.assume(GIVEN, place)
    seed = struct.pack("ii", 512, 64) + b"\xab" * 64
    assert done[:2] == [("ioctl", identity.RNDADDENTROPY, seed),
                        ("ioctl", identity.RNDRESEEDCRNG, b"")]
    assert done[2:5] == [("clock", time.CLOCK_REALTIME, 1.5), ("hostname", "vmjob-x"),
                         ("/run/machine-id", "c" * 32 + "\n")]
    assert "vmjob-x" in done[5][1]


@pytest.mark.parametrize("given", [
    {}, {**GIVEN, "seed": "ab"}, {**GIVEN, "seed": "xy" * 64}, {**GIVEN, "seed": 5},
    {**GIVEN, "seed": ""}])
def test_without_a_whole_seed_nothing_is_done(place: Place, done: list[tuple[Any, ...]],
                                              given: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        identity.assume(given, place)
    assert done == []


def test_a_kernel_that_is_not_ours_is_left_alone(tmp_path: Path,
                                                 done: list[tuple[Any, ...]]) -> None:
    identity.assume(GIVEN, Place(str(tmp_path), str(tmp_path / "run"), None, None))
    assert done == []


def test_a_rewritten_file_has_exactly_the_new_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("something longer")
    identity._rewrite(str(path), "short")
    assert path.read_text() == "short"
    os.close(identity._kept(str(path)))
    identity._kept.cache_clear()
