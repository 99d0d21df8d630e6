"""What was in the way is counted until the job has got further."""

from __future__ import annotations

from pathlib import Path

from vmjob.engine.control import Control
from vmjob.grid.boinc import Runtime
from vmjob.wrapper.accounts import Accounts
from vmjob.wrapper.client import ClientGrid
from vmjob.wrapper.ground import Ground
from vmjob.wrapper.log import Log
from vmjob.wrapper.options import Options
from vmjob.wrapper.totals import Totals


def test_faults_that_take_turns_are_each_counted_until_a_checkpoint(tmp_path: Path) -> None:
    with Runtime.open(tmp_path) as runtime:
        ground, kept, log = Ground(tmp_path, None, Options(), Log()), Totals(), Log()
        grid = ClientGrid(runtime, ground.where, kept, log, lambda: None)
        accounts = Accounts(runtime, tmp_path, ground, Control(), grid, kept, log)
        assert [accounts.fault(code) for code in ("machine-died", "agent-lost") * 3] == [
            0, 0, 1, 1, 2, 2]
        grid.checkpoint(1, 0.0, 0)
        assert accounts.fault("machine-died") == 0
