"""A job in a slot ends with the right answer, whatever is killed, and however often."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.campaign.kills import Field, Outcome, Strike
from tests.campaign.steps import Step, golden, struck
from tests.conftest import eventually
from vmjob.home import Home

pytestmark = pytest.mark.vm

VMJOB = [sys.executable, "-m", "vmjob"]
SMALL = ["--memory", "256", "--accel", "tcg", "--checkpoint-every", "1"]


@pytest.fixture
def field(tmp_path: Path, vm_home: Home) -> Field:
    made = Field(tmp_path, vm_home)
    made.clear()
    return made


def vmjob(*arguments: str | Path, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*VMJOB, "run", *arguments], capture_output=True, timeout=200,
                          **{"stdin": subprocess.DEVNULL, **more})  # type: ignore[call-overload,no-any-return]


def interrupted(field: Field, mode: str = "self") -> Outcome:
    """A run that is killed when it has made two checkpoints and wants to seal a third."""
    for _ in range(3):  # on a busy computer a job may end before its third checkpoint
        outcome = field.run(Strike("checkpoint qmp migrate", 3, mode), every=0.3)
        if outcome.reached:
            return outcome
        field.clear()
    raise AssertionError(outcome)


def damage(field: Field, number: int) -> None:
    path = field.slot / "checkpoints" / f"{number:06}.devices"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def ended_well(field: Field) -> None:
    assert list(field._wrong_at_the_end()) == []


# -- kills, one of each kind; the campaign has hundreds ------------------------------------------


@pytest.mark.parametrize("strikes", [
    pytest.param([Strike("run agent POST /tasks", 1, "self")], id="start"),
    pytest.param([Strike("checkpoint qmp migrate", 2, "self"),
                  Strike("restore qmp migrate-incoming", 1, "self")], id="memory, restore"),
    pytest.param([Strike("checkpoint qmp migrate-continue", 2, "both"),
                  Strike("run fsync", 1, "both")], id="devices, resumed run"),
    pytest.param([Strike("checkpoint rename", 4, "self")], id="publish"),
    pytest.param([Strike("checkpoint qmp migrate", 2, "hypervisor")], id="QEMU alone"),
    pytest.param([Strike("outputs mkdir", 1, "self"),
                  Strike("ended rename", 1, "self")], id="output, end"),
])
def test_a_killed_job_ends_with_the_right_answer(field: Field, strikes: list[Strike]) -> None:
    case = field.case(iter(strikes))
    assert case.wrong == []
    assert [run.reached for run in case.runs if run.strike] == [True] * len(strikes)
    assert any(run.told("continues") for run in case.runs) or len(strikes) == 1


#: A few of the numbered steps of `script/campaign steps`, which goes through all of them.
NUMBERED = [
    (Step("first", "checkpoint link base", 1), "self"),
    (Step("first", "checkpoint rename N.json", 1), "both"),
    (Step("resumed", "restore qmp cont", 1), "hypervisor"),
    (Step("stopped", "stop checkpoint sync checkpoints", 2), "self"),
    (Step("stopped", "stop checkpoint qmp migrate-continue", 1), "hypervisor"),
]


def test_a_kill_at_a_numbered_step_costs_no_answer(field: Field, tmp_path: Path) -> None:
    golden(field, tmp_path / "golden")
    for step, mode in NUMBERED:
        case = struck(field, tmp_path / "golden", step, mode)
        assert case.wrong == [], (step, mode)
        assert case.runs[0].reached, (step, mode)


@pytest.mark.parametrize("mode", ["SIGTERM", "SIGSTOP", "SIGTSTP"])
def test_a_signal_loses_nothing(field: Field, mode: str) -> None:
    """SIGTERM: a last checkpoint, from which it goes on. Stopped: it goes on when it is woken."""
    outcome = field.run(Strike("run agent POST /output", 3, mode))
    assert outcome.reached
    if mode == "SIGTERM":
        assert outcome.code == 143
        assert outcome.told("published")
        assert f"continue with: vmjob run --resume {field.slot}" in outcome.stderr
        last = outcome.told("published")[-1]
        outcome = field.run()
        assert outcome.told("continues") == [last]
    else:
        assert outcome.stopped
    assert outcome.code == 0, outcome.stderr
    ended_well(field)


def test_a_killed_qemu_is_told_and_the_job_can_be_continued(field: Field) -> None:
    outcome = interrupted(field, "hypervisor")
    assert (outcome.code, "[machine-died]" in outcome.stderr) == (125, True), outcome.stderr
    newest = field.newest()
    assert newest == 2
    outcome = field.run()
    assert (outcome.code, outcome.told("continues")) == (0, [newest]), outcome.stderr
    ended_well(field)


@pytest.mark.parametrize("kind", [
    "restore spawn setpriv", "restore qmp migrate-set-capabilities",
    "restore qmp migrate-incoming", "restore agent GET /hello"])
def test_an_interrupted_restore_leaves_nothing_and_loses_nothing(field: Field, kind: str) -> None:
    interrupted(field)
    before = sorted(path.name for path in (field.slot / "checkpoints").iterdir()
                    if path.suffix == ".json")
    outcome = field.run(Strike(kind, 1, "SIGINT"))
    assert (outcome.code, outcome.reached) == (130, True), outcome.stderr
    assert outcome.stderr == f"vmjob: stopped; continue with: vmjob run --resume {field.slot}\n"
    assert field.left() == []
    assert {path.name for path in field.slot.iterdir()} == {
        "job.json", "stdin", "stdout", "stderr", "checkpoints", "lock"}
    assert sorted(path.name for path in (field.slot / "checkpoints").iterdir()
                  if path.suffix == ".json") == before
    outcome = field.run()
    assert (outcome.code, outcome.told("continues")) == (0, [2]), outcome.stderr
    ended_well(field)


# -- damage ------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_told_and_the_older_one_used(field: Field) -> None:
    interrupted(field)
    damage(field, 2)
    outcome = field.run()
    assert "checkpoint 2 is damaged: 000002.devices" in outcome.stderr
    assert (outcome.code, outcome.told("continues")) == (0, [1])
    ended_well(field)


def test_without_a_good_checkpoint_the_job_begins_anew_and_says_why(field: Field) -> None:
    interrupted(field)
    damage(field, 1)
    (field.slot / "checkpoints" / "000002.json").write_bytes(b"{")
    outcome = field.run()
    assert "checkpoint 000002 cannot be read" in outcome.stderr
    assert "checkpoint 1 is damaged" in outcome.stderr
    assert (outcome.code, outcome.told("continues")) == (0, [])
    ended_well(field)


# -- the command -------------------------------------------------------------------------------


@pytest.mark.usefixtures("vm_home")
def test_an_ended_job_is_told_again_and_not_run_again(tmp_path: Path) -> None:
    slot, counted = tmp_path / "slot", tmp_path / "counted"
    done = vmjob(*SMALL, "--slot", slot, "--json", "--out", f"f:{counted}", "--", "sh", "-c",
                 "echo x > f; exit 7")
    assert done.returncode == 7
    counted.unlink()
    for _ in range(2):
        again = vmjob("--resume", slot, "--json")
        told, first = json.loads(again.stdout), json.loads(done.stdout)
        assert again.returncode == 7
        assert [told[key] for key in ("exit_code", "tasks", "outputs", "phases")] == [
            first[key] for key in ("exit_code", "tasks", "outputs", "phases")]
        assert not counted.exists()
        assert {path.name for path in slot.iterdir()} == {
            "job.json", "stdout", "stderr", "result.json", "lock"}


@pytest.mark.usefixtures("vm_home")
def test_a_slot_belongs_to_one_process(tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    with subprocess.Popen([*VMJOB, "run", *SMALL, "--slot", slot, "--", "sh", "-c",
                           "echo on; sleep 1000"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"on\n"
        for arguments in (["--resume", slot], ["--slot", slot, "--", "true"]):
            done = vmjob(*arguments)
            assert done.returncode == 125
            assert f"(process {first.pid}) [busy]".encode() in done.stderr
        children = psutil.Process(first.pid).children()
        first.send_signal(signal.SIGINT)
        assert first.wait(30) == 130
    assert eventually(lambda: not any(child.is_running() for child in children))


def test_only_run_time_counts_for_the_time_limit_over_all_processes(field: Field) -> None:
    """The clock goes on from what the checkpoint says: it does not begin anew, nor runs between."""
    first = field.run(Strike("checkpoint qmp migrate", 2, "self"), every=0.3, time_limit=1000.0)
    assert first.reached
    before = _run_seconds(field)
    assert 0 < before < 100
    asked = msgspec.json.decode((field.slot / "job.json").read_bytes())
    asked["job"]["time_limit"] = before  # none is left
    (field.slot / "job.json").write_bytes(msgspec.json.encode(asked))
    outcome = field.run()
    assert "[time-limit]" in outcome.stderr
    assert outcome.told("continues") == [1]


def _run_seconds(field: Field) -> float:
    sealed = json.loads((field.slot / "checkpoints" / "000001.json").read_bytes())
    return float(sealed["generation"]["progress"]["run_seconds"])


@pytest.mark.usefixtures("vm_home")
def test_input_goes_on_where_the_checkpoint_had_it(tmp_path: Path) -> None:
    """The machine had taken a part of it, of which a part was after the checkpoint."""
    slot, given = tmp_path / "slot", os.urandom(3_000_000)
    script = ("import sys,hashlib,time\n"
              "h=hashlib.sha256()\n"
              "while d:=sys.stdin.buffer.read(100000):\n"
              "    h.update(d); print(len(d), flush=True); time.sleep(0.15)\n"
              "print(h.hexdigest())\n")
    with subprocess.Popen([*VMJOB, "run", *SMALL, "--slot", slot, "--", "python3", "-c", script],
                          stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(given)
        process.stdin.close()
        assert eventually((slot / "checkpoints" / "000001.json").exists, 60)
        before = (slot / "stdout").stat().st_size
        assert eventually(lambda: (slot / "stdout").stat().st_size > before, 60)
        process.kill()
    done = vmjob("--resume", slot)
    assert done.returncode == 0, done.stderr
    lines = (slot / "stdout").read_text().split()
    assert lines == ["100000"] * 30 + [hashlib.sha256(given).hexdigest()]
