"""Jobs on a real VirtualBox, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.vm.test_job_files import events, write
from tests.vm.test_old_images import slot_of
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("vm_home", "virtualbox")]

#: Seconds for a job in the interpreter, on a busy computer.
PATIENCE = 1100
#: As `in_virtualbox`, so that its template serves.
SHAPE = ("--hypervisor", "virtualbox", "--accel", "interpreter", "--network", "nat", "--memory",
         "256")


def vmjob(*arguments: str | Path, input: str = "",  # noqa: A002 - as subprocess has it
          environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmjob", *map(str, arguments)], input=input,
                          capture_output=True, text=True, timeout=PATIENCE,
                          env={**os.environ, **(environment or {})})


def test_a_job_gives_its_output_its_files_and_its_exit_code(
        tmp_path: Path, in_virtualbox: MachineSpec, vm_home: Home) -> None:
    write(tmp_path, data="the input\n")
    done = vmjob("run", *SHAPE, "--in", tmp_path / "data", "--out", f"out:{tmp_path / 'out'}",
                 "--json", "--", "sh", "-c",
                 "tr a-z A-Z < data > out; cat; echo to stderr >&2; exit 7", input="stdin\n")
    assert done.returncode == 7, done.stderr
    record = json.loads(done.stdout)
    assert "stdin\n" in done.stderr
    assert "to stderr\n" in done.stderr
    assert (tmp_path / "out").read_text() == "THE INPUT\n"
    machine = record["machine"]
    assert (machine["hypervisor"], machine["accelerator"]) == ("virtualbox", "interpreter")
    assert machine["started_from"] == "template"
    assert list(vm_home.machines.iterdir()) == []


def test_where_virtualbox_has_no_kernel_driver_that_is_said(tmp_path: Path) -> None:
    done = vmjob("run", "--hypervisor", "virtualbox", "--", "true")
    assert done.returncode == 125
    assert "/dev/vboxdrv" in done.stderr
    assert "vmjob doctor" in done.stderr


def test_an_accelerator_of_another_hypervisor_is_refused() -> None:
    done = vmjob("run", "--hypervisor", "qemu", "--accel", "hm", "--", "true")
    assert done.returncode == 125
    assert "'hm' is not an accelerator of qemu" in done.stderr


def test_a_cd_that_mounts_virtualbox_s_own_folders_is_heard_by_the_files_in_them(
        tmp_path: Path, own_cd: Path) -> None:
    """As boinc2docker's: no disk, no agent, nothing but what VirtualBox has for every guest."""
    slot = write(tmp_path / "slot", vbox_job__xml="""<vbox_job>
        <memory_size_mb>256</memory_size_mb>
        <enable_isocontextualization>1</enable_isocontextualization>
        <enable_shared_directory/>
        <share_project_dir/>
        <completion_trigger_file>completion_trigger_file</completion_trigger_file>
        <fraction_done_filename>results/progress</fraction_done_filename>
    </vbox_job>""")
    (slot / own_cd.name).symlink_to(own_cd)
    project = write(slot / "project", data="the project's\n")
    shared = write(slot / "shared", **{"in": "the input\n"}, boinc_app="""#!/bin/sh
        mkdir results
        echo 0.5 > results/progress
        ln -s /etc/passwd results/link || echo link > results/refused
        mkdir /root/project && mount -t vboxsf project /root/project
        echo more >> /root/project/data || echo data >> results/refused
        cat in /root/project/data | tr a-z A-Z > results/out
        printf '3\\n1\\nthe end\\n' > .end && mv .end completion_trigger_file
        sleep 1000
    """)
    (shared / "boinc_app").chmod(0o755)
    done = vmjob("job", "run", "--hypervisor", "virtualbox", "--accel", "interpreter", "--events",
                 tmp_path / "events", slot / "vbox_job.xml")
    assert done.returncode == 3, done.stderr + done.stdout
    assert "the job says: the end" in done.stderr
    assert "warning" not in done.stderr
    assert "--- the CD has started" in done.stdout
    assert (shared / "results" / "out").read_text() == "THE INPUT\nTHE PROJECT'S\n"
    assert (shared / "results" / "refused").read_text() == "link\ndata\n"
    assert (project / "data").read_text() == "the project's\n"
    assert sorted(each.name for each in (shared / "results").iterdir()) == [
        "out", "progress", "refused"]
    told = events(tmp_path / "events")
    assert 0.5 in [each["fraction"] for each in told if each["event"] == "progress"]


def test_an_old_image_does_the_same_on_both_hypervisors(
        tmp_path: Path, vdi: Path, virtualbox: Path) -> None:
    """BOINC's example: a VDI whose start script mounts ``shared`` and runs ``boinc_app``."""
    said, made = [], []
    for hypervisor, accel in (("qemu", "tcg"), ("virtualbox", "interpreter")):
        slot = slot_of(tmp_path / hypervisor, vdi, """
            tr a-z A-Z < in > out
            echo to the log
            id -u > user
        """)
        write(slot / "shared", **{"in": "the input\n"})
        done = vmjob("job", "run", "--hypervisor", hypervisor, "--accel", accel,
                     slot / "vbox_job.xml")
        assert done.returncode == 0, done.stderr + done.stdout
        assert "warning" not in done.stderr
        lines = done.stdout.splitlines()
        begin = lines.index("--- BOINC VM starting")
        said.append(lines[begin:begin + 4])
        made.append({name: (slot / "shared" / name).read_text() for name in ("out", "user")})
    assert said[0] == said[1] == ["--- BOINC VM starting", "--- Mounting shared directory",
                                  "-- Launching boinc_app", "to the log"]
    assert made[0] == made[1] == {"out": "THE INPUT\n", "user": "0\n"}
