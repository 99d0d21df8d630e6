"""Which layers of a disk are merged: few are left, and little is copied."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmjob.machine.qemu.merging import MAX_LAYERS, WORTH, first_to_merge


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
