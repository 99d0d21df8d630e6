"""What jobs can do inside a real machine, and what they cannot do to it."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from vmjob.engine.session import Session, open_session
from vmjob.engine.starting import end_error
from vmjob.errors import AgentLost, GuestPanic, HostDiskFull, MachineDied, VmjobError
from vmjob.guest.client import AgentClient, Limits, TaskEnd
from vmjob.home import Home
from vmjob.machine.contract import EndReason, MachineSpec
from vmjob.machine.qemu.driver import QemuDriver, explain_end

pytestmark = [pytest.mark.anyio, pytest.mark.vm]

MIB = 1 << 20


@pytest.fixture
async def session(vm_home: Home, vm_shape: MachineSpec) -> AsyncIterator[Session]:
    async with open_session(vm_home, QemuDriver(), vm_shape) as opened:
        yield opened


async def run(client: AgentClient, *argv: str, **more: object) -> tuple[TaskEnd, str]:
    """Run a command; its end, and both its streams together."""
    caught = b""

    async def take(stream: str, data: bytes) -> None:
        nonlocal caught
        caught += data

    task = await client.start(list(argv), **more)  # type: ignore[arg-type]
    end = await client.follow(task, take)
    client.forget(task)
    return end, caught.decode("utf-8", "replace")


async def test_a_job_is_an_unprivileged_user_in_an_empty_directory(session: Session) -> None:
    client = session.client
    _, text = await run(client, "sh", "-c", "id -un; pwd; ls -A; grep -E '^Cap(Eff|Prm)' "
                                            "/proc/self/status; cat /proc/self/oom_score_adj")
    assert text.split() == ["job", "/job", "CapPrm:", "0" * 16, "CapEff:", "0" * 16, "0"]
    _, text = await run(client, "id", "-un", user="root")
    assert text == "root\n"


async def test_a_job_inherits_its_three_streams_and_nothing_else(session: Session) -> None:
    # 3 is ls's own: the directory that it lists.
    _, text = await run(session.client, "ls", "/proc/self/fd")
    assert text.split() == ["0", "1", "2", "3"]
    _, text = await run(session.client, "ls", "/proc/self/fd", user="root")
    assert text.split() == ["0", "1", "2", "3"]


async def test_a_job_has_no_network_unless_it_was_granted_one(session: Session) -> None:
    _, text = await run(session.client, "sh", "-c", "ls /sys/class/net")
    assert text.split() == ["lo"]


async def test_a_granted_network_reaches_the_host(vm_home: Home, vm_shape: MachineSpec) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"hello guest")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        async with open_session(vm_home, QemuDriver(), replace(vm_shape, network="nat")) as opened:
            _, text = await run(opened.client, "bash", "-c",
                                f"cat < /dev/tcp/10.0.2.2/{port}")
        assert text == "hello guest"
    finally:
        listener.close()
        thread.join(10)


async def test_what_a_job_does_to_the_machine_does_not_reach_the_agent(session: Session) -> None:
    """Fill the disk, fork without end, take all memory, kill what it can, close everything."""
    client = session.client
    end, text = await run(client, "sh", "-c", "kill -9 1; kill -9 -1; echo alive")
    assert "alive" in text

    end, _ = await run(client, "python3", "-c",
                       "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
                       limits=Limits(processes=200, cpu_seconds=3))
    assert end.ended_by in ("cpu-limit", "out-of-memory")

    end, _ = await run(client, "python3", "-c",
                       "a = []\nwhile True: a.append(bytearray(10_000_000))")
    assert (end.signal, end.ended_by) == (signal.SIGKILL, "out-of-memory")
    assert end.oom_kills >= 1

    end, _ = await run(client, "sh", "-c", "exec <&- >&- 2>&-; sleep 0.1; exit 5")
    assert end.exit_code == 5

    _, text = await run(client, "sh", "-c", "for i in 1 2 3; do (sleep 0.05 &) ; done; sleep 0.3; "
                                            "grep -l '^State:.Z' /proc/[0-9]*/status | wc -l")
    assert text.strip() == "0", "orphans are not reaped"
    await client.ping()
    end, _ = await run(client, "echo", "still here")
    assert end.exit_code == 0


async def test_a_full_disk_is_the_jobs_problem_only(vm_home: Home, vm_shape: MachineSpec) -> None:
    async with open_session(vm_home, QemuDriver(), replace(vm_shape, disk_gb=1)) as opened:
        _, text = await run(opened.client, "sh", "-c",
                            "dd if=/dev/zero of=big bs=1M; df -m /job | tail -1; rm big")
        assert "No space left on device" in text
        end, text = await run(opened.client, "sh", "-c", "echo x > f && cat f")
        assert text == "x\n"


async def test_the_disk_has_the_size_that_was_asked_for(vm_home: Home,
                                                        vm_shape: MachineSpec) -> None:
    async with open_session(vm_home, QemuDriver(), replace(vm_shape, disk_gb=100)) as opened:
        _, text = await run(opened.client, "sh", "-c", "df -m / | tail -1")
        assert 95_000 < int(text.split()[1]) < 102_400
        assert opened.machine.spec.directory.joinpath("overlay.qcow2").stat().st_size < 20 * MIB


async def test_limits_hold_for_all_processes_together(session: Session) -> None:
    client = session.client
    end, _ = await run(client, "sh", "-c", "while :; do :; done & while :; do :; done",
                       limits=Limits(cpu_seconds=1))
    assert end.ended_by == "cpu-limit"
    assert end.cpu_seconds is not None
    assert 0.9 < end.cpu_seconds < 60  # with what others took of the computer
    end, _ = await run(client, "python3", "-c", "bytearray(60_000_000)",
                       limits=Limits(memory_bytes=30 * MIB))
    assert end.ended_by == "out-of-memory"
    end, text = await run(client, "sh", "-c", "head -c 5000 /dev/zero > f; stat -c %s f",
                          limits=Limits(file_bytes=1000))
    assert "1000" in text
    _, text = await run(client, "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done",
                        limits=Limits(processes=4))
    assert "ork" in text  # "Cannot fork"


async def test_large_files_pass_with_little_memory_on_both_sides(
        session: Session, tmp_path: Path) -> None:
    """1 GiB dense and 4 GiB sparse, there and back; the host's memory is that of the test."""
    client = session.client
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    block = os.urandom(MIB)
    with dense.open("wb") as file:
        for _ in range(1024):
            file.write(block)
    with sparse.open("wb") as file:
        file.truncate(4 << 30)
        file.seek(3 << 30)
        file.write(b"in the middle")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert await client.put(dense, "dense") > 1 << 30
    assert await client.put(sparse, "sparse") < MIB
    _, text = await run(client, "sh", "-c", "sha256sum dense | cut -c1-64; stat -c '%s %b' sparse")
    digest, size, blocks = text.split()
    assert (int(size), int(blocks) < 10_000) == (4 << 30, True)
    await client.get("dense", tmp_path / "dense2", limit=1 << 40)
    await client.get("sparse", tmp_path / "sparse2", limit=1 << 40)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    with (tmp_path / "dense2").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest
    assert (tmp_path / "sparse2").stat().st_size == 4 << 30
    assert (tmp_path / "sparse2").stat().st_blocks < 10_000
    for path in (dense, sparse, tmp_path / "dense2", tmp_path / "sparse2"):
        path.unlink()


