"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import eventually, lend
from vmjob.home import Home
from vmjob.image.store import Image

pytestmark = pytest.mark.vm

VMJOB = [sys.executable, "-m", "vmjob"]
SMALL = ["--memory", "256", "--accel", "tcg"]


def vmjob(*arguments: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*VMJOB, *arguments], capture_output=True, timeout=200,
                          **{"stdin": subprocess.DEVNULL, **more})  # type: ignore[call-overload,no-any-return]


@pytest.mark.usefixtures("vm_home")
def test_streams_and_exit_code_come_through() -> None:
    done = vmjob("run", *SMALL, "--env", "A=b c", "--", "sh", "-c",
                 'echo "out $A"; echo err >&2; exit 7')
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out b c\n", b"err\n")


@pytest.mark.usefixtures("vm_home")
def test_a_whole_job_with_input_files_and_record(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_text("1\n2\n")
    done = vmjob("run", *SMALL, "--json", "--in", f"{tmp_path}/tree:data", "--out",
                 f"result:{tmp_path}/", "--", "sh", "-c", "cat data/a - > result; echo done",
                 input=b"3\n", stdin=None)
    record = json.loads(done.stdout)
    assert (done.returncode, record["exit_code"], record["status"]) == (0, 0, "succeeded")
    assert done.stderr == b"done\n"
    assert (tmp_path / "result").read_text() == "1\n2\n3\n"
    assert record["outputs"][0]["size"] == 6
    assert len(record["outputs"][0]["sha256"]) == 64
    assert record["machine"]["accelerator"] == "tcg"
    assert record["machine"]["guest_kernel"] == record["image"]["kernel"]
    assert len(record["tasks"][0]["rusage"]) == 16
    assert record["phases"]["total"] > record["phases"]["thaw"] > 0


@pytest.mark.usefixtures("vm_home")
@pytest.mark.parametrize(("arguments", "code", "text"), [
    (["--", "no-such-program"], 127, "command-not-found"),
    (["--", "/etc/passwd"], 126, "command-not-executable"),
    (["--in", "/no/such/file", "--", "true"], 125, "input-missing"),
    (["--out", "../x", "--", "true"], 125, "bad-path"),
    (["--image", "nothing", "--", "true"], 125, "image-missing"),
    (["--memory", "1", "--", "true"], 125, "usage"),
    (["--accel", "whpx", "--", "true"], 125, "accelerator-unusable"),
    (["--env", "x", "--", "true"], 125, "usage"), (["--no-such-option"], 125, "No such option"),
    (["--out", "f", "--", "true"], 125, "output-missing")])
def test_what_goes_wrong_has_a_code_an_advice_and_no_traceback(
        arguments: list[str], code: int, text: str) -> None:
    done = vmjob("run", *arguments)
    assert done.returncode == code
    assert text.encode() in done.stderr
    assert b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) >= 2


@pytest.mark.usefixtures("vm_home")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_ends_job_and_machine_at_once(number: int, code: int, home: Home) -> None:
    process = subprocess.Popen([*VMJOB, "run", *SMALL, "--", "sh", "-c", "echo on; sleep 1000"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 1
        process.send_signal(number)
        assert process.wait(10) == code
    assert not any(child.is_running() for child in children)
    assert list(home.machines.iterdir()) == []


@pytest.mark.usefixtures("vm_home")
def test_a_killed_vmjob_takes_its_machine_along_and_the_next_one_sweeps(home: Home) -> None:
    process = subprocess.Popen([*VMJOB, "run", *SMALL, "--", "sh", "-c", "echo on; sleep 1000"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        (machine,) = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert eventually(lambda: not machine.is_running())
    (left,) = home.machines.iterdir()
    done = vmjob("clean", "--json", "--dry-run")
    assert json.loads(done.stdout)["machines"] == [left.name]
    assert json.loads(vmjob("clean", "--json").stdout)["machines"] == [left.name]
    assert list(home.machines.iterdir()) == []


@pytest.mark.usefixtures("vm_home")
def test_a_killed_hypervisor_is_told(home: Home) -> None:
    process = subprocess.Popen([*VMJOB, "run", *SMALL, "--", "sh", "-c", "echo on; sleep 1000"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        psutil.Process(process.pid).children(recursive=True)[0].kill()
        assert process.wait(30) == 125
        assert b"machine-died" in process.stderr.read()
    assert list(home.machines.iterdir()) == []


@pytest.mark.usefixtures("vm_home")
def test_a_reader_that_has_seen_enough_ends_the_job(home: Home) -> None:
    done = subprocess.run(["sh", "-c", f"{' '.join(VMJOB)} run --memory 256 -- yes | head -n 2"],
                          capture_output=True, timeout=100, stdin=subprocess.DEVNULL, check=True)
    assert (done.stdout, done.stderr) == (b"y\ny\n", b"")
    assert eventually(lambda: list(home.machines.iterdir()) == [])


@pytest.mark.usefixtures("vm_home")
def test_a_terminal_sees_what_is_being_done() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen([*VMJOB, "run", *SMALL, "--", "sh", "-c",
                                'echo "fraction_done 0.5" > $VMJOB_TO_HOST; sleep 1.5; echo end'],
                               stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    while True:
        try:
            seen += os.read(master, 4096)
        except OSError:
            break
    os.close(master)
    assert process.wait(60) == 0
    assert b"running" in seen
    assert b"[############------------]" in seen
    assert seen.rstrip().endswith(b"end") or b"end\r\n" in seen


@pytest.mark.parametrize("name", ["with blanks, a comma", "Ünïcödé-家", "long" * 50])
def test_the_home_may_have_any_name(name: str, tmp_path: Path, default_image: Image,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / name
    lend(default_image, Home(place))
    monkeypatch.setenv("VMJOB_HOME", str(place))
    done = vmjob("run", *SMALL, "--", "echo", "hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\n", b"")


def test_two_first_runs_at_once_build_one_image(home: Home) -> None:
    both = [subprocess.Popen([*VMJOB, "run", *SMALL, "--", "echo", str(number)],
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for number in range(2)]
    told = b""
    for number, process in enumerate(both):
        out, err = process.communicate(timeout=250)
        assert (process.returncode, out) == (0, f"{number}\n".encode()), err
        told += err
    assert told.count(b"building the image") == 1
    assert [path.name for path in home.images.iterdir()] == ["default"]


@pytest.mark.usefixtures("vm_home")
def test_the_doctor_knows_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    done = vmjob("doctor", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["can_run_jobs"]) == (0, True)
    found = {finding["what"]: finding for finding in report["findings"]}
    assert found["tcg"]["state"] == "ok"
    assert "booted" in found["tcg"]["found"]
    assert found["kvm"]["state"] in ("ok", "note")
    if found["kvm"]["state"] == "ok":
        assert "booted" in found["kvm"]["found"]
    for finding in report["findings"]:
        assert finding["state"] == "ok" or finding["advice"]
    monkeypatch.setenv("PATH", "/nonexistent")
    done = vmjob("doctor")
    assert done.returncode == 1
    assert b"apt install qemu-system-x86" in done.stdout


def test_a_computer_without_qemu_is_told_what_to_install(
        home: Home, default_image: Image, monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path) -> None:
    lend(default_image, home)
    monkeypatch.setenv("PATH", "/nonexistent")
    done = vmjob("run", *SMALL, "--", "true")
    assert done.returncode == 125
    assert b"program-missing" in done.stderr
    old = tmp_path / "qemu-system-x86_64"
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 5.2.0 (Debian)'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = vmjob("run", *SMALL, "--", "true")
    assert done.returncode == 125
    assert b"qemu-too-old" in done.stderr
