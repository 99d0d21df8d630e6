"""Processor time is never lost, places are never taken twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmjob.errors import Busy, HomeUnusable
from vmjob.wrapper import places, totals
from vmjob.wrapper.totals import FILE, Totals
from vmjob.wrapper.usage import Usage

BURN = "import time\nwhile time.process_time() < 0.3: pass\n"


def test_totals_are_found_again(tmp_path: Path) -> None:
    written = Totals(12.5, 10.0, 3, 2, {"busy": 1})
    totals.write(tmp_path, written)
    assert totals.read(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("data", [b"", b"{", b'{"cpu_seconds": -1}', b'{"cpu_seconds": 1e300}',
                                  b'{"cpu_seconds": "x"}', b"[]", b"\xff" * 100])
def test_totals_that_are_damaged_begin_anew(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE).write_bytes(data)
    assert totals.read(tmp_path) == Totals()


def test_totals_do_not_follow_a_link_that_the_job_may_have_made(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    slot = tmp_path / "slot"
    slot.mkdir()
    (slot / f"{FILE}.new").symlink_to(target)
    totals.write(slot, Totals(1.0))
    assert target.read_text() == "mine"


def test_processor_time_of_processes_that_run_and_that_have_ended_is_counted() -> None:
    usage = Usage()
    before = usage.measure().cpu_seconds
    subprocess.run([sys.executable, "-c", BURN], check=True)
    after = usage.measure()
    assert 0.25 <= after.cpu_seconds - before < 5
    with subprocess.Popen([sys.executable, "-c", BURN + "print(flush=True)\ninput()"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        usage = Usage()  # a new one looks for processes at once
        assert usage.measure().cpu_seconds >= after.cpu_seconds + 0.25
        assert usage.measure().memory_bytes > after.memory_bytes
        process.communicate(b"\n")
    assert usage.measure().cpu_seconds >= after.cpu_seconds + 0.25


def test_processor_time_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = Usage()
    first = usage.measure().cpu_seconds
    monkeypatch.setattr(os, "times", lambda: os.times_result((0.0,) * 5))
    assert usage.measure().cpu_seconds == first


def test_only_so_many_machines_run_at_once(tmp_path: Path) -> None:
    with places.taken(tmp_path / "p", 2) as one, places.taken(tmp_path / "p", 2) as two:
        assert {one, two} == {0, 1}
        with pytest.raises(Busy, match="2 virtual machines"), places.taken(tmp_path / "p", 2):
            pass
    with places.taken(tmp_path / "p", 2) as again:
        assert again == 0


def test_a_place_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    taker = ("import sys\nfrom pathlib import Path\nfrom vmjob.wrapper import places\n"
             "with places.taken(Path(sys.argv[1]), 1): print(flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", taker, str(tmp_path / "p")],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        with pytest.raises(Busy), places.taken(tmp_path / "p", 1):
            pass
        process.kill()
        process.wait()
    with places.taken(tmp_path / "p", 1):
        pass


def test_a_place_that_cannot_be_written_is_this_computers_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeUnusable), places.taken(tmp_path / "file" / "p", 1):
        pass
