"""What a volunteer, the client or bad luck does to one job, which ends with the right answer.

All jobs wait in one client until their test lets them go on. The tests do what is to be done to
each and do not wait for its end; the last ones do that for all.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.e2e.life import (
    Task,
    World,
    hypervisors,
    is_alive,
    make_template,
    measured,
    seconds_to_end,
    stands_still,
)
from vmjob.home import Home
from vmjob.image.store import Image

pytestmark = [pytest.mark.e2e, pytest.mark.vm, pytest.mark.timeout(600)]

#: Rounds of each job; ten take about a second. Those that are aborted are never at their end.
JOBS = {"suspended": 150, "while made": 60, "while started": 100, "wrapper killed": 200,
        "machine killed": 200, "killed while suspended": 100, "terminated": 200,
        "two at once": 800, "watched": 60,
        "aborted": 5000, "aborted while made": 5000, "aborted while suspended": 5000}
#: Those whose machine nobody has frozen yet, MiB.
MEMORY = {"while made": 272, "aborted while made": 288}
ENDING = [word for word in JOBS if "aborted" not in word]
#: Seconds. What an aborted job may take to be gone: 2 on a computer that has nothing else to do.
#: After 60 the client ends it by force.
ABORTED = 30.0
#: For the kernel to end what dies with its parent.
AT_ONCE = 10.0
#: Seconds between the job's last look at its clock and the line of the log that tells of its end.
CLOCK = 6.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("life")


@pytest.fixture(scope="module")
def templates(root: Path, image_home: Home, default_image: Image) -> Home:
    make_template(image_home, root / "template")
    return image_home


@pytest.fixture(scope="module")
def worlds(root: Path, templates: Home, default_image: Image) -> Iterator[tuple[World, World]]:
    """Two clients, which take a while to fetch their work: both at once."""
    both = (World(root / "world", default_image, templates, JOBS, memory=MEMORY,
                  checkpoint_period=5),
            World(root / "throttled", default_image, templates, {"throttled": 400},
                  preferences={"cpu_usage_limit": 50}))
    with ThreadPoolExecutor() as pool:
        starting = [pool.submit(each.__enter__) for each in both]
    with ExitStack() as stack:
        for each, start in zip(both, starting, strict=True):
            if start.exception() is None:
                stack.push(each)
        for start in starting:
            start.result()
        yield both


@pytest.fixture(scope="module")
def here(worlds: tuple[World, World]) -> World:
    """Jobs that wait."""
    return worlds[0]


@pytest.fixture(scope="module", autouse=True)
def throttled(worlds: tuple[World, World]) -> World:
    """A client that lets its job compute half of the time."""
    worlds[1].released("throttled")
    return worlds[1]


@pytest.fixture(scope="module", autouse=True)
def second(here: World) -> Iterator[subprocess.Popen[bytes]]:
    """Another wrapper in a slot that has one, from early on: it waits for half a minute."""
    job = here.released("two at once")
    job.goes_on()
    process = subprocess.Popen([sys.executable, "-m", "vmjob", "wrapper", "--allow-emulation"],
                               cwd=job.slot, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_a_throttled_client_quits_and_its_job_has_time_for_a_checkpoint(throttled: World) -> None:
    """Even if it never says so: where a <suspend/> has not been taken, its <quit/> is not sent."""
    job = throttled.job("throttled")
    job.goes_on()
    wrapper, slot = job.wrapper(), job.slot
    since = time.monotonic()
    throttled.client.quit(90)
    assert not is_alive(wrapper)
    measured(f"throttled: the client had gone after {time.monotonic() - since:.1f} s")
    log = (slot / "stderr.txt").read_text()
    assert re.search(r"wants us to leave\n[^$]*checkpoint \d", log), log
    throttled.client.start()
    job.goes_on()


def test_a_suspended_machine_stands_still_and_goes_on(here: World) -> None:
    job = here.released("suspended")
    job.goes_on()
    wrapper, machine = job.wrapper(), job.machine()
    here.client.suspend(job.name)
    job.wait(lambda task: task.active == "SUSPENDED")
    stands_still(machine)
    lines, before = job.lines(), job.told()
    stands_still(wrapper)
    after = job.told()
    assert job.lines() == lines
    assert is_alive(wrapper)
    assert after.cpu_time - before.cpu_time < 0.5
    assert after.fields["elapsed task time"] == before.fields["elapsed task time"]
    here.client.resume(job.name)
    job.goes_on()
    assert (job.wrapper(), job.machine()) == (wrapper, machine)


@pytest.mark.parametrize(("word", "sign"), [("while made", "a machine is frozen"),
                                            ("while started", "start 1")])
def test_a_machine_that_is_still_made_stands_as_soon_as_its_tasks_would_run(
        here: World, word: str, sign: str) -> None:
    job = here.released(word)
    job.logs(sign)
    here.client.suspend(job.name)
    job.wait(lambda task: task.active == "SUSPENDED")
    job.logs("the machine starts")
    stands_still(job.machine())
    # A machine that is only to be started may be faster than the client's word.
    lines = job.lines()
    assert lines == 0 or word == "while started"
    here.client.resume(job.name)
    job.goes_on()
    assert "start 2" not in job.log()


def test_a_second_wrapper_leaves_a_slot_that_has_one(
        here: World, second: subprocess.Popen[bytes]) -> None:
    job = here.job("two at once")
    machine = job.machine()
    err = second.communicate(timeout=60)[1].decode()
    assert second.returncode == 0
    assert "another process holds" in err
    assert (job.slot / "boinc_temporary_exit").read_text().startswith("120\nanother instance")
    # The first has lost no word of the client's, and no work.
    assert job.machine() == machine
    here.client.suspend(job.name)
    stands_still(machine)
    here.client.resume(job.name)
    job.goes_on()
    assert "start 2" not in job.log()


def test_a_wrapper_that_is_killed_takes_its_machine_along(here: World) -> None:
    job = here.released("wrapper killed")
    job.kept()
    job.goes_on()
    wrapper, machine = job.wrapper(), job.machine()
    since = time.monotonic()
    wrapper.kill()
    gone = seconds_to_end([wrapper, machine], since, AT_ONCE)
    measured(f"killed wrapper: its machine was gone after {gone:.2f} s")
    job.logs("start 2")
    job.logs("the machine continues from a checkpoint")
    job.goes_on()


def test_a_machine_that_is_killed_goes_on_from_its_checkpoint_at_once(here: World) -> None:
    job = here.released("machine killed")
    job.kept()
    job.goes_on()
    wrapper, machine = job.wrapper(), job.machine()
    since = time.monotonic()
    machine.kill()
    job.logs("it goes on from the last checkpoint")
    job.logs("the machine continues from a checkpoint")
    job.goes_on(1)
    measured(f"killed machine: its next round was done after {time.monotonic() - since:.1f} s")
    assert job.wrapper() == wrapper
    assert job.machine() != machine


def test_a_machine_that_is_killed_while_it_stands_still_stands_still_again(here: World) -> None:
    job = here.released("killed while suspended")
    job.goes_on()
    wrapper, machine = job.wrapper(), job.machine()
    here.client.suspend(job.name)
    job.wait(lambda task: task.active == "SUSPENDED")
    stands_still(machine)
    machine.kill()
    job.logs("it goes on from the last checkpoint")
    other = job.machine()
    stands_still(other)
    lines = job.lines()
    stands_still(other)
    assert job.lines() == lines
    here.client.resume(job.name)
    job.goes_on()
    assert job.wrapper() == wrapper


def test_a_wrapper_that_is_told_to_end_keeps_its_machine_first(here: World) -> None:
    job = here.released("terminated")
    job.goes_on()
    wrapper, machine = job.wrapper(), job.machine()
    lines, since = job.lines(), time.monotonic()
    wrapper.send_signal(signal.SIGTERM)
    gone = seconds_to_end([wrapper, machine], since, 60)
    measured(f"terminated: gone after {gone:.1f} s")
    job.logs("a signal wants us to leave[^$]*checkpoint \\d[^$]*start 2")
    job.logs("the machine continues from a checkpoint")
    job.goes_on(1)
    assert job.lines() > lines
    assert "signal 15" in here.client.log


def test_the_finish_is_told_when_the_machine_has_ended(here: World) -> None:
    job = here.released("watched")
    job.goes_on()
    wrapper, machine, slot = job.wrapper(), job.machine(), job.slot
    finished = slot / "boinc_finish_called"
    assert eventually(finished.exists, 120), job.story()
    since = time.monotonic()
    assert not is_alive(machine)
    assert not (slot / "vmjob" / "machine").exists()
    gone = seconds_to_end([wrapper], since, 30)
    measured(f"finished: the wrapper left {gone:.2f} s after it said so")


def gone_after_abort(here: World, job: Task) -> None:
    wrapper, slot = job.wrapper(), job.slot
    everything = [wrapper, *wrapper.children(recursive=True)]
    assert hypervisors(wrapper)
    since = time.monotonic()
    here.client.abort(job.name)
    gone = seconds_to_end(everything, since, ABORTED)
    measured(f"aborted: {len(everything)} processes were gone after {gone:.2f} s")
    assert eventually(lambda: not any(slot.iterdir()), 30), list(slot.iterdir())


def test_an_aborted_job_is_gone_at_once(here: World) -> None:
    job = here.released("aborted")
    job.goes_on()
    gone_after_abort(here, job)


def test_a_job_that_is_aborted_while_suspended_is_gone_at_once(here: World) -> None:
    job = here.released("aborted while suspended")
    job.goes_on()
    here.client.suspend(job.name)
    job.wait(lambda task: task.active == "SUSPENDED")
    stands_still(job.machine())
    gone_after_abort(here, job)


def test_a_job_that_is_aborted_while_its_machine_is_frozen_is_gone_at_once(here: World) -> None:
    job = here.released("aborted while made")
    job.logs("a machine is frozen")
    job.machine()
    gone_after_abort(here, job)


@pytest.mark.parametrize("word", ENDING)
def test_it_ends_with_the_right_answer(here: World, word: str) -> None:
    result = here.job(word).ends_well()
    assert result.cpu_time > 0
    assert result.elapsed > 0


@pytest.mark.parametrize("word", [word for word in JOBS if "aborted" in word])
def test_the_server_hears_of_the_abort(here: World, word: str) -> None:
    result = here.job(word).result()
    assert (result.exit_status, result.state) == (203, 6)  # EXIT_ABORTED_VIA_GUI


def test_nothing_is_left_of_any_machine(here: World) -> None:
    own = here.client.project_directory / "vmjob"
    assert list((own / "machines").iterdir()) == []
    assert [each for each in (own / "templates").iterdir() if each.name.startswith(".")] == []


def test_a_throttled_job_ends_with_the_right_answer_and_the_right_time(throttled: World) -> None:
    job = throttled.job("throttled")
    result = job.ends_well()
    sent = throttled.client.log.count("<suspend/>")
    measured(f"throttled: suspended {sent} times in {result.elapsed:.0f} s")
    assert sent >= 10
    # Nothing of it is worth a line.
    assert "warning" not in result.stderr_out
    assert "Traceback" not in result.stderr_out
    assert result.stderr_out.count(", start ") == 2
    fetched = re.search(r"(\S+ \S+) vmjob: output files are fetched", result.stderr_out)
    assert fetched
    here = datetime.fromisoformat(fetched[1]).timestamp()
    there = float(result.outputs["clock"].read_text())
    measured(f"throttled: the guest's clock was {there - here:+.1f} s off, or less")
    assert abs(there - here) < CLOCK
