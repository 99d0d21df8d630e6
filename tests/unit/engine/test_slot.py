"""A slot: one owner, one job, its output to the byte, and nothing of others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from vmjob.engine.generations import Draft, Generation
from vmjob.engine.progress import Progress
from vmjob.engine.record import Record
from vmjob.engine.slot import Asked, AskedMachine, Slot, Streams
from vmjob.errors import Busy, HomeUnusable, HostDiskFull, SlotUnusable, UsageError
from vmjob.host import durable
from vmjob.job.files import Input, Output
from vmjob.job.model import Job, Network, OnFlood, Task
from vmjob.machine.contract import Checkpoint

ASKED = Asked(Job((Task(("true",)),)))
#: Owns the slot that it is given until it is told to end, or killed.
OWNER = """
import sys
from pathlib import Path
from vmjob.engine.slot import Slot
with Slot.claim(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "slot"


def owner_of(root: Path) -> subprocess.Popen[bytes]:
    """Another process that owns a slot."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, root], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"mine\n"
    return process


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def publish(slot: Slot) -> Generation:
    directory = slot.generations.directory
    number = slot.generations.next_number()
    (directory / f"{number:06}.pages").write_bytes(os.urandom(100))
    progress = Progress([], 1, {}, {}, 0.0, 0)
    return slot.generations.publish(Draft(number, 0.0, "fake", "", {}, progress),
                                    Checkpoint((f"{number:06}.pages",), {}, 0.0, 0))


# -- one owner ---------------------------------------------------------------------------------


def test_a_second_owner_is_turned_away_at_once_and_told_who_the_first_is(root: Path) -> None:
    with owner_of(root) as other:
        with pytest.raises(Busy, match=rf"\(process {other.pid}\)"), Slot.claim(root):
            pass
        other.communicate(b"")
    assert other.returncode == 0
    with Slot.claim(root):
        pass


def test_who_is_turned_away_changes_nothing(root: Path) -> None:
    with Slot.claim(root) as slot:
        slot.begin(ASKED)
        publish(slot)
    with owner_of(root) as other:
        (root / "machine").mkdir()
        before = names(root)
        with pytest.raises(Busy), Slot.claim(root):
            pass
        assert names(root) == before
        other.communicate(b"")


def test_the_slot_of_a_killed_owner_is_free_at_once(root: Path) -> None:
    with owner_of(root) as other:
        other.send_signal(signal.SIGKILL)
    assert (root / "owner.json").exists()
    with Slot.claim(root):
        assert json.loads((root / "owner.json").read_text())["pid"] == os.getpid()
    assert not (root / "owner.json").exists()


@pytest.mark.parametrize("said", [json.dumps({"pid": os.getppid()}), "{", "", "[]", '{"pid": "x"}'])
def test_what_a_dead_owner_said_of_itself_does_not_matter(root: Path, said: str) -> None:
    """Its process id may be another's by now."""
    with Slot.claim(root) as slot:
        slot.begin(ASKED)
    (root / "owner.json").write_text(said)
    with Slot.claim(root):
        pass


def test_an_owner_that_fails_says_goodbye_as_well(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), Slot.claim(root):
        raise ZeroDivisionError
    assert not (root / "owner.json").exists()


def test_what_a_killed_owner_left_of_its_machine_is_removed(root: Path) -> None:
    with Slot.claim(root) as slot:
        slot.begin(ASKED)
        publish(slot)
    (root / "machine" / "deep").mkdir(parents=True)
    (root / "machine" / "overlay.qcow2").write_text("x")
    (root / "checkpoints" / "000002.pages").write_text("half")
    with Slot.claim(root):
        assert not (root / "machine").exists()
        assert names(root / "checkpoints") == {"000001.json", "000001.pages", "verified"}


def test_the_machine_of_an_owner_is_gone_when_it_is_done_with_it(root: Path) -> None:
    with Slot.claim(root) as slot:
        with slot.machine_place() as (name, directory):
            (directory / "overlay.qcow2").write_text("x")
            assert name
        assert not directory.exists()
        with pytest.raises(ZeroDivisionError), slot.machine_place() as (_, directory):
            raise ZeroDivisionError
        assert not directory.exists()


def test_the_slot_of_a_machine_without_a_job_is_tidied_as_well(root: Path) -> None:
    with Slot.claim(root) as slot:
        slot.begin_machine(AskedMachine(memory_mb=256))
        publish(slot)
    (root / "machine").mkdir()
    (root / "checkpoints" / "000002.pages").write_text("half")
    with Slot.claim(root) as slot:
        assert slot.asked_machine() == AskedMachine(memory_mb=256)
        assert not (root / "machine").exists()
        assert names(root / "checkpoints") == {"000001.json", "000001.pages", "verified"}


# -- what is not ours --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoints/model.bin", "machine/notes", "stdin", "thesis.tex",
                                  "job.json", "machine.json", "result.json"])
