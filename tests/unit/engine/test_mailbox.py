"""The layout of the mailbox, whatever is in it; and a note there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.engine.mailbox import HALF, MOST, SIZE, Mailbox, pack, unpack
from vmjob.engine.session import open_session
from vmjob.errors import GuestRefused, UsageError
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver

NOTES = st.binary(max_size=200).map(lambda note: note.replace(b"\0", b"\1"))


def answered(note: bytes, flag: int = 1) -> bytes:
    """A disk on which a guest has left this."""
    return pack(b"ours")[:HALF] + note.ljust(HALF, b"\0") + bytes([0, flag])


@given(NOTES)
def test_a_note_for_the_guest_is_where_it_looks(note: bytes) -> None:
    disk = pack(note)
    assert len(disk) == 28672
    assert disk[:len(note) + 1] == note + b"\0"
    assert not any(disk[len(note):28670])
    assert disk[28670:] == b"\1\0"
    assert unpack(disk) is None


@given(NOTES, st.integers(1, 255))
def test_a_note_for_the_host_is_found_when_the_flag_says_so(note: bytes, flag: int) -> None:
    assert unpack(answered(note, flag)) == note
    assert unpack(answered(note, 0)) is None


@given(st.integers(), st.integers(0, 255), st.integers(HALF, SIZE - 2))
def test_whatever_a_guest_writes_is_a_bounded_note_or_none(
        seed: int, flag: int, end: int) -> None:
    noise = Random(seed).randbytes(SIZE)
    disk = noise[:HALF] + noise[HALF:-1].replace(b"\0", b"\1") + bytes([flag])
    disk = disk[:end] + b"\0" + disk[end + 1:]
    note = unpack(disk)
    assert (note is None) == (disk[28671] == 0)
    if note is not None:
        assert note == disk[HALF:min(end, 2 * HALF)]


def test_a_note_without_an_end_ends_with_its_half() -> None:
    assert unpack(answered(b"x" * HALF)) == b"x" * HALF


@given(st.binary(max_size=100))
def test_what_is_no_mailbox_is_refused(disk: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(disk)


def test_what_the_guest_would_see_a_part_of_is_refused() -> None:
    assert len(pack(b"x" * MOST)) == SIZE
    for note in (b"x" * (MOST + 1), b"a\0b"):
        with pytest.raises(UsageError):
            pack(note)


@pytest.mark.anyio
async def test_a_note_goes_there_and_another_comes_back_once(home: Home,
                                                             fake_shape: MachineSpec) -> None:
    async with open_session(home, FakeDriver(), replace(fake_shape)) as session:
        box = Mailbox(session.client, isolated=False)
        with pytest.raises(GuestRefused):
            await box.read()
        await box.put(b"to the guest")
        assert await box.read() is None
        place: Path = session.machine.workdir / "fd0"  # type: ignore[attr-defined]
        assert place.read_bytes() == pack(b"to the guest")
        place.write_bytes(answered(b"to the host\xff"))
        assert await box.read() == b"to the host\xff"
        assert await box.read() is None
        assert place.read_bytes() == answered(b"to the host\xff", 0)
        place.write_bytes(b"x" * (SIZE - 1))
        with pytest.raises(GuestRefused):
            await box.read()
