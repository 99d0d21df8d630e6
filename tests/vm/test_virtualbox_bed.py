"""The VirtualBox of the tests is a real one: its own processes, a machine that runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.virtualbox.bootsector import floppy
from vmjob.machine.virtualbox.service import service_pids, sweep_ipc

pytestmark = pytest.mark.vm


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A registry of the test's own."""
    return {**os.environ, "VBOX_USER_HOME": str(tmp_path / "registry"), "LC_ALL": "C.UTF-8",
            "VBOX_IPC_SOCKETID": f"vmjob-test-{os.getpid()}"}


@pytest.fixture
def manage(virtualbox: Path, environment: dict[str, str]):
    """VBoxManage, asked in that registry."""

    def run(*words: str, check: bool = True) -> str:
        done = subprocess.run([virtualbox / "VBoxManage", *words], env=environment, text=True,
                              capture_output=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    yield run
    for pid in service_pids(Path(environment["VBOX_USER_HOME"])):
        os.kill(pid, signal.SIGKILL)  # and its machines
    assert eventually(lambda: sweep_ipc(environment["VBOX_IPC_SOCKETID"]))


@pytest.fixture
def machine(manage, tmp_path: Path) -> Path:
    """A machine named g that says HELLO; the file that gets it."""
    floppy(tmp_path / "floppy.img", "HELLO\n")
    manage("createvm", "--name", "g", "--ostype", "Other_64", "--register", "--basefolder",
           str(tmp_path / "machines"), "--default")
    manage("modifyvm", "g", "--memory", "32", "--boot1", "floppy", "--audio-enabled", "off",
           "--uart1", "0x3f8", "4", "--uart-mode1", "file", str(tmp_path / "serial"),
           "--firmware-logo-display-time", "0", "--firmware-boot-menu", "disabled",
           "--vm-execution-engine", "interpreter")
    manage("storagectl", "g", "--name", "floppy", "--add", "floppy")
    manage("storageattach", "g", "--storagectl", "floppy", "--port", "0", "--device", "0",
           "--type", "fdd", "--medium", str(tmp_path / "floppy.img"))
    return tmp_path / "serial"


def says_hello(serial: Path) -> bool:
    return eventually(lambda: serial.exists() and serial.read_bytes() == b"HELLO\n", 30)


def test_a_machine_that_virtualbox_starts_runs_and_all_calls_share_one_registry(manage, machine):
    assert "successfully started" in manage("startvm", "g", "--type", "headless")
    assert says_hello(machine)
    assert '"g"' in manage("list", "runningvms")


def test_a_front_end_is_the_very_process_that_was_started(virtualbox, environment, manage, machine):
    """So that signals, and the death of an owner, reach the machine."""
    with subprocess.Popen([virtualbox / "VBoxHeadless", "--startvm", "g"], env=environment,
                          stdout=subprocess.DEVNULL) as process:
        assert says_hello(machine)
        program = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert b"VBoxHeadless" in program
        assert "VBoxVMM.so" in Path(f"/proc/{process.pid}/maps").read_text()
        process.kill()
    assert eventually(lambda: 'VMState="aborted"' in manage(
        "showvminfo", "g", "--machinereadable", check=False))


def test_the_doctor_finds_it_and_says_that_its_driver_is_missing(virtualbox, home):
    done = subprocess.run([sys.executable, "-m", "vmjob", "doctor", "--json"], timeout=60,
                          env={**os.environ, "VMJOB_VIRTUALBOX": str(virtualbox)},
                          stdout=subprocess.PIPE, text=True)
    found = [each for each in json.loads(done.stdout)["findings"] if "VirtualBox" in each["what"]]
    assert found[0]["state"] == "ok"
    assert str(virtualbox) in found[0]["found"]
    if not Path("/sys/module/vboxdrv").exists():
        assert "vboxdrv is not loaded" in found[-1]["found"]
        assert found[-1]["advice"]