async def fails(home: Home, shape: MachineSpec, script: str, *, user: str = "root") -> VmjobError:
    """The error of a job whose machine ends under it."""
    with anyio.fail_after(120), pytest.raises(VmjobError) as caught:
        async with open_session(home, QemuDriver(), shape) as opened, opened.explaining():
            await run(opened.client, "sh", "-c", script, user=user)
    return caught.value


async def test_a_panic_of_the_guest_is_told_as_one(vm_home: Home, vm_shape: MachineSpec) -> None:
    error = await fails(vm_home, vm_shape, "echo c > /proc/sysrq-trigger; sleep 1000")
    assert isinstance(error, GuestPanic)
    assert "Kernel panic" in error.message
    assert error.context["console"]


async def test_an_agent_killed_in_the_machine_is_told_as_that(vm_home: Home,
                                                              vm_shape: MachineSpec) -> None:
    error = await fails(vm_home, vm_shape, "kill -9 $PPID; sleep 1000")
    assert isinstance(error, AgentLost)
    assert "agent ended with status 137" in error.message


async def test_a_machine_that_switches_itself_off_is_no_success(vm_home: Home,
                                                                vm_shape: MachineSpec) -> None:
    error = await fails(vm_home, vm_shape, "echo o > /proc/sysrq-trigger; sleep 1000")
    assert isinstance(error, MachineDied)
    assert error.context["reason"] == "powered-off"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
async def test_a_full_disk_of_the_host_is_told_and_hangs_nothing(
        default_image: object, vm_shape: MachineSpec, tmp_path: Path) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(small)], check=True)
    try:
        error = await fails(Home(small / "home"), vm_shape, "head -c 100M /dev/urandom > big; sync",
                            user="job")
        assert isinstance(error, HostDiskFull)
        assert error.retryable
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(("code", "reason", "console", "expected"), [
    (0, "guest-shutdown", "", EndReason.POWERED_OFF),
    (0, "guest-shutdown", "Kernel panic, then it restarted", EndReason.POWERED_OFF),
    (0, "guest-reset", "vmjob-init: agent ended with status 1", EndReason.RESET),
    (0, "guest-reset", "[1.0] Kernel panic - not syncing: x", EndReason.PANIC),
    (0, "host-signal", "", EndReason.KILLED), (0, None, "", EndReason.CRASHED),
    (1, None, "", EndReason.CRASHED), (-11, None, "", EndReason.CRASHED),
    (-9, None, "", EndReason.KILLED)])
def test_every_end_has_its_reason(code: int, reason: str | None, console: str,
                                  expected: EndReason) -> None:
    ended = explain_end(False, code, reason, console, "qemu said")
    assert ended.reason is expected
    assert end_error(ended, console).exit_code == 125
