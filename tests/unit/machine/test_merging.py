"""Which layers of a disk are merged: few are left, and little is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.errors import MachineError
from vmjob.machine.qemu.merging import MAX_LAYERS, WORTH, first_to_merge, merge


@given(st.lists(st.integers(0, 1 << 40), max_size=MAX_LAYERS))
def test_few_layers_are_left_alone(sizes: list[int]) -> None:
    assert first_to_merge(sizes) is None


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=200))
def test_layers_never_pile_up(written: list[int]) -> None:
    layers: list[int] = []
    for size in written:
        layers.append(size)
        first = first_to_merge(layers)
        if first is not None:
            layers[first:] = [sum(layers[first:])]
        assert len(layers) <= MAX_LAYERS


def test_a_large_layer_is_not_copied_for_small_ones() -> None:
    sizes = [10 ** 9, *[1000] * MAX_LAYERS]
    assert first_to_merge(sizes) == 1


def test_layers_of_like_size_become_one() -> None:
    assert first_to_merge([1000] * (MAX_LAYERS + 1)) == 0
    assert WORTH >= 1


class Told:
    """A QEMU whose jobs end so."""

    def __init__(self, **job: str) -> None:
        self.job, self.asked = job, list[str]()
        self.nodes: set[str] = set()

    async def execute(self, command: str, **arguments: Any) -> Any:
        self.asked.append(command)
        if command == "blockdev-add":
            self.nodes.add(arguments["node-name"])
        elif command == "blockdev-del":
            self.nodes.discard(arguments["node-name"])
        elif command == "block-stream":
            # By itself a job that has failed is gone like one that has not.
            assert arguments["auto-dismiss"] is False
            self.job["id"] = arguments["job-id"]
        elif command == "job-dismiss":
            del self.job["id"]
        elif command == "query-jobs":
            return [self.job] if "id" in self.job else []
        return {}


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.machine.qemu.frozen.make_disk",
                        lambda path, size: path.write_bytes(b""))


@pytest.mark.anyio
@pytest.mark.usefixtures("disks")
async def test_a_merging_that_failed_leaves_the_layers_as_they_were(tmp_path: Path) -> None:
    monitor = Told(status="concluded", error="No space left on device")
    merged = tmp_path / "merged"
    with pytest.raises(MachineError, match="No space"):
        await merge(monitor, ["a", "b"], "base", ("top", tmp_path / "top"),  # type: ignore[arg-type]
                    ("merged", merged), 1 << 20)
    assert "blockdev-reopen" not in monitor.asked
    assert not monitor.nodes
    assert not merged.exists()


@pytest.mark.anyio
@pytest.mark.usefixtures("disks")
async def test_a_merging_that_is_over_takes_the_layers_place(tmp_path: Path) -> None:
    monitor = Told(status="concluded")
    await merge(monitor, ["a", "b"], "base", ("top", tmp_path / "top"),  # type: ignore[arg-type]
                ("merged", tmp_path / "merged"), 1 << 20)
    assert monitor.asked.count("blockdev-reopen") == 2
    assert "id" not in monitor.job
