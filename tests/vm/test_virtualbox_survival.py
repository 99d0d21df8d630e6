"""A job in a slot ends with the right answer on VirtualBox, too, whatever is killed, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaign.kills import Field, Strike
from vmjob.home import Home
from vmjob.job.model import Network
from vmjob.machine.contract import MachineSpec

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("virtualbox")]

#: Seconds after which a run hangs: an undisturbed one took 33.
HANGS = 400
#: Seconds between checkpoints, each of which takes 0.6.
EVERY = 2.0
#: Into a snapshot, seconds: it takes 0.3.
MIDDLE = 0.15


@pytest.fixture
def field(tmp_path: Path, vm_home: Home, in_virtualbox: MachineSpec) -> Field:
    made = Field(tmp_path, vm_home, hashes=20, hangs=HANGS, hypervisor="virtualbox",
                 accel=in_virtualbox.accelerator, network=Network(in_virtualbox.network),
                 every=EVERY)
    made.clear()
    return made


@pytest.mark.parametrize("strikes", [
    pytest.param([Strike("checkpoint vboxmanage controlvm pause", 2, "both"),
                  Strike("restore vboxmanage adoptstate", 1, "self"),
                  Strike("checkpoint vboxmanage snapshot take", 2, "self"),
                  Strike("machine vboxmanage createmedium", 1, "both")], id="asked"),
    pytest.param([Strike("checkpoint vboxmanage snapshot take", 3, "self", delay=MIDDLE),
                  Strike("checkpoint vboxmanage snapshot take", 2, "both", delay=MIDDLE),
                  Strike("checkpoint vboxmanage snapshot take", 2, "hypervisor", delay=MIDDLE),
                  Strike("checkpoint vboxmanage controlvm resume", 2, "self")], id="in the middle"),
    pytest.param([Strike("checkpoint link", 3, "self"), Strike("checkpoint fsync", 9, "both"),
                  Strike("checkpoint rename", 4, "self"), Strike("machine link", 2, "self"),
                  Strike("checkpoint unlink", 3, "both")], id="kept"),
])
def test_a_job_struck_at_any_step_of_a_snapshot_goes_on_from_its_newest_checkpoint(
        field: Field, strikes: list[Strike]) -> None:
    case = field.case(iter(strikes))
    assert case.wrong == []
    assert [run.reached for run in case.runs if run.strike] == [True] * len(strikes)
    assert any(run.told("continues") for run in case.runs)
