"""Job files of every language run as they are, on real machines, and give the known answers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually, lend, session_processes
from tests.vm.test_foreign import disk
from vmjob.home import Home
from vmjob.image.store import Image

pytestmark = pytest.mark.vm

EXAMPLES = Path(__file__).parents[2] / "examples"
#: Seconds for one job under emulation on a loaded computer.
PATIENCE = 600


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "vmjob", "job", "run", "--accel", "tcg", *map(str, arguments)]


def run(*arguments: str | Path, cwd: Path | None = None,
        expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=PATIENCE,
                          cwd=cwd, stdin=subprocess.DEVNULL)
    assert done.returncode == expect, done.stderr + done.stdout
    return done


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content)
    return directory


def link(slot: Path, name: str, physical: str) -> None:
    (slot / name).write_text(f"<soft_link>../../projects/p/{physical}</soft_link>\n")


def events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


# -- vbox_job.xml ------------------------------------------------------------------------------

VBOX = """<vbox_job>
    <os_name>Linux26_64</os_name>
    <memory_size_mb>512</memory_size_mb>
    <enable_shared_directory/>
    <copy_to_shared>init_data.xml</copy_to_shared>
    <copy_cmdline_to_shared/>
    <enable_scratch_directory>1</enable_scratch_directory>
    <completion_trigger_file>shutdown</completion_trigger_file>
    <fraction_done_filename>results/progress</fraction_done_filename>
    <trickle_trigger_file>credit</trickle_trigger_file>
    <intermediate_upload_file>results/part</intermediate_upload_file>
    <heartbeat_filename>heartbeat</heartbeat_filename>
    <minimum_heartbeat_interval>300</minimum_heartbeat_interval>
</vbox_job>
"""

BOINC_APP = r"""#!/bin/sh
# Waits for the host's answer to each thing that it says, so that nothing here needs a clock.
until_gone() { while [ -e "$1" ]; do sleep 0.1; done; }
mkdir results
touch heartbeat
echo 0.5 > results/progress
echo part > results/part
echo "a trickle" > .credit && mv .credit credit
until_gone credit
grep -c '^<user_name>' init_data.xml > results/summary
cat cmdline input >> results/summary
echo kept > /root/scratch/note
echo line of the log | vboxmonitor
# In pieces, each on the disk before the next.
echo 7 > shutdown; sync; echo 1 >> shutdown; sync; echo the end >> shutdown
sleep 1000
"""

INIT_DATA = """<app_init_data>
<user_name>a volunteer</user_name>
<authenticator>0123456789abcdef_secret</authenticator>
</app_init_data>
"""


@pytest.mark.usefixtures("vm_home")
@pytest.mark.timeout(PATIENCE)
def test_a_vbox_job_runs_its_boinc_app_on_our_image(tmp_path: Path) -> None:
    slot = write(tmp_path / "slots" / "0", vbox_job__xml=VBOX, init_data__xml=INIT_DATA)
    write(slot / "shared", boinc_app=BOINC_APP, input="the input\n")
    project = write(tmp_path / "project")
    done = run("--project", project, "--events", tmp_path / "events", slot / "vbox_job.xml",
               "--", "--fast", "3", expect=7)
    assert "the job says: the end" in done.stderr
    assert "line of the log" in done.stderr
    assert (slot / "shared" / "results" / "summary").read_text() == "1\n--fast 3the input\n"
    assert (project / "scratch" / "note").read_text() == "kept\n"
    told = events(tmp_path / "events")
    assert [each["seq"] for each in told] == list(range(1, len(told) + 1))
    assert {"variety": "credit", "text": "a trickle\n"}.items() <= next(
        each for each in told if each["event"] == "trickle").items()
    assert [each["name"] for each in told if each["event"] == "upload"] == ["results/part"]
    assert 0.5 in [each["fraction"] for each in told if each["event"] == "progress"]
    record = told[-1]["record"]
    assert (record["exit_code"], record["message"], record["notice"]) == (7, "the end", True)
    for path in slot.rglob("*"):
        if path.is_file() and path != slot / "init_data.xml":
            assert b"secret" not in path.read_bytes(), path


# -- job.xml of the generic wrapper ------------------------------------------------------------

WRAPPER = """<job_desc>
    <task>
        <application>worker</application>
        <stdin_filename>stdin</stdin_filename>
        <stdout_filename>stdout</stdout_filename>
        <command_line>10 boinc_resolve(in)</command_line>
        <weight>3</weight>
    </task>
    <task>
        <application>/bin/sh</application>
        <command_line>-c "cat $PROJECT_DIR/const; echo $NTHREADS"</command_line>
        <stdout_filename>stdout</stdout_filename>
    </task>
    <unzip_input><zipfilename>in.zip</zipfilename></unzip_input>
    <zip_output><zipfilename>out.zip</zipfilename><filename>result_.*</filename></zip_output>
