"""A project's VM image as it was made for VirtualBox runs unmodified, its shared folder and all."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import pycdlib
import pytest

from tests.conftest import eventually, session_processes
from tests.vm.test_job_files import PATIENCE, command, events, run, write
from vmjob.home import Home

pytestmark = [pytest.mark.vm, pytest.mark.timeout(PATIENCE), pytest.mark.usefixtures("vm_home")]

#: As on BOINC's page.
VBOX = """<vbox_job>
    <os_name>Linux26_64</os_name>
    <memory_size_mb>512</memory_size_mb>
    <enable_shared_directory/>
    MORE
</vbox_job>
"""


def slot_of(directory: Path, image: Path, app: str | None, more: str = "") -> Path:
    """A slot as the BOINC client makes it: the image is a link into the project's directory."""
    slot = write(directory / "slots" / "0", vbox_job__xml=VBOX.replace("MORE", more))
    project = write(directory / "projects" / "p")
    (project / "image_1.vdi").symlink_to(image)
    write(slot, vm_image__vdi="<soft_link>../../projects/p/image_1.vdi</soft_link>\n")
    write(slot / "shared", **({} if app is None else {"boinc_app": "#!/bin/sh\n" + app}))
    if app is not None:
        (slot / "shared" / "boinc_app").chmod(0o755)
    return slot


def test_an_image_runs_its_boinc_app_in_the_shared_folder(tmp_path: Path, vdi: Path) -> None:
    slot = slot_of(tmp_path, vdi, """
        tr a-z A-Z < in > out
        echo to the log
        for name in ../x . nothing -x "a b"; do
            mount -t vboxsf -- "$name" /mnt && echo "mounted $name" >> stdout
        done
        mkdir -p /mnt/again
        mount -t vboxsf -o rw,uid=1000,gid=1000 shared /mnt/again
        echo "$(id -u) $(cat /mnt/again/in) $(stat -c %u:%g in)" >> stdout
        mount -t vboxsf -o ro shared /mnt && touch /mnt/x || echo "only to be read" >> stdout
        find /.vmjob/machine -mindepth 1 >> stdout
        cat /proc/1/comm >> stdout
    """)
    write(slot / "shared", **{"in": "the input\n"})
    before = vdi.stat()
    done = run("--events", tmp_path / "events", slot / "vbox_job.xml")
    assert "--- Mounting shared directory\n-- Launching boinc_app\nto the log\n" in done.stdout
    assert done.stderr.count("was not found") == 0
    assert done.stdout.count("was not found") == 4
    assert (slot / "shared" / "out").read_text() == "THE INPUT\n"
    assert (slot / "shared" / "stdout").read_text() == (
        "0 the input 1000:1000\nonly to be read\ninit\n")
    record = events(tmp_path / "events")[-1]["record"]
    assert (record["status"], record["exit_code"]) == ("succeeded", 0)
    assert "warning" not in done.stderr
    after = vdi.stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)


def test_its_trigger_files_are_heard(tmp_path: Path, vdi: Path) -> None:
    slot = slot_of(tmp_path, vdi, r"""
        until_gone() { while [ -e "$1" ]; do sleep 0.1; done; }
        echo 0.5 > progress
        echo "a trickle" > .said; mv .said said
        until_gone said
        head -c 9 /dev/fd0 > mailbox
        printf '7\n1\nthe end\n' > shutdown
        sleep 1000
    """, """<completion_trigger_file>shutdown</completion_trigger_file>
    <fraction_done_filename>progress</fraction_done_filename>
    <trickle_trigger_file>said</trickle_trigger_file>
    <enable_floppyio/>""")
    write(slot, init_data__xml="<a/>\n")
    done = run("--events", tmp_path / "events", slot / "vbox_job.xml", expect=7)
    assert "the job says: the end" in done.stderr
    told = events(tmp_path / "events")
    assert 0.5 in [each["fraction"] for each in told if each["event"] == "progress"]
    assert "a trickle\n" in [each["text"] for each in told if each["event"] == "trickle"]
    assert (slot / "shared" / "mailbox").read_text().startswith("<a/>")