def test_a_directory_of_something_else_is_left_alone(root: Path, name: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    beside = root / "checkpoints" / "precious"
    beside.parent.mkdir(exist_ok=True)
    beside.write_text("x")
    with pytest.raises(SlotUnusable), Slot.claim(root):
        pass
    assert path.read_text() == "{}"
    assert beside.exists()


def test_a_slot_whose_first_owner_was_killed_before_it_had_a_job_can_be_used(root: Path) -> None:
    with Slot.claim(root):
        (root / "stdin").write_bytes(b"half of the inp")
        (root / "job.json.new").write_bytes(b"{")
    with Slot.claim(root) as slot:
        assert not slot.has_job
        assert not (root / "stdin").exists()
        slot.begin(ASKED)


def test_a_place_that_cannot_be_a_slot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(HomeUnusable, match="as a slot"), Slot.claim(path):
            pass


def test_a_full_disk_is_told_as_such(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(HostDiskFull), Slot.claim(root):
            pass
    with Slot.claim(root) as slot, monkeypatch.context() as patch:
        for name in ("write", "replace", "sync"):
            patch.setattr(durable, name, full)
            with pytest.raises(HostDiskFull):
                slot.begin(ASKED)
        patch.undo()
        slot.begin(ASKED)


# -- the job -----------------------------------------------------------------------------------


def test_a_job_is_read_as_it_was_written(root: Path) -> None:
    job = Job(tasks=(Task(("python3", "a b", "ü\n"), env={"A": "b c", "LEER": ""}, cwd="/tmp",
                          user="root", cpu_seconds=1.5, memory_bytes=1, file_bytes=2, processes=3),
                     Task(("true",))),
              image="science", inputs=(Input(Path("/data/ü"), "data"),),
              outputs=(Output("out", Path("/results/out")),), memory_mb=256, cpus=2, disk_gb=3,
              network=Network.NAT, time_limit=2.5, output_limit=7, stream_limit=8,
              on_flood=OnFlood.STOP)
    asked = Asked(job, "tcg", "baseline", 60.0)
    with Slot.claim(root) as slot:
        slot.begin(asked)
    with Slot.claim(root) as slot:
        assert slot.has_job
        assert slot.asked() == asked


def test_a_job_can_be_continued_from_another_directory(
        root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Slot.claim(root) as slot:
        slot.begin(Asked(Job((Task(("true",)),), inputs=(Input(Path("data"), "data"),))))
        (given,) = slot.asked().job.inputs
        assert given == Input(tmp_path / "data", "data")


def test_a_path_is_kept_that_is_no_text(root: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xc3"))
    job = Job((Task(("true",)),), inputs=(Input(odd, "data"),), outputs=(Output("out", odd),))
    with Slot.claim(root) as slot:
        slot.begin(Asked(job))
    with Slot.claim(root) as slot:
        assert slot.asked().job == job


def test_words_that_are_no_text_are_refused(root: Path) -> None:
    with Slot.claim(root) as slot:
        with pytest.raises(UsageError, match="not"):
            slot.begin(Asked(Job((Task(("echo", "\udcff")),))))
        assert not slot.has_job


def test_a_slot_has_one_job(root: Path) -> None:
    with Slot.claim(root) as slot:
        slot.begin(ASKED)
        with pytest.raises(SlotUnusable, match="has a job already"):
            slot.begin(Asked(Job((Task(("false",)),))))
        assert slot.asked() == ASKED


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"job": {}}', b"\xff\xfe",
                                     b'{"job": {"tasks": [{"argv": [1]}]}}'])
def test_a_damaged_job_is_told_and_nothing_is_removed(root: Path, content: bytes) -> None:
    with Slot.claim(root) as slot:
        slot.begin(ASKED)
        publish(slot)
    (root / "job.json").write_bytes(content)
    before = names(root / "checkpoints")
    with pytest.raises(SlotUnusable, match="cannot be read"), Slot.claim(root):
        pass
    assert names(root / "checkpoints") == before


def test_a_slot_without_job_has_nothing_to_continue(root: Path) -> None:
    with Slot.claim(root) as slot, pytest.raises(SlotUnusable, match="there is no job"):
        slot.asked()


# -- its output --------------------------------------------------------------------------------


def test_output_after_the_checkpoint_is_forgotten_and_goes_on_from_there(root: Path) -> None:
    with Slot.claim(root) as slot:
        streams = Streams(slot, {})
        streams.write("stdout", b"12345")
        streams.write("stderr", b"ab")
        streams.sync()
        streams.close()
        streams = Streams(slot, {"stdout": 3, "stderr": 0})
        streams.write("stdout", b"xy")
        streams.close()
    assert (root / "stdout").read_bytes() == b"123xy"
    assert (root / "stderr").read_bytes() == b""


def test_output_of_a_job_that_begins_anew_is_forgotten(root: Path) -> None:
    with Slot.claim(root) as slot:
        (root / "stdout").write_bytes(b"old")
        Streams(slot, {}).close()
    assert (root / "stdout").read_bytes() == b""


def test_output_shorter_than_its_checkpoint_says_is_refused(root: Path) -> None:
    with Slot.claim(root) as slot:
        (root / "stdout").write_bytes(b"123")
        with pytest.raises(SlotUnusable, match="shorter"):
            Streams(slot, {"stdout": 4})
        assert (root / "stdout").read_bytes() == b"123"


def test_the_names_of_the_output_are_safe_before_anything_is_written_to_it(
        root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(durable, "sync",
                        lambda path: synced.append((path, (path / "stderr").exists())))
    with Slot.claim(root) as slot:
        Streams(slot, {}).close()
    assert synced[0] == (root.parent, False)  # the slot's own name
    assert synced[-1] == (root, True)


# -- its end -----------------------------------------------------------------------------------


def test_the_end_keeps_the_result_and_nothing_to_continue_with(root: Path) -> None:
    record = Record(exit_code=3, status="failed", machine={"accelerator": "tcg"})
    with Slot.claim(root) as slot:
        assert slot.result() is None
        slot.begin(ASKED)
        publish(slot)
        assert slot.disk_bytes() > 0
        slot.end(record)
    assert names(root) == {"job.json", "result.json", "lock"}
    for _ in range(2):
        with Slot.claim(root) as slot:
            assert msgspec.to_builtins(slot.result()) == msgspec.to_builtins(record)
        assert names(root) == {"job.json", "result.json", "lock"}


def test_checkpoints_that_outlived_the_end_are_removed(root: Path) -> None:
    with Slot.claim(root) as slot:
        slot.begin(ASKED)
        publish(slot)
    (root / "result.json").write_bytes(msgspec.json.encode(Record(exit_code=0)))
    with Slot.claim(root) as slot:
        assert slot.result() is not None
    assert names(root) == {"job.json", "result.json", "lock"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_damaged_result_is_told(root: Path, content: bytes) -> None:
    with Slot.claim(root) as slot:
        slot.begin(ASKED)
        (root / "result.json").write_bytes(content)
        with pytest.raises(SlotUnusable):
            slot.result()