</job_desc>
"""
WORKER = """#!/bin/sh
echo "args $1"; read line; echo "stdin $line"; cat "$2" zipped
echo one > result_1; echo two > result_2
"""


@pytest.mark.usefixtures("vm_home")
@pytest.mark.timeout(PATIENCE)
def test_a_generic_wrappers_job_runs_from_a_slot_of_links(tmp_path: Path) -> None:
    slot = write(tmp_path / "slots" / "0", job__xml=WRAPPER, stdin="hello\n")
    project = write(tmp_path / "projects" / "p", worker_1=WORKER, in_7="the input\n",
                    const="constant\n")
    (project / "worker_1").chmod(0o755)
    for name, physical in {"worker": "worker_1", "in": "in_7", "out.zip": "out_7"}.items():
        link(slot, name, physical)
    with zipfile.ZipFile(slot / "in.zip", "w") as archive:
        archive.writestr("zipped", "was zipped\n")
    run("--project", project, "--nthreads", "1", slot / "job.xml")
    assert (slot / "stdout").read_text() == (
        "args 10\nstdin hello\nthe input\nwas zipped\nconstant\n1\n")
    with zipfile.ZipFile(project / "out_7") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "result_1": b"one\n", "result_2": b"two\n"}
    assert (slot / "out.zip").read_text().startswith("<soft_link>")  # the link is still one


# -- job.xml of VMwrapper ----------------------------------------------------------------------

VMWRAPPER = """<job_desc>
    <unzip_task>
        <application>tar</application>
        <command_line>-xf ./boincvm.tar</command_line>
        <stdout_filename>stdout_tar</stdout_filename>
        <stderr_filename>stderr_tar</stderr_filename>
    </unzip_task>
    <VMmanage_task>
        <application>python</application>
        <stdout_filename>stdout_HostMain</stdout_filename>
        <stderr_filename>stderr_HostMain</stderr_filename>
        <command_line>./boincvm/HostMain.py ./boincvm/HostConfig.cfg</command_line>
    </VMmanage_task>
    <task>
        <virtualmachine>CernVM</virtualmachine>
        <image></image>
        <app_pathVM></app_pathVM>
        <application>./worker.py</application>
        <copy_app_to_VM>1</copy_app_to_VM>
        <copy_file_to_VM>in</copy_file_to_VM>
        <copy_file_to_VM>stdin</copy_file_to_VM>
        <stdin_filename>stdin</stdin_filename>
        <stdout_filename>stdout</stdout_filename>
        <stderr_filename>stderr</stderr_filename>
        <copy_file_from_VM>out</copy_file_from_VM>
        <command_line>1</command_line>
        <weight>2</weight>
    </task>
