"""VirtualBox's disk format: what is written is read, layers add up, and damage is only refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmjob.errors import DiskUnusable
from vmjob.machine.virtualbox.vdi import (
    BLOCK,
    FREE,
    HEAD_SIZE,
    LAYER,
    MAP_AT,
    NORMAL,
    ZERO,
    Header,
    _table,
    _write_head,
    lay_together,
    read_header,
    write_disk,
)

NOBODY = uuid.UUID(int=0)
BLOCKS = 5
#: What a block of a layer can be: not there, zero, or its own.
HELD = st.sampled_from(("free", "zero", "own"))


def test_a_disk_that_is_written_is_read_back(tmp_path: Path) -> None:
    own = uuid.uuid4()
    write_disk(tmp_path / "d", 4 * BLOCK - 512, own, {3: b"last", 1: b"a" * BLOCK})
    data = (tmp_path / "d").read_bytes()
    header = read_header(data[:HEAD_SIZE])
    assert (header.kind, header.own, header.below) == (NORMAL, own, NOBODY)
    assert (header.size, header.blocks, header.allocated) == (4 * BLOCK - 512, 4, 2)
    assert len(data) == header.data_at + 2 * BLOCK
    assert seen([tmp_path / "d"]) == [b"\0", b"a", b"\0", b"l"]
    with pytest.raises(FileExistsError):
        write_disk(tmp_path / "d", BLOCK, own, {})


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="there is no qemu-img")
def test_another_program_reads_the_same(tmp_path: Path) -> None:
    write_disk(tmp_path / "d.vdi", 3 * BLOCK, uuid.uuid4(), {2: b"x" * 700, 0: b"y" * BLOCK})
    subprocess.run(["qemu-img", "check", "-q", "-f", "vdi", tmp_path / "d.vdi"], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "vdi", "-O", "raw", tmp_path / "d.vdi",
                    tmp_path / "raw"], check=True)
    assert (tmp_path / "raw").read_bytes() == b"y" * BLOCK + bytes(BLOCK) + (
        b"x" * 700).ljust(BLOCK, b"\0")


@given(st.binary(max_size=600))
def test_any_bytes_are_a_header_or_refused(data: bytes) -> None:
    refused_or_sane(data)


@given(st.integers(0, HEAD_SIZE - 1), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_a_header_or_refused(at: int, damage: bytes) -> None:
    whole = bytearray(Header(LAYER, MAP_AT, 2 * MAP_AT, BLOCKS * BLOCK, BLOCKS, 1, *[NOBODY] * 4)
                      .packed())
    whole[at:at + len(damage)] = damage
    refused_or_sane(bytes(whole[:HEAD_SIZE]))


@pytest.mark.parametrize(("size", "blocks", "allocated"), [
    (BLOCK, 1, 2), (BLOCK, 2, 1), (0, 0, 0), (1 << 45, 1 << 25, 0)])
def test_a_header_that_contradicts_itself_is_refused(size: int, blocks: int,
                                                     allocated: int) -> None:
    header = Header(NORMAL, MAP_AT, 2 * MAP_AT, size, blocks, allocated, *[NOBODY] * 4)
    with pytest.raises(DiskUnusable):
        read_header(header.packed())


def refused_or_sane(data: bytes) -> None:
    try:
        header = read_header(data)
    except DiskUnusable:
        return
    assert 0 < header.size <= header.blocks * BLOCK
    assert header.allocated <= header.blocks


def layer(path: Path, below: Path | None, held: list[str], mark: int) -> Path:
    """A layer whose own blocks begin with ``mark`` and their number; the rest is a hole."""
    under = read_header(below.read_bytes()[:HEAD_SIZE]).own if below else NOBODY
    own = [number for number, what in enumerate(held) if what == "own"]
    order = own[::-1]  # blocks come in the order in which they were written
    table = [order.index(number) if what == "own" else ZERO if what == "zero" else FREE
             for number, what in enumerate(held)]
    header = Header(LAYER if below else NORMAL, MAP_AT, 2 * MAP_AT, BLOCKS * BLOCK, BLOCKS,
                    len(own), uuid.uuid4(), uuid.uuid4(), under, under)
    with path.open("xb") as file:
        for place, number in enumerate(order):
            file.seek(header.data_at + place * BLOCK + (number % 2) * (BLOCK - 4096))
            file.write(bytes((mark, number)))
        file.truncate(header.data_at + len(own) * BLOCK)
        _write_head(file, header, table)
    return path


def seen(layers: list[Path], at: int = 0, length: int = 1) -> list[bytes]:
    """What a guest reads of each block, by the plainest of models."""
    found: list[bytes] = []
    for path in layers:
        with path.open("rb") as file:
            header = read_header(file.read(HEAD_SIZE))
            found = found or [bytes(length)] * header.blocks
            for number, place in enumerate(_table(file, header)):
                if place == ZERO:
                    found[number] = bytes(length)
                elif place != FREE:
                    file.seek(header.data_at + place * BLOCK + at)
                    found[number] = file.read(length)
    return found


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(held=st.lists(st.lists(HELD, min_size=BLOCKS, max_size=BLOCKS), min_size=2, max_size=4),
       lowest=st.booleans())
def test_layers_laid_together_are_what_they_were(tmp_path: Path, held: list[list[str]],
                                                 lowest: bool) -> None:
    """Over a base that has all blocks, or with the base among them; and a layer lies on top."""
    place = tmp_path / uuid.uuid4().hex
    place.mkdir()
    layers = [layer(place / "base", None, ["own"] * BLOCKS, 100)]
    for number, each in enumerate(held):
        layers.append(layer(place / str(number), layers[-1], each, number + 1))
    below, several = ([], layers) if lowest else (layers[:1], layers[1:])
    before = [path.read_bytes() for path in layers]
    lay_together(several, place / "merged")
    for at in (0, BLOCK - 4096):
        assert seen([*below, place / "merged"], at, 2) == seen(layers, at, 2)
    merged, top, bottom = (read_header(path.read_bytes()[:HEAD_SIZE])
                           for path in (place / "merged", several[-1], several[0]))
    assert (merged.own, merged.modified) == (top.own, top.modified)
    assert (merged.kind, merged.below, merged.below_modified) == (
        bottom.kind, bottom.below, bottom.below_modified)
    assert [path.read_bytes() for path in layers] == before
    blocks = merged.allocated
    assert (place / "merged").stat().st_blocks * 512 <= MAP_AT + (blocks + 1) * 16384, "no holes"
    shutil.rmtree(place)


def test_what_does_not_lie_on_the_one_below_is_refused(tmp_path: Path) -> None:
    base = layer(tmp_path / "base", None, ["own"] * BLOCKS, 1)
    other = layer(tmp_path / "other", None, ["own"] * BLOCKS, 1)
    top = layer(tmp_path / "top", base, ["own"] * BLOCKS, 1)
    with pytest.raises(DiskUnusable):
        lay_together([other, top], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_layer_that_was_cut_is_refused(tmp_path: Path) -> None:
    """What is missing is not zeros."""
    base = layer(tmp_path / "base", None, ["own"] * BLOCKS, 1)
    top = layer(tmp_path / "top", base, ["own", "own", "free", "zero", "free"], 2)
    os.truncate(top, top.stat().st_size - 1)
    with pytest.raises(DiskUnusable, match="ends before"):
        lay_together([base, top], tmp_path / "merged")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, 2 * MAP_AT + 2 * BLOCK), at=st.integers(0, HEAD_SIZE + 64),
       damage=st.binary(min_size=1, max_size=4))
def test_a_damaged_layer_is_refused_or_read_within_its_bounds(tmp_path: Path, length: int, at: int,
                                                              damage: bytes) -> None:
    place = tmp_path / uuid.uuid4().hex
    place.mkdir()
    base = layer(place / "base", None, ["own"] * BLOCKS, 1)
    top = layer(place / "top", base, ["own", "free", "own", "zero", "free"], 2)
    content = bytearray(top.read_bytes())
    where = at if at < HEAD_SIZE else MAP_AT + at - HEAD_SIZE
    content[where:where + len(damage)] = damage
    top.write_bytes(content[:length])
    try:
        lay_together([base, top], place / "merged")
    except DiskUnusable:
        pass
    else:
        assert (place / "merged").stat().st_size <= 2 * MAP_AT + BLOCKS * BLOCK
    shutil.rmtree(place)
