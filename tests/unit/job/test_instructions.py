"""Programs are searched for instructions of x86 whose results differ between processors."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import time
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.job.elf_files import FILLER, elf, with_one
from vmjob.job import instructions
from vmjob.job.elf import MOST_CODE, TooLarge, code_of, is_program
from vmjob.job.instructions import OutOfTime, search, step

#: As an assembler writes them.
BYTES = {
    "rsqrtps": "0f 52 c1", "rsqrtss": "f3 0f 52 c1", "rcpps": "0f 53 05 00 01 00 00",
    "rcpss": "f3 0f 53 44 8b 08",
    "f2xm1": "d9 f0", "fyl2x": "d9 f1", "fptan": "d9 f2", "fpatan": "d9 f3", "fyl2xp1": "d9 f9",
    "fsincos": "d9 fb", "fsin": "d9 fe", "fcos": "d9 ff",
    "vrsqrtps": "c5 fc 52 c1", "vrsqrtss": "c5 f2 52 c2", "vrcpps": "c5 f8 53 c1",
    "vrcpss": "c4 e1 72 53 c2",
    "vrcp14ps": "62 f2 7d 48 4c c1", "vrcp14pd": "62 f2 fd 48 4c c1",
    "vrcp14ss": "62 f2 75 08 4d c2", "vrcp14sd": "62 f2 f5 08 4d c2",
    "vrsqrt14ps": "62 f2 7d 48 4e c1", "vrsqrt14pd": "62 f2 fd 48 4e c1",
    "vrsqrt14ss": "62 f2 75 08 4f c2", "vrsqrt14sd": "62 f2 f5 08 4f c2",
    "vrcp28ps": "62 f2 7d 48 ca c1", "vrsqrt28pd": "62 f2 fd 48 cc c1",
    "vrcpph": "62 f6 7d 48 4c c1", "vrsqrtsh": "62 f6 75 08 4f c2"}
#: With registers that only 64-bit code has.
WIDE = {"rsqrtps": "45 0f 52 c1", "rcpss": "f3 44 0f 53 44 8b 08", "vrcpps": "c4 41 78 53 c1",
        "vrsqrtss": "c4 41 32 52 c2", "vrsqrt14ps": "62 52 7d 48 4e c1"}
#: The same bytes as operands of others.
WITHIN = {
    "a number": "b8 d9 fe 0f 52", "an address": "48 8b 05 d9 ff 00 00",
    "a long number": "48 b8 0f 52 c1 d9 fe d9 f0 00", "a jump": "0f 84 d9 f2 00 00",
    "a far place": "48 8b 84 24 d9 fb 00 00", "a comparison": "66 81 f9 d9 f1"}

PROGRAMS = [path for pattern in ("libm.so.6", "libmvec.so.1")
            for path in sorted(Path("/usr/lib").glob(f"x86_64-linux-gnu/{pattern}"))]


def named(code: bytes, *, wide: bool = True) -> set[str]:
    return search(code, wide=wide, deadline=time.monotonic() + 60)


def of_file(data: bytes) -> set[str]:
    return set().union(*(named(code, wide=wide) for code, wide in code_of(BytesIO(data))))


@pytest.mark.parametrize("wide", [True, False], ids=["64", "32"])
@pytest.mark.parametrize(("name", "text"), BYTES.items(), ids=BYTES)
def test_each_instruction_is_found_by_its_name(name: str, text: str, wide: bool) -> None:
    assert of_file(elf(with_one(bytes.fromhex(text)), wide=wide)) == {name}


@pytest.mark.parametrize(("name", "text"), WIDE.items(), ids=WIDE)
def test_each_is_found_with_the_registers_of_64_bits(name: str, text: str) -> None:
    assert named(with_one(bytes.fromhex(text))) == {name}


@pytest.mark.parametrize("text", WITHIN.values(), ids=WITHIN)
def test_the_same_bytes_within_another_instruction_are_not_taken_for_one(text: str) -> None:
    assert named(with_one(bytes.fromhex(text))) == set()


def test_one_is_found_far_from_where_the_code_begins() -> None:
    code = FILLER * 100_000 + bytes.fromhex("b8 d9 fe 0f 52")
    assert named(code + FILLER * 10_000 + bytes.fromhex("d9 fe") + FILLER * 99) == {"fsin"}


def test_data_among_code_is_not_taken_for_instructions() -> None:
    made = random.Random(1)
    taken = [named(with_one(made.randbytes(4096)), wide=wide)
             for wide in (True, False) for _ in range(512)]
    assert sum(map(len, taken)) <= 2  # of some 1200 places that look like one


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_real_library_is_read_as_objdump_reads_it(path: Path) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("no objdump to compare with")
    text = subprocess.run(["objdump", "-d", "-w", "--no-show-raw-insn", path], check=True,
                          capture_output=True, text=True).stdout
    pattern = re.compile(r"^v?(rsqrt|rcp)(14|28)?[sp][sd]$|^f(sin|cos|sincos|ptan|patan|2xm1|yl2x|"
                         r"yl2xp1)$")
    words = set(re.findall(r"^\s+[0-9a-f]+:\s+(\w+)", text, re.MULTILINE))
    assert of_file(path.read_bytes()) == set(filter(pattern.match, words)) != set()


def test_lengths_are_those_of_objdump() -> None:
    if not PROGRAMS or shutil.which("objdump") is None:
        pytest.skip("no library, or no objdump, to compare with")
    data = PROGRAMS[0].read_bytes()
    text = subprocess.run(["objdump", "-d", "-w", "-j", ".text", PROGRAMS[0]], check=True,
                          capture_output=True, text=True).stdout
    rows = [bytes.fromhex(row) for row in re.findall(r"^\s+[0-9a-f]+:\t([0-9a-f ]+)", text,
                                                     re.MULTILINE)]
    code = b"".join(rows)
    assert code in data
    at, odd = 0, 0
    for row in rows:
        here = step(code + bytes(16), at, wide=True)
        at += len(row)
        # objdump takes the x87's `wait` and what follows for one.
        odd += (here is None or here[0] != at) and row[0] != 0x9B
    assert (len(rows) > 50_000, odd) == (True, 0)


def test_the_search_ends_with_its_time() -> None:
    with pytest.raises(OutOfTime):
        search(b"\xd9\xfe" * 1000, wide=True, deadline=time.monotonic() - 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("code", "names"), [
    (b"\xd9\xfe" * 200_000, {"fsin"}), (b"\xd9\xfe\xff" * 100_000, set()),
    (FILLER * 20 + b"\xd9\xfe" + b"\x66" * 10_000_000 + b"\xd9\xfe", set())],
    ids=["them", "what may be them", "prefixes"])
def test_code_full_of_one_thing_takes_no_longer(code: bytes, names: set[str]) -> None:
    assert named(code) == names


# -- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [True, False], ids=["64", "32"])
def test_a_program_without_sections_is_searched_by_its_segments(wide: bool) -> None:
    code = with_one(b"\xd9\xfe")
    assert of_file(elf(code, wide=wide, sections=False)) == {"fsin"}
    assert of_file(elf(code, wide=wide, sections=False, executable=False)) == set()


def test_data_in_a_program_is_not_searched() -> None:
    assert of_file(elf(with_one(b"\xd9\xfe"), executable=False)) == set()


def test_code_of_64_bits_in_a_file_of_32_is_read_as_such() -> None:
    assert of_file(elf(with_one(bytes.fromhex("45 0f 52 c1")), wide=False, machine=62)) == {
        "rsqrtps"}


@pytest.mark.parametrize("data", [
    b"", b"\x7fELF", b"#!/bin/sh\n", elf(b"\xd9\xfe", machine=183), elf(b"")[:63],
    elf(b"")[:4] + b"\3" + elf(b"")[5:], elf(b"")[:5] + b"\2" + elf(b"")[6:]],
    ids=["nothing", "four letters", "a script", "for ARM", "cut off", "an odd class", "big end"])
def test_what_is_no_program_for_x86_has_no_code(data: bytes) -> None:
    assert list(code_of(BytesIO(data))) == []


def test_more_code_than_is_read_is_refused() -> None:
    class Large(BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 <= size <= MOST_CODE
            return super().read(size)

    data = bytearray(elf(bytes(100)))
    row = len(data) - 64
    data[row + 32:row + 40] = (1 << 62).to_bytes(8, "little")
    assert len(list(code_of(Large(data)))) == 1  # no more than there is
    data += bytes(MOST_CODE)
    with pytest.raises(TooLarge):
        list(code_of(Large(data)))



@given(st.booleans(), st.booleans(),
       st.dictionaries(st.integers(-130, 63), st.integers(0, 255), max_size=12),
       st.binary(max_size=200), st.integers(0, 400))
def test_no_file_breaks_the_search(wide: bool, sections: bool, changed: dict[int, int],
                                   code: bytes, cut: int) -> None:
    data = bytearray(elf(code, wide=wide, sections=sections))
    for at, byte in changed.items():
        data[at % len(data)] = byte
    data = data[:max(0, len(data) - cut)]
    for part, is_wide in code_of(BytesIO(data)):
        assert len(part) <= len(data)
        assert named(part, wide=is_wide) <= ALL


@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_break_the_search(code: bytes, wide: bool) -> None:
    assert named(code, wide=wide) <= ALL
    assert isinstance(is_program(code), bool)
    for at in range(len(code)):
        try:
            here = step(code, at, wide=wide)
        except IndexError:
            continue
        assert here is None or (at <= here[1] < here[0] <= min(len(code), at + 15)
                                and here[2] in {"", *ALL})


ALL = {f"{v}{name}{size}" for v in ("", "v") for name in ("rsqrt", "rcp") for size in ("ps", "ss")
       } | {f"v{name}{bits}{kind}{size}" for name in ("rsqrt", "rcp") for bits in ("14", "28")
            for kind in "ps" for size in "sd"} | {
    f"v{name}{kind}h" for name in ("rsqrt", "rcp") for kind in "ps"} | set(
    instructions._TRANSCENDENTAL.values())
