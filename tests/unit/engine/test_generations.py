"""Two generations of checkpoints: whatever spoils one of them, the other is found."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from vmjob.engine import generations as generations_module
from vmjob.engine.generations import Draft, Generation, Generations
from vmjob.engine.progress import Progress
from vmjob.errors import CheckpointFailed, CheckpointUnusable
from vmjob.host import durable
from vmjob.machine.contract import Checkpoint

PROGRESS = Progress([], 1, {"stdout": 3, "stderr": 0}, {"stdout": 3, "stderr": 0}, 1.5, 0)
#: The functions that a publish changes the disk with.
STEPS = ("write", "sync", "replace", "remove")


@pytest.fixture
def made(tmp_path: Path) -> Generations:
    return Generations(tmp_path / "checkpoints")


def publish(made: Generations, *shared: str) -> Generation:
    """The next generation: a file of its own, one that stays, and what it shares with others."""
    number = made.next_number()
    own = f"{number:06}.pages"
    (made.directory / own).write_bytes(os.urandom(3000))
    if not (made.directory / "root").exists():
        (made.directory / "root").write_bytes(os.urandom(5000))
    draft = Draft(number, 0.0, "fake", "", {"memory_mb": 1}, PROGRESS)
    return made.publish(draft, Checkpoint((own, "root", *shared), {"own": own}, 0.0, 0))


def found(made: Generations) -> tuple[list[int], list[str]]:
    """Numbers of the generations that are good, and what is said of the others."""
    good: list[int] = []
    bad: list[str] = []
    for each in made.newest_first():
        if isinstance(each, Generation):
            good.append(each.number)
        else:
            bad.append(each.message)
    return good, bad


def names(made: Generations) -> set[str]:
    return {path.name for path in made.directory.iterdir()} - {"verified"}


def test_two_generations_are_kept_and_older_ones_go_with_files_that_nobody_needs(
        made: Generations) -> None:
    for _ in range(3):
        publish(made)
    publish(made, "000002.pages")
    assert names(made) == {"000003.json", "000003.pages", "000004.json", "000004.pages", "root",
                           "000002.pages"}
    assert found(Generations(made.directory)) == ([4, 3], [])
    publish(made)
    publish(made)
    assert names(made) == {"000005.json", "000005.pages", "000006.json", "000006.pages", "root"}


def test_a_generation_says_what_it_was_made_of(made: Generations) -> None:
    draft = Draft(1, 12.5, "qemu", "a processor", {"memory_mb": 256}, PROGRESS)
    (made.directory / "a").write_bytes(b"abc")
    kept = made.publish(draft, Checkpoint(("a",), {"x": ["y"]}, 0.0, 3))
    (read,) = made.newest_first()
    assert read == kept
    assert isinstance(read, Generation)
    assert (read.progress, read.shape, read.processor) == (PROGRESS, {"memory_mb": 256},
                                                           "a processor")
    assert made.saved(read).state == {"x": ["y"]}
    assert made.saved(read).directory == made.directory


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def link_elsewhere(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


def become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [flip, truncate, lengthen, empty, remove, link_elsewhere, become_a_directory,
           become_a_pipe]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["000003.json", "000003.pages"])
def test_when_the_newest_is_spoiled_the_older_is_used_and_it_is_said(
        made: Generations, name: str, damage: Callable[[Path], None]) -> None:
    for _ in range(3):
        publish(made)
    damage(made.directory / name)
    good, bad = found(Generations(made.directory))
    assert good == [2]
    if (name, damage) != ("000003.json", remove):  # then there never was a third
        (said,) = bad
        assert "checkpoint 000003 " in said or "checkpoint 3 " in said


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_said_even_when_the_slot_was_tidied_first(
        made: Generations, damage: Callable[[Path], None]) -> None:
    publish(made)
    publish(made)
    damage(made.directory / "000002.json")
    later = Generations(made.directory)
    later.tidy()
    good, bad = found(later)
    assert good == [1]
    assert len(bad) == (0 if damage is remove else 1)
    assert found(later) == ([1], [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_both_are_spoiled_there_is_none_and_no_exception(
        made: Generations, damage: Callable[[Path], None]) -> None:
    publish(made)
    publish(made)
    damage(made.directory / "000001.json")
    damage(made.directory / "000002.pages")
    assert found(Generations(made.directory))[0] == []
    later = Generations(made.directory)
    later.restart()
    assert names(later) == set()
    for _ in range(3):
        publish(later)
    assert found(later) == ([3, 2], [])


def test_a_damaged_shared_file_spoils_every_generation_that_needs_it(made: Generations) -> None:
    publish(made)
    publish(made)
    flip(made.directory / "root")
    good, bad = found(Generations(made.directory))
    assert good == []
    assert len(bad) == 2


def test_a_file_that_nobody_needs_spoils_nothing(made: Generations) -> None:
    publish(made)
    (made.directory / "extra").write_text("x")
    (made.directory / "more").mkdir()
    (made.directory / "000009.json.new").write_text("{}")
    assert found(Generations(made.directory)) == ([1], [])
    made.tidy()
    assert names(made) == {"000001.json", "000001.pages", "root"}


def test_a_spoiled_generation_is_not_one_of_the_two_that_are_kept(made: Generations) -> None:
    """Or the good one that the job went on from would be removed for it."""
    publish(made)
    publish(made)
    flip(made.directory / "000002.pages")
    later = Generations(made.directory)
    assert found(later)[0] == [1]
    later.go_back(1)
    assert "000002.json" not in names(made)
    publish(later)
    assert len(found(Generations(made.directory))[0]) == 2


def test_a_number_is_never_used_twice_while_anything_of_it_is_left(made: Generations) -> None:
    assert made.next_number() == 1
    publish(made)
    publish(made)
    assert made.next_number() == 3
    (made.directory / "000007.index").write_text("of one that failed")
    assert publish(made).number == 8
    assert found(made)[0] == [8, 2]


def test_numbers_may_outgrow_their_digits(made: Generations) -> None:
    (made.directory / "999998.pages").write_text("x")
    assert [publish(made).number for _ in range(3)] == [999999, 1000000, 1000001]
    assert found(Generations(made.directory)) == ([1000001, 1000000], [])


def test_a_job_that_went_back_never_meets_what_was_newer(made: Generations) -> None:
    publish(made)
    publish(made)
    made.go_back(1)
    assert found(Generations(made.directory)) == ([1], [])
    made.go_back(1)
    assert found(Generations(made.directory)) == ([1], [])


def test_a_generation_of_another_version_is_not_used(
        made: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(made)
    monkeypatch.setattr(generations_module, "FORMAT", generations_module.FORMAT + 1)  # ours
    assert found(made) == ([], ["the checkpoint 000001 is of another version of vmjob"])


def test_a_manifest_under_another_number_is_not_used(made: Generations) -> None:
    publish(made)
    shutil.copy(made.directory / "000001.json", made.directory / "000002.json")
    good, bad = found(made)
    assert good == [1]
    assert len(bad) == 1


def test_a_generation_that_names_a_file_elsewhere_is_not_used(made: Generations) -> None:
    outside = made.directory.parent / "outside"
    outside.write_bytes(b"x")
    draft = Draft(1, 0.0, "fake", "", {}, PROGRESS)
    made.publish(draft, Checkpoint(("../outside",), {}, 0.0, 0))
    assert found(Generations(made.directory))[0] == []


# -- a manifest that is too long ---------------------------------------------------------------


def test_a_manifest_that_could_not_be_read_is_not_published(
        made: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(made)
    publish(made)
    before = names(made)
    longest = max(path.stat().st_size for path in made.directory.glob("*.json"))
    with monkeypatch.context() as patch:
        patch.setattr(generations_module, "MAX_MANIFEST", longest)
        with pytest.raises(CheckpointFailed, match="too many files"):
            publish(made, "000002.pages")  # it needs a file more than the others
    # The driver's next checkpoint may need the files of this one.
    assert names(made) == before | {"000003.pages"}
    assert found(Generations(made.directory)) == ([2, 1], [])
    assert publish(made, "000003.pages").number == 4
    assert found(Generations(made.directory)) == ([4, 2], [])


def test_a_manifest_just_as_long_as_may_be_is_read_again(
        made: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = Generations(made.directory.parent / "alike")
    publish(alike)
    monkeypatch.setattr(generations_module, "MAX_MANIFEST",
                        (alike.directory / "000001.json").stat().st_size)
    publish(made)
    assert found(Generations(made.directory)) == ([1], [])


def test_manifests_that_are_always_too_long_do_not_fill_the_disk(
        made: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(made)
    before = names(made)
    with monkeypatch.context() as patch:
        patch.setattr(generations_module, "MAX_MANIFEST",
                      (made.directory / "000001.json").stat().st_size)
        for number in (2, 3, 4):
            with pytest.raises(CheckpointFailed):
                publish(made, "000001.pages")
            assert names(made) == before | {f"00000{number}.pages"}


def test_a_manifest_of_many_files_in_shared_folders_is_read_again(made: Generations) -> None:
    """50000 files: more than 4 MiB, which was the longest once."""
    stamp = ["f", 123456, 420, 1795347536946046433, 1234567]
    shared = {"shared": {"agreed": {f"{n:040}": [stamp, stamp] for n in range(50_000)}}}
    (made.directory / "a").write_bytes(b"abc")
    draft = Draft(1, 0.0, "fake", "", {}, structs.replace(PROGRESS, folders=shared))
    kept = made.publish(draft, Checkpoint(("a",), {}, 0.0, 0))
    assert (made.directory / "000001.json").stat().st_size > 4 << 20
    assert list(Generations(made.directory).newest_first()) == [kept]


# -- the seal ----------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are read for their checksum."""
    names: list[str] = []
    real = generations_module.digest

    def digest(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(generations_module, "digest", digest)
    return names


def newest(made: Generations) -> Generation:
    first = next(iter(Generations(made.directory).newest_first()))
    assert not isinstance(first, CheckpointUnusable), first
    return first


def test_a_file_that_nobody_touched_is_not_read_again(made: Generations, read: list[str]) -> None:
    publish(made)
    assert sorted(read) == ["000001.pages", "root"]
    publish(made)
    assert sorted(read) == ["000001.pages", "000002.pages", "root"]
    newest(made)
    assert len(read) == 3


def test_a_file_that_was_touched_is_read_again_once(made: Generations, read: list[str]) -> None:
    publish(made)
    read.clear()
    os.utime(made.directory / "root")
    newest(made)
    assert read == ["root"]
    newest(made)
    assert read == ["root"]


def test_damage_done_before_the_next_checkpoint_is_not_sealed_with_it(made: Generations) -> None:
    """A shared file is not read for each checkpoint; so it must not be called verified by one."""
    publish(made)
    flip(made.directory / "root")
    publish(made)
    assert found(Generations(made.directory))[0] == []


def test_after_another_start_of_the_computer_everything_is_read(
        made: Generations, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(made)
    read.clear()
    for module in ("vmjob.host.seal", "vmjob.engine.generations"):
        monkeypatch.setattr(f"{module}.boot_id", lambda: "another")
    newest(made)
    assert sorted(read) == ["000001.pages", "root"]
    newest(made)
    assert len(read) == 2


@pytest.mark.parametrize("seal", [b"", b"[]", b'{"boot": 1}', b'{"parts": []}', b"\xff"])
def test_a_seal_that_cannot_be_read_is_no_seal(made: Generations, read: list[str],
                                               seal: bytes) -> None:
    publish(made)
    read.clear()
    (made.directory / "verified").write_bytes(seal)
    newest(made)
    assert sorted(read) == ["000001.pages", "root"]


# -- a full disk -------------------------------------------------------------------------------


def calls_of(made: Generations, monkeypatch: pytest.MonkeyPatch, fail_at: int | None) -> int:
    """Publish, failing at one call of `durable`; how many calls there were."""
    count = 0

    def instead(name: str) -> Callable[..., None]:
        real = getattr(durable, name)

        def step(*arguments: Path | bytes) -> None:
            nonlocal count
            count += 1
            if count - 1 == fail_at:
                if name == "write":  # a part of it may be there
                    assert isinstance(arguments[0], Path)
                    arguments[0].write_bytes(b'{"sha')
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*arguments)

        return step

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(durable, name, instead(name))
        publish(made)
    return count


def test_a_publish_that_fails_at_any_step_leaves_the_older_ones_usable(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = 1, 0
    while step < steps:
        made = Generations(tmp_path / f"{step}")
        publish(made)
        publish(made)
        if step == 0:
            shutil.copytree(made.directory, tmp_path / "counted")
            steps = calls_of(Generations(tmp_path / "counted"), monkeypatch, None)
            assert steps > 6
        with pytest.raises(OSError, match="No space left"):
            calls_of(made, monkeypatch, step)
        for again in (Generations(made.directory), made):
            good, bad = found(again)
            assert good[:2] in ([2, 1], [3, 2])
            assert bad == []
        assert publish(made).number > 2
        made.tidy()
        assert len(found(made)[0]) == 2
        assert len(names(made)) <= 6
        step += 1
