"""A machine that should make no more checkpoints is followed by another, and the job goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.noted_log import NotedLog
from tests.unit import simulated_vmjob
from vmjob.grid.boinc import Runtime
from vmjob.home import Home
from vmjob.machine.fake import SimulatedDriver
from vmjob.machine.fake.programs import hash_chain
from vmjob.machine.fake.simulated import SimulatedFaults
from vmjob.wrapper import contents, ground
from vmjob.wrapper.carrying import Carrier
from vmjob.wrapper.options import Options
from vmjob.wrapper.outcome import Finish

pytestmark = pytest.mark.anyio

#: Steps of the job, lines of its output, seconds of a simulated tick.
STEPS, EVERY, TICK = 600, 10, 0.005


async def test_a_job_whose_machines_all_wear_out_gives_what_it_gives(
        home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver(SimulatedFaults(worn=True), tick=TICK, steps=1)
    monkeypatch.setattr(simulated_vmjob, "SimulatedDriver", lambda: driver)
    monkeypatch.setattr(ground, "machine_shape", simulated_vmjob.shape)
    monkeypatch.setattr(ground, "CHECKPOINT_EVERY", 0.3)
    monkeypatch.setattr(contents, "find_image", lambda *_: None)
    (tmp_path / "vmjob.toml").write_text(
        f'run = ["hash-chain", "{STEPS}", "{EVERY}"]\n')
    log = NotedLog()
    with Runtime.open(tmp_path) as runtime:
        carrier = Carrier(runtime, tmp_path, Options(), log, lambda why: None)
        async with asyncio.timeout(60):
            assert await carrier.carry() == Finish(0), carrier.error
    made, renewed = (sum(words in line for line in log.lines)
                     for words in ("checkpoint ", "in a new process"))
    assert made == renewed >= 2, log.lines
    assert (carrier.slot / "stdout").read_bytes() == hash_chain(STEPS, EVERY)
