"""A machine that should make no more checkpoints is followed by another, and the job goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.noted_log import NotedLog
from vmjob.grid.boinc import Runtime
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import SimulatedDriver
from vmjob.machine.fake.programs import hash_chain
from vmjob.machine.fake.simulated import SimulatedFaults
from vmjob.shape import Shape
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

    async def shape(home: Home, image: str, accel: str, **more: Any) -> Shape:
        parts = {"root": SimpleNamespace(sha256="")}
        found: Any = SimpleNamespace(name=image, manifest=SimpleNamespace(
            parts=parts, kernel_version=""))
        return Shape(driver, MachineSpec("", home.root, None, memory_mb=128), found, "")

    monkeypatch.setattr(ground, "machine_shape", shape)
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
