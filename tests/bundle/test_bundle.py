"""vmjob for volunteers: one file and an archive, on a computer that has neither Python nor QEMU."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.bundle.conftest import VMJOB, Bundles, Computer

pytestmark = pytest.mark.vm

#: Seconds for a job that boots a machine, emulated, while other things run.
BOOT = 200


def unpacked_in(programs: Path) -> list[str]:
    return sorted(path.name for path in programs.iterdir())


def environments_in(root: Path) -> list[dict[str, str]]:
    """Of the processes whose root directory that is."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if Path(f"/proc/{process.pid}/root").readlink() == root:
                found.append(process.environ())
    return found


def test_it_runs_where_there_is_no_python_and_no_qemu_and_tmp_cannot_be_written(
        computer: Computer) -> None:
    for missing in ("python3", "qemu-system-x86_64", "qemu-img"):
        assert computer.run("sh", "-c", f"command -v {missing}").returncode == 127
    assert computer.run("sh", "-c", ": > /tmp/x").returncode != 0
    done = computer.run(VMJOB, "--version")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"vmjob, version ")
    assert len(unpacked_in(computer.programs)) == 1


def test_a_later_start_unpacks_nothing(computer: Computer) -> None:
    computer.run(VMJOB, "--version")
    place = computer.programs / unpacked_in(computer.programs)[0]
    before = (place / "whole").stat()
    (computer.root / "usr" / "bin" / "gzip").unlink()
    assert computer.run(VMJOB, "--version").returncode == 0
    assert (place / "whole").stat() == before


def test_all_of_vmjob_is_in_it(computer: Computer) -> None:
    """Commands, and what else is loaded when it is needed."""
    computer.run(VMJOB, "--version")
    place = computer.programs / unpacked_in(computer.programs)[0]
    script = """
import importlib, pkgutil, vmjob
for module in pkgutil.walk_packages(vmjob.__path__, "vmjob."):
    if not module.name.endswith("__main__") and "library" not in module.name.split("."):
        importlib.import_module(module.name)
import rich.progress
from vmjob.image.guestfiles import digest_input
print(len(digest_input()))
"""
    done = computer.run(f"/{place.relative_to(computer.root)}/bin/python3", "-c", script)
    assert (done.returncode, done.stderr) == (0, b"")
    from vmjob.image.guestfiles import digest_input

    assert int(done.stdout) == len(digest_input())


def test_the_doctor_says_that_qemu_is_missing_and_finds_the_bundled_one(
        computer: Computer, with_machines: str) -> None:
    found = json.loads(computer.run(VMJOB, "doctor", "--json").stdout)["findings"]
    assert {each["what"]: each["state"] for each in found}["QEMU"] == "problem"
    done = computer.run(VMJOB, "doctor", "--json", timeout=BOOT, VMJOB_QEMU=with_machines)
    states = {each["what"]: each["state"] for each in json.loads(done.stdout)["findings"]}
    assert (done.returncode, states["QEMU"], states["image"]) == (0, "ok", "ok"), done.stdout


def test_a_job_runs_in_a_machine(computer: Computer, with_machines: str) -> None:
    run = [VMJOB, "run", "--accel", "tcg", "--memory", "256", "--"]
    done = computer.run(*run, "echo", "hello", timeout=BOOT, VMJOB_QEMU=with_machines)
    assert (done.returncode, done.stdout) == (0, b"hello\n"), done.stderr
    done = computer.run(*run, "sh", "-c", "exit 7", timeout=BOOT, VMJOB_QEMU=with_machines)
    assert done.returncode == 7, done.stderr
    assert not list((computer.root / "data" / "home" / "machines").iterdir())
    assert not list((computer.root / "data" / "slots" / "0").iterdir())
    assert not list((computer.root / "home").iterdir())


def test_a_machine_that_stays_has_a_keeper_and_an_environment_without_our_libraries(
        computer: Computer, with_machines: str) -> None:
    def vmjob(*arguments: str) -> bytes:
        done = computer.run(VMJOB, "machine", *arguments, timeout=BOOT, VMJOB_QEMU=with_machines)
        assert done.returncode == 0, done.stderr
        return done.stdout

    vmjob("create", "m", "--accel", "tcg", "--memory", "256")
    try:
        vmjob("start", "m")
        assert vmjob("exec", "m", "--", "echo", "hello") == b"hello\n"
        lent = environments_in(computer.root)
        assert lent
        assert not any("LD_LIBRARY_PATH" in each for each in lent)
    finally:
        vmjob("destroy", "m")


def test_the_process_that_was_started_is_the_one_that_runs_the_job(
        computer: Computer, with_machines: str) -> None:
    """The BOINC client watches, and signals, the process that it started."""
    argv = computer.argv(VMJOB, "run", "--accel", "tcg", "--memory", "256", "--",
                         "sh", "-c", "echo on; sleep 1000", VMJOB_QEMU=with_machines)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout
    try:
        assert process.stdout.readline() == b"on\n"
        assert b"lib/python\0" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_starts_at_the_same_time_do_not_hinder_each_other(computer: Computer) -> None:
    started = [subprocess.Popen(computer.argv(VMJOB, "--version"), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT) for _ in range(4)]
    for process in started:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert said.startswith(b"vmjob, version ")
    assert len(unpacked_in(computer.programs)) == 1