def checkpoints(path: Path) -> list[int]:
    return [each["number"] for each in events(path) if each["event"] == "checkpoint"]


def test_one_that_is_killed_goes_on_from_its_checkpoint(tmp_path: Path, vdi: Path,
                                                        vm_home: Home) -> None:
    slot = slot_of(tmp_path, vdi, """
        echo once >> /root/begun
        echo > running
        number=0
        until [ -e goal ]; do number=$((number + 1)); sleep 0.2; done
        cat /root/begun > out
        echo $number >> out
    """)
    kept = tmp_path / "kept"
    with subprocess.Popen(command("--slot", kept, "--checkpoint-every", "1", "--events",
                                  tmp_path / "events", slot / "vbox_job.xml"),
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            assert eventually((slot / "shared" / "running").exists, seconds=PATIENCE)
            before = len(checkpoints(tmp_path / "events"))
            # The second one has seen it running.
            assert eventually(lambda: len(checkpoints(tmp_path / "events")) >= before + 2, 60)
        finally:
            process.kill()
    assert not session_processes(vm_home.root)
    write(slot / "shared", goal="")
    resumed = subprocess.run([sys.executable, "-m", "vmjob", "run", "--resume", kept], check=True,
                             capture_output=True, text=True, stdin=subprocess.DEVNULL,
                             timeout=PATIENCE)
    assert "given up" not in resumed.stderr
    begun, number = (slot / "shared" / "out").read_text().split()
    assert begun == "once"
    assert int(number) > 0
    assert events(tmp_path / "events")[-1]["event"] == "finished"


#: As it was made for VirtualBox, with what a job of a PC has besides a disk.
WITH_MORE = """
memory_mb = 512
[hardware]
disk = "vm_image.vdi"
iso = "context.iso"
cache_disk = "vm_cache.vdi"
[triggers]
completion = "shutdown"
[[folder]]
name = "shared"
source = "shared"
destination = "/root/shared"
"""
MIB = 1 << 20


def context(path: Path, name: str, text: bytes) -> None:
    """A CD with a file on it, as contextualization has one."""
    iso = pycdlib.PyCdlib()
    iso.new(joliet=3, rock_ridge="1.09", vol_ident="config-2")
    iso.add_fp(io.BytesIO(text), len(text), "/FILE.;1", rr_name=name, joliet_path=f"/{name}")
    with path.open("wb") as file:
        iso.write_fp(file)


def cache(path: Path, name: str, text: bytes) -> None:
    """A VDI with a partition, in which there is a file."""
    tree, part, raw = (path.with_suffix(f".{each}") for each in ("tree", "part", "raw"))
    tree.mkdir()
    (tree / name).write_bytes(text)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-L", "second", "-d", tree, part, "16M"],
                   check=True,
                   env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
    table = struct.pack("<B3xB3xII", 0, 0x83, MIB // 512, 16 * MIB // 512)
    with raw.open("wb") as disk:
        disk.write(bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa")
        disk.seek(MIB)
        disk.write(part.read_bytes())
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vdi", raw, path], check=True)


def test_one_with_a_cd_and_a_second_disk_is_killed_and_goes_on(tmp_path: Path, vdi: Path,
                                                               vm_home: Home) -> None:
    write(tmp_path, job__toml=WITH_MORE)
    (tmp_path / "vm_image.vdi").symlink_to(vdi)
    context(tmp_path / "context.iso", "user-data", b"of the CD\n")
    cache(tmp_path / "vm_cache.vdi", "before", b"of before\n")
    before = (tmp_path / "vm_cache.vdi").read_bytes()
    shared = write(tmp_path / "shared", boinc_app=r"""#!/bin/sh
        mkdir /mnt/cd /mnt/cache
        mount /dev/cdrom /mnt/cd && cat /mnt/cd/user-data > out
        umount /mnt/cd
        mount LABEL=config-2 /mnt/cd && ls /mnt/cd >> out
        dd if=/dev/zero of=/dev/sr0 count=1 2> /dev/null || echo "only to be read" >> out
        mount LABEL=second /mnt/cache
        cat /mnt/cache/before >> out
        echo written > /mnt/cache/written
        dd if=/dev/urandom of=/mnt/cache/noise bs=64k count=64
        sum=$(md5sum < /mnt/cache/noise)
        sync
        echo > running
        until [ -e goal ]; do sleep 0.2; done
        umount /mnt/cache
        echo 3 > /proc/sys/vm/drop_caches
        mount -o ro /dev/sdb1 /mnt/cache
        cat /mnt/cache/before /mnt/cache/written >> out
        [ "$sum" = "$(md5sum < /mnt/cache/noise)" ] && echo the same >> out
        printf '0\n' > shutdown
        sleep 1000
    """)
    (shared / "boinc_app").chmod(0o755)
    slot = tmp_path / "slot"
    with subprocess.Popen(command("--slot", slot, "--checkpoint-every", "1", "--events",
                                  tmp_path / "events", tmp_path / "job.toml"),
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            assert eventually((shared / "running").exists, seconds=PATIENCE)
            made = len(checkpoints(tmp_path / "events"))
            assert eventually(lambda: len(checkpoints(tmp_path / "events")) >= made + 2, 60)
        finally:
            process.kill()
    assert not session_processes(vm_home.root)
    for name in ("vm_image.vdi", "context.iso", "vm_cache.vdi"):
        (tmp_path / name).rename(tmp_path / f"{name}.away")  # a checkpoint has what it needs
    write(shared, goal="")
    resumed = subprocess.run([sys.executable, "-m", "vmjob", "run", "--resume", slot], check=True,
                             capture_output=True, text=True, stdin=subprocess.DEVNULL,
                             timeout=PATIENCE)
    assert "given up" not in resumed.stderr
    assert (shared / "out").read_text().splitlines() == [
        "of the CD", "user-data", "only to be read", "of before", "of before", "written",
        "the same"]
    assert (tmp_path / "vm_cache.vdi.away").read_bytes() == before


def test_one_without_a_program_switches_itself_off(tmp_path: Path, vdi: Path) -> None:
    slot = slot_of(tmp_path, vdi, None)
    assert "--- Failed to launch script" in run(slot / "vbox_job.xml").stdout


def test_a_system_whose_init_ends_has_not_succeeded(tmp_path: Path, vdi: Path) -> None:
    """As a PC whose kernel panics then."""
    slot = slot_of(tmp_path, vdi, """
        mv /sbin/init /sbin/init.old
        printf '#!/bin/sh\\nexit 0\\n' > /sbin/init
        chmod +x /sbin/init
        reboot -f
    """)
    assert "init ended with status 0" in run(slot / "vbox_job.xml", expect=1).stderr


def test_a_time_limit_ends_it(tmp_path: Path, vdi: Path) -> None:
    slot = slot_of(tmp_path, vdi, "touch began; sleep 1000", "<job_duration>20</job_duration>")
    run(slot / "vbox_job.xml")
    assert (slot / "shared" / "began").exists()


def test_a_disk_without_a_linux_boots_by_its_bios(tmp_path: Path) -> None:
    from tests.vm.test_foreign import disk

    slot = slot_of(tmp_path, disk(tmp_path / "own.vdi", kind="vdi"), "")
    done = run(slot / "vbox_job.xml")
    assert "boots by its BIOS" in done.stderr
    assert "runs without what it asks for: folders" in done.stderr
    assert "WXYZ" in "".join(each for each in done.stdout if each.isalpha())