</job_desc>
"""


@pytest.mark.usefixtures("vm_home")
@pytest.mark.timeout(PATIENCE)
def test_the_worker_of_vmwrapper_gives_its_three_outputs(tmp_path: Path) -> None:
    slot = write(tmp_path / "slots" / "0", **{"in": "the file in\n"})
    project = write(tmp_path / "projects" / "p", stdin="a line on stdin\n", job__xml=VMWRAPPER,
                    worker_1="#!/usr/bin/python3\n"
                    + (EXAMPLES / "worker" / "worker.py").read_text())
    (project / "worker_1").chmod(0o755)
    with tarfile.open(project / "boincvm.tar", "w") as archive:
        info = tarfile.TarInfo("boincvm/HostMain.py")
        archive.addfile(info, io.BytesIO())
    for name, physical in {"job.xml": "job.xml", "worker.py": "worker_1", "stdin": "stdin",
                           "boincvm.tar": "boincvm.tar", "stdout": "result_0",
                           "stderr": "result_1"}.items():
        link(slot, name, physical)
    run("--project", project, slot / "job.xml")
    assert (project / "result_0").read_text() == (
        "worker: 16 bytes on stdin, 12 bytes in the file\nworker: used 1 CPU seconds\n")
    assert (project / "result_1").exists()
    assert (slot / "out").read_text()
    assert not (slot / "stdout_HostMain").exists()  # superseded: nothing was started


# -- packages ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("vm_home")
@pytest.mark.timeout(PATIENCE)
def test_a_package_is_there_for_one_job(tmp_path: Path) -> None:
    tool = b"#!/bin/sh\necho the tool runs as $(id -un)\n"
    with tarfile.open(tmp_path / "tool.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("usr/local/bin/tool")
        info.size, info.mode = len(tool), 0o755
        archive.addfile(info, io.BytesIO(tool))
    tree = write(tmp_path / "deb" / "DEBIAN",
                 control="Package: other\nVersion: 1\nArchitecture: all\n"
                 "Maintainer: nobody <n@example.org>\nDescription: another tool\n").parent
    write(tree / "usr" / "bin", other="#!/bin/sh\necho the other too\n")
    (tree / "usr" / "bin" / "other").chmod(0o755)
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, tmp_path / "other.deb"],
                   check=True, capture_output=True)
    write(tmp_path, job__toml='memory_mb = 256\npackages = ["tool.tar.gz", "other.deb"]\n'
          'run = "sh -c \'tool; other\'"\n', none__toml='memory_mb = 256\nrun = "tool"\n')
    assert run(tmp_path / "job.toml").stdout == "the tool runs as job\nthe other too\n"
    run(tmp_path / "none.toml", expect=127)


# -- devices -----------------------------------------------------------------------------------

VNC_AND_MAILBOX = """memory_mb = 256
announce = "."

[[task]]
run = ["python3", "-c", '''
import sys
with open("/dev/fd0", "r+b", buffering=0) as mailbox:
    print(mailbox.read(28672)[:9])
    mailbox.seek(14335)
    mailbox.write(b"for the host" + bytes(14323) + bytes([0, 1]))
sys.exit(5)
''']

