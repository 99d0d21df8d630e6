"""The memory of checkpoints: what is kept is what was, and each page is kept once."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmjob.machine.qemu import pages
from vmjob.machine.qemu.pages import MAX_FILES, PageTable, PageWriter, read_index
from vmjob.machine.qemu.stream import PAGE, Block

#: Pages of the main memory and of a firmware's block, in these tests.
RAM, FIRMWARE = 12, 3
BLOCKS = [Block(b"pc.bios", FIRMWARE * PAGE), Block(b"pc.ram", RAM * PAGE)]
#: Every page, by its block's place and its number.
ALL = [(0, n) for n in range(FIRMWARE)] + [(1, n) for n in range(RAM)]
#: What a page holds: 0 is zeros; other numbers fill it with as many different contents.
Memory = dict[tuple[int, int], int]
NUMBERS = st.integers(0, 6)


def content(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest() * (PAGE // 32) if number else bytes(PAGE)


def write_template(path: Path, memory: list[int]) -> None:
    """A template's memory, with holes where it is zeros."""
    with path.open("wb") as file:
        file.truncate(RAM * PAGE)
        for number, what in enumerate(memory):
            if what:
                file.seek(number * PAGE)
                file.write(content(what))


def tell(writer: PageWriter, place: tuple[int, int], what: int) -> None:
    writer.page(*place, memoryview(content(what)) if what else None)


def take(directory: Path, name: str, before: PageTable | None, template: Path | None,
         told: list[tuple[tuple[int, int], int]]) -> PageTable:
    """One checkpoint: every page as it is told, some more than once."""
    table = before.copy() if before else PageTable(BLOCKS)
    writer = PageWriter(table, template, directory, name)
    for place, what in told:
        tell(writer, place, what)
    writer.close()
    table.write_index(directory / f"{name}.index")
    return table


def restored(directory: Path, name: str, template: Path | None) -> Memory:
    """The memory that a machine has which continues from a checkpoint, as bytes' numbers."""
    known = {content(what): what for what in range(1000)}
    found = dict.fromkeys(ALL, -1)  # what a new machine has in its firmware: unknown
    start = template.read_bytes() if template else bytes(RAM * PAGE)
    for n in range(RAM):
        found[1, n] = known[start[n * PAGE:(n + 1) * PAGE]]
    seen = set()
    for block, number, data in read_index(directory / f"{name}.index").stored(directory):
        assert (block, number) not in seen
        seen.add((block, number))
        found[block, number] = 0 if data is None else known[bytes(data)]
    return found


