"""A file that is ready before the end is the client's, and nobody waits for it."""

from __future__ import annotations

import threading
from pathlib import Path

import anyio
import pytest

from vmjob.grid.boinc import Runtime
from vmjob.wrapper.client import ClientGrid
from vmjob.wrapper.ground import Ground
from vmjob.wrapper.log import Log
from vmjob.wrapper.options import Options
from vmjob.wrapper.totals import Totals


@pytest.mark.anyio
async def test_orders_are_heard_while_a_large_file_is_made_ready(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str]) -> None:
    copying, heard = threading.Event(), threading.Event()

    def copy(*files: object) -> None:
        copying.set()
        assert heard.wait(10), "nothing else happened while it was copied"

    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/early").touch()
    (tmp_path / "early").touch()
    monkeypatch.setattr("vmjob.wrapper.client.shutil.copyfileobj", copy)
    with Runtime.open(tmp_path) as runtime:
        ground = Ground(tmp_path, None, Options(), Log())
        grid = ClientGrid(runtime, ground.where, Totals(), Log(), lambda: None)
        async with anyio.create_task_group() as group:
            group.start_soon(grid.upload, "early")
            with anyio.fail_after(10):
                while not copying.is_set():  # noqa: ASYNC110 - a thread says it
                    await anyio.sleep(0.01)
            heard.set()
    assert "upload before the end: early" in capfd.readouterr().err