[hardware]
mailbox = "for guest"
display = true
screenshot = "screen.png"
"""


@pytest.mark.usefixtures("vm_home")
@pytest.mark.timeout(PATIENCE)
def test_a_job_has_the_devices_that_it_asks_for(tmp_path: Path) -> None:
    write(tmp_path, job__toml=VNC_AND_MAILBOX)
    done = run("--events", tmp_path / "events", tmp_path / "job.toml", expect=5)
    assert done.stdout == "b'for guest'\n"
    told = events(tmp_path / "events")
    assert "mailbox: for the host" in [
        each["text"] for each in told if each["event"] == "message"]
    (where,) = [each["where"] for each in told if each["event"] == "address"]
    assert where.startswith("vnc://127.0.0.1:")
    port = where.removeprefix("vnc://127.0.0.1:").partition(",")[0]
    assert f"<host_port>{port}</host_port>" in (tmp_path / "vbox_remote_desktop.xml").read_text()
    assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("vm_home")
@pytest.mark.timeout(PATIENCE)
def test_a_job_may_be_a_whole_disk(tmp_path: Path) -> None:
    disk(tmp_path / "own.vdi", kind="vdi")
    write(tmp_path, job__toml='memory_mb = 128\n[hardware]\ndisk = "own.vdi"\n',
          late__toml='memory_mb = 128\ntime_limit = 0.2\n[hardware]\ndisk = "own.vdi"\n',
          over__toml='memory_mb = 128\nduration = 0.2\n[hardware]\ndisk = "own.vdi"\n')
    said = run(tmp_path / "job.toml").stdout
    assert "".join(letter for letter in said.partition("Disk")[2] if letter.isalpha()) == "WXYZ"
    assert "[time-limit]" in run(tmp_path / "late.toml", expect=125).stderr
    run(tmp_path / "over.toml")
    assert not list(tmp_path.glob("own.vdi.*"))


@pytest.mark.parametrize("kind", ["qcow2", "vdi"])
def test_a_disk_that_is_killed_goes_on_from_its_checkpoint(tmp_path: Path, vm_home: Home,
                                                           kind: str) -> None:
    """Each letter comes from the one before, which is on the disk and in memory."""
    disk(tmp_path / "own.disk", after="@", kind=kind)
    write(tmp_path, job__toml='memory_mb = 128\n[hardware]\ndisk = "own.disk"\n')
    slot = tmp_path / "slot"
    with subprocess.Popen(command("--slot", slot, "--checkpoint-every", "1", "--events",
                                  tmp_path / "events", tmp_path / "job.toml"),
                          stdout=subprocess.DEVNULL) as process:
        assert eventually(lambda: any(each["event"] == "checkpoint"
                                      for each in events(tmp_path / "events")))
        process.kill()
    resumed = subprocess.run([sys.executable, "-m", "vmjob", "run", "--resume", slot],
                             check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    letters = "".join(each for each in resumed.stdout if each.isupper())
    assert letters
    assert "ABCDEFGHIJKLMNOPQRSTUVWXYZ".endswith(letters)
    assert len(letters) < 26
    assert events(tmp_path / "events")[-1]["event"] == "finished"
    assert not session_processes(vm_home.root)


@pytest.mark.usefixtures("vm_home")
def test_a_disk_that_cannot_be_kept_runs_and_says_so(tmp_path: Path) -> None:
    disk(tmp_path / "own.vdi", after="R", kind="vdi")
    write(tmp_path, job__toml='memory_mb = 128\n[hardware]\ndisk = "own.vdi"\n'
          'cache_disk = "own.vdi"\n')
    done = run("--slot", tmp_path / "slot", "--checkpoint-every", "1", tmp_path / "job.toml")
    assert done.stderr.count("with one disk can be kept") == 1
    assert "Z" in done.stdout


@pytest.mark.usefixtures("vm_home")
def test_a_disk_has_the_screen_and_the_picture_that_it_asks_for(tmp_path: Path) -> None:
    disk(tmp_path / "own.vdi", after="@", kind="vdi")
    write(tmp_path, job__toml='memory_mb = 128\ntime_limit = 2\n[hardware]\n'
          'disk = "own.vdi"\ndisplay = true\nscreenshot = "screen.png"\n')
    said = run(tmp_path / "job.toml", expect=125).stderr
    assert "vnc://127.0.0.1:" in said
    assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")


# -- our own examples --------------------------------------------------------------------------


@pytest.mark.usefixtures("vm_home")
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXAMPLES.glob("*/job.toml")))
def test_every_example_runs(name: str, tmp_path: Path) -> None:
    place = tmp_path / name
    subprocess.run(["cp", "-r", EXAMPLES / name, place], check=True)
    run(place / "job.toml", cwd=place)


# -- real programs -----------------------------------------------------------------------------

TUTORIAL = "/usr/share/doc/hmmer/examples/tutorial"
BLAST = f"""<job_desc>
    <task>
        <application>/bin/sh</application>
        <command_line>
            -c "makeblastdb -in {TUTORIAL}/globins45.fa -dbtype prot -out db"
        </command_line>
        <stdout_filename>log</stdout_filename>
    </task>
    <task>
        <application>blastp</application>
        <command_line>-query {TUTORIAL}/globins45.fa -db db -outfmt 6 -num_threads 1</command_line>
        <stdout_filename>hits</stdout_filename>
        <weight>4</weight>
    </task>
</job_desc>
"""


def short(data: bytes) -> str:
    """The first 16 digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.timeout(PATIENCE)
def test_a_blast_job_of_two_tasks_finds_what_it_finds_everywhere(
        home: Home, science_image: Image, tmp_path: Path) -> None:
    lend(science_image, home)
    slot = write(tmp_path / "slot", job__xml=BLAST)
    run("--image", "science", slot / "job.xml")
    assert short((slot / "hits").read_bytes()) == "0b052b34408c00ef"