class Checkpoints(RuleBasedStateMachine):
    """A machine's memory changes and is kept, again and again; sometimes it is continued."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="pages-"))
        self.before = pages.MAIN_MEMORY
        pages.MAIN_MEMORY = FIRMWARE * PAGE  # what is larger than that is main memory
        self.template: Path | None = None
        self.template_memory = [0] * RAM
        self.memory: Memory = {}
        self.table: PageTable | None = None
        self.count = 0
        #: The two newest checkpoints: name, memory, files.
        self.kept: list[tuple[str, Memory, list[str]]] = []

    def teardown(self) -> None:
        pages.MAIN_MEMORY = self.before
        shutil.rmtree(self.directory)

    @initialize(template=st.one_of(st.none(), st.lists(NUMBERS, min_size=RAM, max_size=RAM)),
                firmware=st.lists(NUMBERS, min_size=FIRMWARE, max_size=FIRMWARE))
    def begin(self, template: list[int] | None, firmware: list[int]) -> None:
        if template is not None:
            self.template = self.directory / "memory"
            self.template_memory = template
            write_template(self.template, template)
        self.memory = {(0, n): what for n, what in enumerate(firmware)}
        self.memory |= {(1, n): what for n, what in enumerate(self.template_memory)}

    @rule(changes=st.dictionaries(st.sampled_from(ALL), NUMBERS))
    def change(self, changes: Memory) -> None:
        self.memory |= changes

    @rule(places=st.sets(st.integers(0, RAM - 1)))
    def change_back(self, places: set[int]) -> None:
        self.memory |= {(1, n): self.template_memory[n] for n in places}

    @rule()
    def clear(self) -> None:
        self.memory = dict.fromkeys(ALL, 0)

    @rule(early=st.lists(st.tuples(st.sampled_from(ALL), NUMBERS), max_size=8))
    def checkpoint(self, early: list[tuple[tuple[int, int], int]]) -> None:
        """Every page comes; those that change meanwhile came before, with what they had then."""
        self.count += 1
        name = f"c{self.count}"
        self.table = take(self.directory, name, self.table, self.template,
                          [*early, *self.memory.items()])
        self.kept = [*self.kept[-1:], (name, dict(self.memory), self.table.names())]
        # What neither of the two newest needs is given up.
        needed = {file for _, _, files in self.kept for file in files}
        for path in self.directory.glob("*.pages"):
            if path.name not in needed:
                path.unlink()

    @rule(early=st.lists(st.tuples(st.sampled_from(ALL), NUMBERS), max_size=8))
    def checkpoint_that_fails(self, early: list[tuple[tuple[int, int], int]]) -> None:
        table = self.table.copy() if self.table else PageTable(BLOCKS)
        writer = PageWriter(table, self.template, self.directory, "failing")
        for place, what in early:
            tell(writer, place, what)
        writer.close()
        (self.directory / "failing.pages").unlink(missing_ok=True)

    @rule()
    def nothing_has_changed(self) -> None:
        if self.table is None:
            return
        table = self.table.copy()
        given_up = table.given_up(self.directory)
        writer = PageWriter(table, self.template, self.directory, "same")
        for place, what in self.kept[-1][1].items():
            tell(writer, place, what)
        rewritten = sum(self.table.used()[number] for number in given_up)
        assert writer.written_bytes == rewritten * PAGE, "an unchanged page was written again"
        writer.close()
        (self.directory / "same.pages").unlink(missing_ok=True)

    @rule()
    def continue_from_the_newest(self) -> None:
        if self.kept:
            name, memory, _ = self.kept[-1]
            self.table = read_index(self.directory / f"{name}.index")
            self.memory = dict(memory)

    @rule()
    def continue_from_the_one_before(self) -> None:
        if len(self.kept) == 2:
            self.kept.pop()
            self.continue_from_the_newest()

    @invariant()
    def what_is_kept_is_what_was(self) -> None:
        for name, memory, _ in self.kept:
            assert restored(self.directory, name, self.template) == memory

    @invariant()
    def the_files_are_few_and_not_much_larger_than_what_they_are_for(self) -> None:
        if not self.kept:
            return
        names = self.kept[-1][2]
        assert len(names) <= MAX_FILES + 1
        assert len(set(names)) == len(names)
        # At its time each file was at most half in vain; one checkpoint may waste what it rewrites.
        size = sum((self.directory / name).stat().st_size for name in names)
        assert size <= (2 * len(ALL) + len(ALL) + 8) * PAGE


Checkpoints.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCheckpoints = Checkpoints.TestCase


def test_many_checkpoints_of_a_little_each_stay_few_files(tmp_path: Path) -> None:
    memory = dict.fromkeys(ALL, 1)
    table = take(tmp_path, "c0", None, None, list(memory.items()))
    for count in range(1, 60):
        memory[ALL[count % len(ALL)]] = count + 1
        table = take(tmp_path, f"c{count}", table, None, list(memory.items()))
        for path in tmp_path.glob("*.pages"):
            if path.name not in table.names():
                path.unlink()
        assert len(table.names()) <= MAX_FILES + 1
        size = sum(path.stat().st_size for path in tmp_path.glob("*.pages"))
        assert size <= 2 * len(ALL) * PAGE + 2 * len(ALL) * PAGE
    assert restored(tmp_path, "c59", None) == memory


def test_a_page_that_changes_again_while_it_is_kept_takes_its_place_once(tmp_path: Path) -> None:
    told = [((1, 5), what) for what in range(1, 400)]
    table = take(tmp_path, "c1", None, None, told)
    assert (tmp_path / "c1.pages").stat().st_size == PAGE
    assert next(table.stored(tmp_path))[2] == content(399)


@pytest.mark.parametrize("gathered", [PAGE, 3 * PAGE, 1 << 20])
def test_a_page_changes_before_and_after_it_got_to_the_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: int) -> None:
    monkeypatch.setattr(pages, "GATHERED", gathered)
    told = [(place, turn * 50 + n + 1) for turn in range(3) for n, place in enumerate(ALL)]
    take(tmp_path, "c1", None, None, told)
    assert (tmp_path / "c1.pages").stat().st_size == len(ALL) * PAGE
    assert restored(tmp_path, "c1", None) == dict(told)


def test_a_machine_that_is_as_its_template_needs_no_page_of_its_memory(tmp_path: Path) -> None:
    template = tmp_path / "memory"
    write_template(template, [0, 1, 2, 0] * 3)
    table = take(tmp_path, "c1", None, template,
                 [((1, n), what) for n, what in enumerate([0, 1, 2, 0] * 3)])
    assert table.names() == []
    assert list(read_index(tmp_path / "c1.index").stored(tmp_path)) == []
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "c1.index"}


def test_a_template_without_holes_is_as_good(tmp_path: Path) -> None:
    template = tmp_path / "memory"
    template.write_bytes(bytes(4 * PAGE) + content(1) * (RAM - 4))
    memory: Memory = {(1, n): 0 for n in range(6)} | {(1, n): 1 for n in range(6, RAM)}
    table = take(tmp_path, "c1", None, template, list(memory.items()))
    assert table.names() == []
    assert [(number, data) for _, number, data in table.stored(tmp_path)] == [(4, None), (5, None)]


def test_a_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    take(tmp_path, "c1", None, None, [((1, 1), 1)])
    with pytest.raises(FileExistsError):
        take(tmp_path, "c1", None, None, [((1, 1), 2)])
    assert restored(tmp_path, "c1", None)[1, 1] == 1


# -- damage ------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    table = take(tmp_path, "c1", None, None, [(place, n % 5) for n, place in enumerate(ALL)])
    take(tmp_path, "c2", table, None, [(ALL[n], n) for n in (6, 7, 8)])
    return tmp_path


def use(directory: Path) -> None:
    for _ in read_index(directory / "c2.index").stored(directory):
        pass


def test_pages_that_are_missing_or_changed_are_not_used(kept: Path) -> None:
    use(kept)
    for name in ("c1.pages", "c2.pages"):
        path = kept / name
        good = path.read_bytes()
        for bad in (good[:-1], good[:PAGE], b"", good[:10] + b"\xff" + good[11:]):
            path.write_bytes(bad)
            with pytest.raises(ValueError, match="a page is"):
                use(kept)
        path.unlink()
        with pytest.raises(FileNotFoundError):
            use(kept)
        path.write_bytes(good)
    use(kept)


@given(st.data())
@settings(max_examples=150)
def test_an_index_that_is_damaged_is_not_used(more: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(prefix="pages-") as name:
        directory = Path(name)
        take(directory, "c2", None, None, [(place, n % 5) for n, place in enumerate(ALL)])
        path = directory / "c2.index"
        good, table = path.read_bytes(), read_index(path)
        before = (table.places, table.digests, table.files)
        how = more.draw(st.sampled_from(["cut", "flip"]))
        at = more.draw(st.integers(0, len(good) - 1))
        if how == "cut":
            path.write_bytes(good[:at])
        else:
            flipped = good[at] ^ (1 << more.draw(st.integers(0, 7)))
            path.write_bytes(good[:at] + bytes([flipped]) + good[at + 1:])
        try:
            found = read_index(path)
        except (ValueError, OSError):
            return
        assert (found.places, found.digests, found.files) == before  # a bit that means nothing


@given(st.data())
@settings(max_examples=300)
def test_an_index_with_another_content_is_understood_or_refused(more: st.DataObject) -> None:
    """One whose checksum is right, too."""
    with tempfile.TemporaryDirectory(prefix="pages-") as name:
        directory = Path(name)
        take(directory, "c2", None, None, [(place, n % 5) for n, place in enumerate(ALL)])
        path = directory / "c2.index"
        index = bytearray(zlib.decompress(path.read_bytes()))
        for _ in range(more.draw(st.integers(1, 3))):
            at = more.draw(st.integers(0, len(index) - 1))
            index[at] = more.draw(st.integers(0, 255))
        path.write_bytes(zlib.compress(bytes(index)))
        with suppress(ValueError, OSError):
            use(directory)


def test_an_index_says_nothing_of_files_elsewhere(kept: Path) -> None:
    path = kept / "c2.index"
    index = msgspec.msgpack.decode(zlib.decompress(path.read_bytes()))
    index["files"][0] = "../c1.pages"
    path.write_bytes(zlib.compress(msgspec.msgpack.encode(index)))
    with pytest.raises(ValueError, match="elsewhere"):
        read_index(path)


def test_a_full_disk_comes_out_as_what_it_is(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object, at: int) -> int:
        raise OSError(28, "no space left")

    monkeypatch.setattr(pages, "GATHERED", PAGE)
    writer = PageWriter(PageTable(BLOCKS), None, tmp_path, "c1")
    with monkeypatch.context() as patch:
        patch.setattr(pages.os, "pwrite", full)
        with pytest.raises(OSError, match="no space left"):
            tell(writer, (1, 1), 1)
        with pytest.raises(OSError, match="no space left"):
            writer.close()
    assert writer._file.closed