@pytest.mark.parametrize("sign", [".good", "settle.py"], ids=["while it reads", "after tar"])
def test_after_a_kill_in_the_middle_it_is_unpacked_anew(computer: Computer, sign: str) -> None:
    pattern = ".wrapper-*/lib/*" if sign == ".good" else ".wrapper-*/settle.py"
    for _ in range(10):
        process = subprocess.Popen(computer.argv(VMJOB, "--version"), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        while not list(computer.programs.glob(pattern)) and process.poll() is None:
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        [left] = unpacked_in(computer.programs)
        if left.startswith(".wrapper-"):
            break
        shutil.rmtree(computer.programs / left)  # the kill came too late
    assert left.startswith(".wrapper-")
    assert computer.run(VMJOB, "--version").returncode == 0
    [found] = unpacked_in(computer.programs)
    assert found.startswith("wrapper-")


@pytest.mark.parametrize("damage", ["cut off", "changed", "longer"])
def test_a_damaged_file_is_an_error_with_advice_and_leaves_nothing(
        computer: Computer, damage: str) -> None:
    path = computer.project / Path(VMJOB).name
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if damage == "cut off":
        del data[middle:]
    elif damage == "changed":
        data[middle] ^= 255
    else:
        data += b"\0" * 512
    path.write_bytes(data)
    done = computer.run(VMJOB, "--version")
    assert done.returncode == 125
    assert b"[archive-damaged]" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert unpacked_in(computer.programs) == []


def test_where_its_directory_cannot_be_written_it_uses_the_cache_of_its_user(
        computer: Computer) -> None:
    (computer.root / "opt").mkdir()
    (computer.project / Path(VMJOB).name).rename(computer.root / "opt" / "vmjob-x")
    (computer.root / "data" / "user").mkdir()
    done = computer.run("/opt/vmjob-x", "--version", HOME="/data/user")
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(unpacked_in(computer.root / "data" / "user" / ".cache" / "vmjob")) == 1
    done = computer.run("/opt/vmjob-x", "--version", HOME="/home")
    assert done.returncode == 125
    assert b"[home-unusable]" in done.stderr
    done = computer.run("/opt/vmjob-x", "--version", VMJOB_BUNDLE="here")
    assert done.returncode == 0
    assert len(unpacked_in(computer.root / "data" / "slots" / "0" / "here")) == 1


def test_a_new_version_removes_those_that_nobody_uses(computer: Computer) -> None:
    for name in ("wrapper-0000000000000000", "wrapper-1111111111111111"):
        (computer.programs / name).mkdir(parents=True)
        (computer.programs / name / "whole").touch()
    with (computer.programs / "wrapper-1111111111111111" / "whole").open() as used:
        fcntl.flock(used, fcntl.LOCK_SH)  # as every process of a bundle does
        assert computer.run(VMJOB, "--version").returncode == 0
    assert "wrapper-0000000000000000" not in unpacked_in(computer.programs)
    assert "wrapper-1111111111111111" in unpacked_in(computer.programs)


def test_a_running_process_holds_its_version(computer: Computer) -> None:
    computer.run(VMJOB, "--version")
    place = computer.programs / unpacked_in(computer.programs)[0]
    python = f"/{place.relative_to(computer.root)}/bin/python3"
    process = subprocess.Popen(computer.argv(python, "-c", "print(1, flush=True); input()"),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"1\n"
    with (place / "whole").open() as marker:
        with pytest.raises(BlockingIOError):
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.communicate(b"\n", timeout=20)
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_program_in_another_users_directory_is_not_run(computer: Computer) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    computer.run(VMJOB, "--version")
    place = computer.programs / unpacked_in(computer.programs)[0]
    (place / "bin" / "vmjob").write_text("print('hostile')\n")
    os.chown(place, 12345, 12345)
    os.chown(computer.programs, 12345, 12345)
    (computer.root / "data" / "user").mkdir()
    done = computer.run(VMJOB, "--version", HOME="/data/user")
    assert done.returncode == 0
    assert b"hostile" not in done.stdout


@pytest.mark.skipif(not shutil.which("busybox"), reason="busybox is not installed")
def test_it_needs_no_library_of_the_computer(bundles: Bundles, computer: Computer) -> None:
    """Not even the C library: a static busybox is the whole system."""
    shutil.rmtree(computer.root / "usr")
    busybox = computer.root / "usr" / "bin" / "busybox"
    busybox.parent.mkdir(parents=True)
    found = shutil.which("busybox")
    assert found
    shutil.copy(found, busybox)
    for applet in ("sh", "env", "tar", "gzip", "tail", "mkdir", "rm", "ls", "readlink"):
        busybox.with_name(applet).symlink_to("busybox")
    done = computer.run(VMJOB, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"vmjob, version ")