MOLECULES = """#include "oplsaa.ff/forcefield.itp"
#include "oplsaa.ff/spc.itp"

[ system ]
water

[ molecules ]
"""
DYNAMICS = """integrator = md
nsteps = 300
dt = 0.002
cutoff-scheme = Verlet
coulombtype = reaction-field
rcoulomb = 0.9
rvdw = 0.9
nstlist = 10
tcoupl = v-rescale
tc-grps = System
tau-t = 0.5
ref-t = 300
gen-vel = yes
gen-temp = 300
gen-seed = 42
ld-seed = 42
constraints = h-bonds
nstenergy = 100
nstlog = 100
"""
GROMACS = """image = "science"
cpu = "baseline"
inputs = ["md.mdp", "topol.top"]
outputs = ["md.gro"]

[[task]]
run = "gmx_d -quiet solvate -cs spc216 -box 2.2 2.2 2.2 -o box.gro -p topol.top"
stderr = "log"

[[task]]
run = "gmx_d -quiet grompp -f md.mdp -c box.gro -p topol.top -o md.tpr -maxwarn 2"
stderr = "log"

[[task]]
run = "gmx_d -quiet mdrun -deffnm md -ntmpi 1 -ntomp 1 -reprod -nb cpu -pin off"
stderr = "log"
weight = 20
"""
#: Of the positions, three decimals; velocities have more, and differ in the last: GROMACS begins
#: with a reciprocal square root that each maker of processors approximates in another way.
GROMACS_ANSWER = "a0958d6d3533d98a"


@pytest.mark.timeout(PATIENCE)
def test_a_gromacs_run_that_is_killed_in_the_middle_ends_with_the_native_answer(
        home: Home, science_image: Image, tmp_path: Path) -> None:
    lend(science_image, home)
    place = write(tmp_path / "md", md__mdp=DYNAMICS, topol__top=MOLECULES, job__toml=GROMACS)
    told = tmp_path / "events"
    job = subprocess.Popen(command("--slot", tmp_path / "slot", "--checkpoint-every", "2",
                                   "--events", told, "--quiet", place / "job.toml"), cwd=place,
                           stdin=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + PATIENCE / 2
        while not in_the_middle(events(told)):
            assert job.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < give_up
            time.sleep(0.1)
    finally:
        job.kill()
        job.wait()
    done = subprocess.run([sys.executable, "-m", "vmjob", "run", "--resume", tmp_path / "slot"],
                          capture_output=True, text=True, timeout=PATIENCE, cwd=place)
    assert done.returncode == 0, done.stderr
    positions = "".join(line.rstrip("\n")[:44] + "\n"
                        for line in (place / "md.gro").read_text().splitlines())
    assert short(positions.encode()) == GROMACS_ANSWER


def in_the_middle(told: list[dict[str, Any]]) -> bool:
    """Whether a checkpoint was made while the third task ran."""
    kinds = [(each["event"], each.get("number")) for each in told]
    return ("task", 3) in kinds and any(
        kind == "checkpoint" for kind, _ in kinds[kinds.index(("task", 3)):])


VINA = """<job_desc>
    <task>
        <application>vina</application>
        <command_line>--receptor 1iep_receptor.pdbqt --ligand 1iep_ligand.pdbqt --center_x 15.190
            --center_y 53.903 --center_z 16.917 --size_x 20 --size_y 20 --size_z 20
            --exhaustiveness 1 --seed 42 --cpu 1 --num_modes 3 --out o.pdbqt</command_line>
        <stdout_filename>log</stdout_filename>
    </task>
</job_desc>
"""


@pytest.mark.timeout(1500)
def test_a_docking_job_gives_the_answer_of_a_processor_without_fma(
        home: Home, science_image: Image, tmp_path: Path) -> None:
    given = os.environ.get("VMJOB_TEST_INPUTS")
    if given is None or not (found := sorted(Path(given).rglob("1iep_receptor.pdbqt"))):
        pytest.skip("VMJOB_TEST_INPUTS names no directory with 1iep_*.pdbqt")
    lend(science_image, home)
    slot = write(tmp_path / "slot", job__xml=VINA)
    for name in ("1iep_receptor.pdbqt", "1iep_ligand.pdbqt"):
        (slot / name).write_bytes((found[0].parent / name).read_bytes())
    run("--image", "science", "--memory", "2048", slot / "job.xml")
    assert short((slot / "o.pdbqt").read_bytes()) == "464138068b702627"
