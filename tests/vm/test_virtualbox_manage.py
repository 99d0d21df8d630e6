"""The layer above VBoxManage, with a real one: what was found out about it stays true."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import eventually
from tests.virtualbox.bootsector import floppy
from vmjob.errors import Busy, VmjobError
from vmjob.machine.virtualbox.faults import Kind
from vmjob.machine.virtualbox.log import Cause, cause
from vmjob.machine.virtualbox.manage import (
    Manage,
    parse_machine_readable,
    service_pids,
    sweep_ipc,
    uuid_of,
)
from vmjob.machine.virtualbox.programs import Programs, find, version
from vmjob.machine.virtualbox.service import ipc_directory

pytestmark = [pytest.mark.vm, pytest.mark.anyio]


@pytest.fixture
def programs(virtualbox: Path) -> Programs:
    return find({"VMJOB_VIRTUALBOX": str(virtualbox)})


@pytest.fixture
async def manage(programs: Programs, tmp_path: Path) -> AsyncIterator[Manage]:
    made = Manage(programs, tmp_path / "registry")
    yield made
    await made.close()
    assert not service_pids(made.registry)
    assert not ipc_directory(made.ipc_id).exists()


async def machine(manage: Manage, directory: Path, name: str = "g") -> None:
    floppy(directory / "floppy.img", "HELLO\n")
    await manage.run("createvm", "--name", name, "--ostype", "Other_64", "--register",
                     "--basefolder", str(directory / "machines"), "--default")
    await manage.run("modifyvm", name, "--memory", "32", "--boot1", "floppy", "--audio-enabled",
                     "off", "--firmware-boot-menu", "disabled", "--firmware-logo-display-time", "0",
                     "--uart1", "0x3f8", "4", "--uart-mode1", "file", str(directory / "serial"),
                     "--vm-execution-engine", "interpreter")
    await manage.run("storagectl", name, "--name", "floppy", "--add", "floppy")
    await manage.run("storageattach", name, "--storagectl", "floppy", "--port", "0", "--device",
                     "0", "--type", "fdd", "--medium", str(directory / "floppy.img"))


async def state(manage: Manage) -> str:
    return parse_machine_readable(
        await manage.run("showvminfo", "g", "--machinereadable"))["VMState"]


async def test_the_version_is_known(programs):
    assert version(programs.manage).numbers >= (7, 0, 0)


async def test_what_it_prints_is_read_back(manage, tmp_path):
    """Other letters in paths, quotes in names, lines in descriptions."""
    directory = tmp_path / "ünï çode"
    directory.mkdir()
    description = 'one "quoted"\nVMState="running"\nback\\slash'
    uuid = uuid_of(await manage.run("createvm", "--name", "g", "--register", "--basefolder",
                                    str(directory)))
    await manage.run("modifyvm", "g", "--description", description)
    found = parse_machine_readable(await manage.run("showvminfo", "g", "--machinereadable"))
    assert found["UUID"] == uuid
    assert found["description"] == description
    assert found["VMState"] == "poweroff"
    assert found["CfgFile"] == f"{directory}/g/g.vbox"


async def test_two_for_one_registry_share_its_service_and_others_have_their_own(
        manage, programs, tmp_path):
    second = Manage(programs, tmp_path / "registry")
    other = Manage(programs, tmp_path / "other")
    await asyncio.gather(*(each.run("list", "vms") for each in (manage, second, other)))
    assert len(service_pids(manage.registry)) == 1
    await other.close()
    assert not service_pids(other.registry)
    assert len(service_pids(manage.registry)) == 1
    assert not sweep_ipc(manage.ipc_id), "its service lives"
    assert ipc_directory(manage.ipc_id).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_service_that_ends_under_us_is_no_failure(manage, number):
    for _ in range(3):
        await manage.run("list", "vms")
        for pid in service_pids(manage.registry):
            os.kill(pid, number)
        await manage.run("createvm", "--name", f"{manage.started}", "--register", "--basefolder",
                         str(manage.registry))


async def test_a_machine_runs_and_refuses_what_it_cannot_do_meanwhile(
        manage, tmp_path, monkeypatch):
    await machine(manage, tmp_path)
    await manage.run("startvm", "g", "--type", "headless")
    assert eventually(lambda: (tmp_path / "serial").read_bytes() == b"HELLO\n", 30)
    with monkeypatch.context() as patched:
        patched.setattr("vmjob.machine.virtualbox.manage.MOMENT", 0.2)
        with pytest.raises(Busy):
            await manage.run("modifyvm", "g", "--memory", "64")
    assert (await manage.ask("controlvm", "g", "resume")).fault.kind == Kind.WRONG_STATE
    await manage.run("controlvm", "g", "poweroff")
    # At once, while its process still goes: asked again until it is gone.
    await manage.run("modifyvm", "g", "--memory", "64")
    assert await state(manage) == "poweroff"
    log = (tmp_path / "machines" / "g" / "Logs" / "VBox.log").read_text()
    assert cause(log)[0] == Cause.ASKED


async def test_a_start_that_fails_says_why(manage, tmp_path):
    await machine(manage, tmp_path)
    await manage.run("modifyvm", "g", "--vm-execution-engine", "default")
    with pytest.raises(VmjobError) as caught:
        await manage.run("startvm", "g", "--type", "headless")
    assert caught.value.code in ("kernel-module-missing", "virtualization-off")


async def test_a_damaged_state_is_a_checkpoint_that_cannot_be_used(manage, tmp_path):
    await machine(manage, tmp_path)
    await manage.run("startvm", "g", "--type", "headless")
    await manage.run("controlvm", "g", "savestate")
    info = parse_machine_readable(await manage.run("showvminfo", "g", "--machinereadable"))
    saved = Path(info["VMStateFile"])
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 0xFF
    saved.write_bytes(data)
    with pytest.raises(VmjobError) as caught:
        await manage.run("startvm", "g", "--type", "headless")
    assert caught.value.code == "checkpoint-unusable"


OWNER = """
import asyncio, sys
from pathlib import Path
from vmjob.machine.virtualbox.manage import Manage
from vmjob.machine.virtualbox.programs import find
manage = Manage(find(), Path(sys.argv[1]))
asyncio.run(manage.run("guestproperty", "wait", "g", "x", deadline=100))
"""


async def test_a_question_dies_with_who_asked(manage, virtualbox, tmp_path):
    await machine(manage, tmp_path)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(manage.registry)],
                             env={**os.environ, "VMJOB_VIRTUALBOX": str(virtualbox)})

    def asking() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["name", "environ"])
                if each.info["name"] == "VBoxManage"
                and (each.info["environ"] or {}).get("VBOX_USER_HOME") == str(manage.registry)]

    assert eventually(lambda: len(asking()) == 1, 20)
    owner.kill()
    owner.wait()
    assert eventually(lambda: not asking())
    assert '"g"' in await manage.run("list", "vms"), "and its turn is over"
