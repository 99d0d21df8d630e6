"""What the engine does for a job file, on a fake machine: folders, ports, screen, duration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest

from vmjob.engine.record import Record
from vmjob.engine.request import Request, Survival
from vmjob.engine.run import run_job
from vmjob.engine.slot import Asked, Slot
from vmjob.grid.contract import Quiet
from vmjob.home import Home
from vmjob.job.files import Folder, Input
from vmjob.job.model import Forward, Hardware, Job, Network, Task, Triggers
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver

pytestmark = pytest.mark.anyio


class Heard(Quiet):
    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.warnings: list[str] = []
        self.trickles: list[tuple[str, str]] = []
        self.addresses: list[tuple[str, str]] = []
        self.phases: list[str] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def fraction_done(self, fraction: float) -> None:
        self.fractions.append(fraction)

    async def trickle(self, variety: str, text: str) -> bool:
        self.trickles.append((variety, text))
        return True

    def address(self, what: Literal["web", "console", "port"], where: str) -> None:
        self.addresses.append((what, where))

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Bench:
    """Runs one shell script as a job with a shared folder."""

    def __init__(self, home: Home, shape: MachineSpec, place: Path) -> None:
        self._home, self._shape = home, shape
        self.place = place
        self.shared = place / "shared"
        self.shared.mkdir()
        self.grid = Heard()

    def job(self, script: str, **more: Any) -> Job:
        return Job((Task(("sh", "-c", script), name="boinc_app"),),
                   folders=(Folder("shared", self.shared, "shared"),), **more)

    async def run(self, script: str, survival: Survival | None = None, *, remote: bool = False,
                  **more: Any) -> Record:
        job = self.job(script, **more)
        shape = replace(self._shape, display=job.hardware.screen, network=job.network)
        with anyio.fail_after(60):
            return await run_job(self._home, Request(
                job, FakeDriver(), shape, {}, survival=survival, remote_ports=remote), self.grid)


@pytest.fixture
def bench(home: Home, fake_shape: MachineSpec, tmp_path: Path) -> Bench:
    return Bench(home, fake_shape, tmp_path)


# -- triggers ----------------------------------------------------------------------------------


async def test_a_completion_file_ends_the_job_and_what_it_shared_is_collected(
        bench: Bench) -> None:
    record = await bench.run(
        "echo result > shared/result; printf '7\\n1\\nthe end\\n' > done; mv done shared; sleep 60",
        triggers=Triggers(completion="done"))
    assert (record.exit_code, record.message, record.notice) == (7, "the end", True)
    assert (bench.shared / "result").read_text() == "result\n"


async def test_what_a_job_says_just_before_its_last_task_ends_is_heard(bench: Bench) -> None:
    record = await bench.run(
        "printf '7\\n1\\nthe end\\n' > shared/done; echo word > shared/trickle",
        triggers=Triggers(completion="done", trickles=("trickle",)))
    assert (record.exit_code, record.message, record.notice) == (7, "the end", True)
    assert bench.grid.trickles == [("trickle", "word\n")]
    assert not (bench.shared / "trickle").exists()


async def test_triggers_that_an_earlier_run_left_are_gone_before_the_first_task(
        bench: Bench) -> None:
    for name in ("done", "later", "fraction", "heart", "trickle"):
        (bench.shared / name).write_text("1\n")
    record = await bench.run("ls shared > found; mv found shared; sleep 2", triggers=Triggers(
        completion="done", temporary_exit="later", fraction_done="fraction", heartbeat="heart",
        trickles=("trickle",)))
    assert record.exit_code == 0
    assert (bench.shared / "found").read_text() == ""


LATER = "printf '1\\n0\\nno work\\n' > later; mv later shared; sleep 3; echo on"


async def test_a_job_without_a_slot_waits_where_it_is_and_goes_on(bench: Bench) -> None:
    record = await bench.run(LATER, triggers=Triggers(temporary_exit="later"))
    assert (record.exit_code, record.error) == (0, None)
    assert record.phases["suspended"] >= 1
    assert bench.grid.warnings == ["the job waits for 1 seconds: no work"]
    assert not (bench.shared / "later").exists()


async def test_a_job_with_a_slot_ends_with_75_and_can_be_continued(bench: Bench) -> None:
    triggers = Triggers(temporary_exit="later")
    with Slot.claim(bench.place / "slot") as slot:
        slot.begin(Asked(bench.job(LATER, triggers=triggers), "auto", "baseline", None))
        record = await bench.run(LATER, Survival(slot), triggers=triggers)
        assert record.exit_code == 75
        assert record.error is not None
        assert record.error["code"] == "postponed"
        assert record.error["context"] == {"delay": 1.0, "notice": False}
        assert slot.result() is None  # it has not ended


async def test_a_job_whose_heart_stops_ends_with_an_error(bench: Bench) -> None:
    record = await bench.run("sleep 60", triggers=Triggers(heartbeat="beat",
                                                           heartbeat_interval=0.5))
    assert record.exit_code == 125
    assert record.error is not None
    assert record.error["code"] == "heartbeat-stopped"


async def test_the_accounts_key_does_not_go_in_as_an_input_either(bench: Bench) -> None:
    given = bench.place / "init_data.xml"
    given.write_text("<app_init_data>\n<user_name>ann</user_name>\n"
                     "<authenticator>0123456789abcdef</authenticator>\n</app_init_data>\n")
    link = bench.place / "link"
    link.symlink_to(given)
    await bench.run("cat data other > shared/seen",
                    inputs=(Input(given, "data"), Input(link, "other")))
    seen = (bench.shared / "seen").read_text()
    assert "<user_name>ann</user_name>" in seen
    assert "0123456789abcdef" not in seen
    assert "0123456789abcdef" in given.read_text()


# -- duration, trickles ------------------------------------------------------------------------


async def test_a_fixed_duration_is_the_fraction_done(bench: Bench,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.engine.triggers.SHARE_PERIOD", 0.2)
    record = await bench.run("sleep 60", duration=1.0)
    assert (record.exit_code, record.error) == (0, None)
    assert bench.grid.fractions == sorted(bench.grid.fractions)
    assert 0.2 <= bench.grid.fractions[0] < 1


async def test_a_file_tells_that_the_duration_is_over(bench: Bench) -> None:
    file = bench.place / "output"
    await bench.run("true", duration=60.0, duration_file=file)
    assert not file.exists()
    await bench.run("sleep 60", duration=0.3, duration_file=file)
    assert file.read_text() == "Work Unit completed.\n"


async def test_the_run_time_is_sent_every_so_often(bench: Bench) -> None:
    await bench.run("sleep 1", trickle_every=0.3)
    assert {variety for variety, _ in bench.grid.trickles} == {"cpu_time"}


# -- ports, screen -----------------------------------------------------------------------------


async def test_ports_are_told_and_are_for_this_computer_unless_allowed(bench: Bench) -> None:
    record = await bench.run("true", network=Network.NAT, forwards=(
        Forward(80, web=True), Forward(22, remote=True)))
    assert record.error is None
    assert [what for what, _ in bench.grid.addresses] == ["web", "port"]
    assert bench.grid.addresses[0][1].startswith("http://127.0.0.1:")
    assert [warning.partition(";")[0] for warning in bench.grid.warnings] == [
        "port 22 of the job is opened for this computer only"]
    bench.grid.warnings.clear()
    await bench.run("true", network=Network.NAT, forwards=(Forward(22, remote=True),), remote=True)
    assert bench.grid.warnings == []


async def test_a_port_that_is_taken_is_replaced_by_one_that_is_free(bench: Bench) -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    taken = listener.extra(anyio.abc.SocketAttribute.local_port)
    await bench.run("true", network=Network.NAT, forwards=(Forward(80, taken, web=True),))
    await listener.aclose()
    assert [warning.partition(";")[0] for warning in bench.grid.warnings] == [
        f"port {taken} of this computer is taken"]
    assert str(taken) not in bench.grid.addresses[0][1]


async def test_ports_without_a_network_are_not_opened(bench: Bench) -> None:
    await bench.run("true", forwards=(Forward(80),))
    assert bench.grid.addresses == []
    assert bench.grid.warnings == [
        "the job asks for ports but has no network; they are not opened"]


@pytest.mark.parametrize(("script", "pictures"), [("exit 3", True), ("true", False)])
async def test_a_job_that_fails_leaves_a_picture_of_its_screen(bench: Bench, script: str,
                                                               pictures: bool) -> None:
    picture = bench.place / "vbox_screenshot.png"
    await bench.run(script, hardware=Hardware(display=True, screenshot=picture))
    assert picture.exists() is pictures
    assert [what for what, _ in bench.grid.addresses] == ["console"]
    assert "password" in bench.grid.addresses[0][1]


# -- a disk of its own -------------------------------------------------------------------------


async def test_a_job_on_its_own_disk_is_told_what_it_does_not_get(
        bench: Bench, home: Home, fake_shape: MachineSpec) -> None:
    from vmjob.engine.foreign import run_foreign

    job = replace(bench.job("true"), tasks=(), forwards=(Forward(80),), hardware=Hardware(
        disk=bench.place / "vm_image.vdi", mailbox=b"", display=True))
    record = await run_foreign(home, Request(job, FakeDriver(), fake_shape, {}), bench.grid)
    assert record.error is not None  # the fake driver boots no disks
    assert [warning.partition(": ")[2] for warning in bench.grid.warnings] == [
        "folders, mailbox"]
