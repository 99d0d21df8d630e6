"""Events, and those who read them or do not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import anyio
import pytest

from vmjob.grid.events import Events
from vmjob.grid.terminal import Terminal

pytestmark = pytest.mark.anyio


@pytest.fixture
def terminal() -> Terminal:
    return Terminal("none", output=None, quiet=True)


async def test_all_events_are_written_in_order_before_the_end(
        tmp_path: Path, terminal: Terminal) -> None:
    events = Events(terminal, (tmp_path / "events").open("ab"))
    for number in range(1000):
        await events.output("stdout", b"x" * number)
    events.tell("finished")
    events.close()
    found = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [each["seq"] for each in found] == list(range(1, 1002))
    assert found[-1]["event"] == "finished"


async def test_whoever_does_not_read_a_pipe_does_not_hold_the_job(
        terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor keep it from hearing a signal, which waits for the loop."""
    monkeypatch.setattr("vmjob.grid.events.PATIENCE", 0.2)
    reader, writer = os.pipe()
    events = Events(terminal, os.fdopen(writer, "wb"))
    began = time.monotonic()
    with anyio.fail_after(10):
        events.message("m" * (2 << 20))
        for _ in range(1000):
            await events.output("stdout", b"x")
    events.close()
    assert time.monotonic() - began < 10
    os.close(reader)


async def test_a_pipe_whose_reader_is_gone_does_not_end_the_job(terminal: Terminal) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    events = Events(terminal, os.fdopen(writer, "wb"))
    for _ in range(3):
        events.message("hello")
    events.close()
