"""Messages of the project's server reach the job, however early they come."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmjob.grid.boinc import Runtime, TrickleDown
from vmjob.job.files import Folder
from vmjob.job.model import SHARED, Job
from vmjob.wrapper.carrying import Carrier
from vmjob.wrapper.log import Log
from vmjob.wrapper.options import Options

pytestmark = pytest.mark.anyio


async def test_a_message_that_comes_before_the_job_is_known_is_kept_for_it(tmp_path: Path) -> None:
    message = tmp_path / "trickle_down_1"
    message.write_text("words")
    with Runtime.open(tmp_path) as runtime:
        carrier = Carrier(runtime, tmp_path, Options(), Log(), lambda why: None)
        carrier._hear(TrickleDown(message))
        assert message.exists()
        shared = tmp_path / "shared"
        carrier._know(Job(tasks=(), folders=(Folder(SHARED, shared, "/shared", live=True),)))
    assert (shared / message.name).read_text() == "words"
    assert not message.exists()


async def test_a_message_for_a_job_that_cannot_hear_is_taken_away(tmp_path: Path) -> None:
    message = tmp_path / "trickle_down_1"
    message.write_text("words")
    with Runtime.open(tmp_path) as runtime:
        carrier = Carrier(runtime, tmp_path, Options(), Log(), lambda why: None)
        carrier._know(Job(tasks=()))
        carrier._hear(TrickleDown(message))
    assert not message.exists()
