"""Under BOINC a job on VirtualBox goes on in a new process before its snapshots are too many."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.noted_log import NotedLog
from vmjob import shape as shapes
from vmjob.grid.boinc import Runtime
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec
from vmjob.machine.virtualbox import saving
from vmjob.shape import Shape
from vmjob.wrapper import ground
from vmjob.wrapper.carrying import Carrier
from vmjob.wrapper.options import Options
from vmjob.wrapper.outcome import Finish

pytestmark = [pytest.mark.anyio, pytest.mark.vm, pytest.mark.timeout(900)]

#: Numbers that the job prints, seconds between two of them, and between checkpoints.
NUMBERS, PAUSE, EVERY = 60, 0.5, 4.0


async def test_a_job_gives_what_it_gives_over_several_processes_of_virtualbox(
        tmp_path: Path, vm_home: Home, in_virtualbox: MachineSpec,
        monkeypatch: pytest.MonkeyPatch) -> None:
    real = shapes.machine_shape

    async def interpreted(home: Home, image: str, accel: str, **more: Any) -> Shape:
        """The shape of ``in_virtualbox``: no job gets it that does not ask for it by name."""
        return await real(home, image, in_virtualbox.accelerator, **{
            **more, "hypervisor": "virtualbox", "allowed": None, "cpu": in_virtualbox.cpu_model})

    monkeypatch.setattr(ground, "machine_shape", interpreted)
    monkeypatch.setattr(ground, "CHECKPOINT_EVERY", EVERY)
    monkeypatch.setattr(saving, "MOST_SNAPSHOTS", 2)
    count = f"i=0; while [ $i -lt {NUMBERS} ]; do i=$((i + 1)); echo $i; sleep {PAUSE}; done"
    (tmp_path / "vmjob.toml").write_text(
        f'run = ["sh", "-c", "{count}"]\nmemory_mb = {in_virtualbox.memory_mb}\n'
        f'network = "{in_virtualbox.network}"\n')
    log = NotedLog()
    with Runtime.open(tmp_path) as runtime:
        carrier = Carrier(runtime, tmp_path, Options(), log, lambda why: None)
        async with asyncio.timeout(800):
            assert await carrier.carry() == Finish(0), (carrier.error, log.lines)
    renewed = sum("in a new process" in line for line in log.lines)
    assert renewed >= 1, log.lines
    assert not any("no checkpoint was made" in line for line in log.lines), log.lines
    assert (carrier.slot / "stdout").read_text().split() == [
        str(number) for number in range(1, NUMBERS + 1)]
