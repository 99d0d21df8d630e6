"""What becomes of jobs when their client quits, dies, or learns new preferences.

One client, started again and again. Preferences say that suspended tasks have to leave.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from tests.e2e.life import (
    Task,
    World,
    hypervisors,
    make_template,
    measured,
    seconds_to_end,
)
from vmjob.home import Home
from vmjob.image.store import Image

pytestmark = [pytest.mark.e2e, pytest.mark.vm, pytest.mark.timeout(600)]

JOBS = {"first": 450, "second": 450, "third": 60}
#: MiB of machines that nobody has frozen yet.
MEMORY = {"third": 304}
#: Seconds between checkpoints: first none in the time of a test, then as often as it goes.
NEVER, OFTEN = 600.0, 1.0
#: Seconds. The client kills a task that has not left by then.
MOST_TO_LEAVE = 60.0
#: For processes of a client that was killed to be gone; who only misses its heartbeats takes 20.
AT_ONCE = 10.0
CONTINUES = "the machine continues from a checkpoint"
#: Rounds that a job may have done after its last checkpoint began, and that are done again.
AGAIN = 60


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, image_home: Home,
         default_image: Image) -> Iterator[World]:
    root = tmp_path_factory.mktemp("client")
    make_template(image_home, root / "template")
    with World(root / "world", default_image, image_home, JOBS, memory=MEMORY,
               leave_in_memory=False, checkpoint_period=NEVER) as made:
        yield made


@pytest.fixture(scope="module")
def first(here: World) -> Task:
    return here.released("first")


@pytest.fixture(scope="module")
def second(here: World) -> Task:
    return here.released("second")


def totals(task: Task) -> float:
    """Seconds of processor time that a job's slot has written down."""
    found: float = json.loads((task.slot / "vmjob_totals.json").read_text())["cpu_seconds"]
    return found


def kept_by_client(here: World, name: str) -> float:
    """The same, in the file by which a client remembers its tasks."""
    state = (here.client.folder / "client_state.xml").read_text()
    found = re.search(rf"<active_task>(?:(?!</active_task>).)*<result_name>{name}</result_name>"
                      r"(?:(?!</active_task>).)*<checkpoint_cpu_time>([0-9.e+-]+)<", state,
                      re.DOTALL)
    assert found, state
    measured(f"processor time: the client has kept {float(found[1]):.1f}")
    return float(found[1])


def checkpoints(task: Task) -> list[datetime]:
    """When they were made."""
    return [datetime.fromisoformat(each) for each in
            re.findall(r"(\S+ \S+) vmjob: checkpoint \d", task.log())]


def processes(task: Task) -> list[psutil.Process]:
    wrapper = task.wrapper()
    found = hypervisors(wrapper)
    assert len(found) == 1, task.story()
    return [wrapper, *found]


def owners(task: Task) -> list[psutil.Process]:
    """All processes that work in a job's slot."""
    found = []
    for each in psutil.process_iter():
        try:
            if Path(each.cwd()) == task.slot and each.status() != psutil.STATUS_ZOMBIE \
                    and "wrapper" in each.cmdline():
                found.append(each)
        except (psutil.Error, OSError):
            continue
    return found


def test_new_preferences_change_the_pace_of_checkpoints(here: World, first: Task) -> None:
    first.goes_on()
    assert checkpoints(first) == []
    here.client.set_preferences(disk_interval=OFTEN)
    first.logs(r"preferences: a checkpoint every 1 s")
    first.kept(3)
    *_, one, other = checkpoints(first)
    assert (other - one).total_seconds() < 120  # and not NEVER
    assert first.wait(lambda task: task.checkpoint_cpu_time > 0).checkpoint_cpu_time > 0


def test_a_job_that_has_to_leave_when_suspended_goes_on_from_its_checkpoint(
        here: World, first: Task) -> None:
    gone = processes(first)
    lines, since = first.lines(), time.monotonic()
    here.client.suspend(first.name)
    took = seconds_to_end(gone, since, MOST_TO_LEAVE)
    measured(f"suspended, so quit: gone after {took:.1f} s")
    kept = first.wait(lambda task: task.active not in {"EXECUTING", "QUIT_PENDING"})
    written = totals(first)
    assert written >= kept.checkpoint_cpu_time > 0
    done = first.lines()
    assert done >= lines  # the last checkpoint is no older than the order to leave
    here.client.resume(first.name)
    first.logs(f"start 2[^$]*{CONTINUES}")
    first.goes_on(1)
    assert first.lines() > done
    told = first.wait(lambda task: task.cpu_time >= written)
    measured(f"processor time: written {written:.1f}, told before {kept.cpu_time:.1f}, "
          f"told after {told.cpu_time:.1f}")
    assert told.cpu_time < written + 30


def test_a_client_that_quits_loses_no_work_of_jobs_that_run_or_stand_still(
        here: World, first: Task, second: Task) -> None:
    here.client.set_preferences(leave_apps_in_memory=1)
    second.kept()
    here.client.suspend(second.name)
    second.wait(lambda task: task.active == "SUSPENDED")
    third = here.released("third")
    third.logs("a machine is frozen")
    first.goes_on()
    both = {each.name: each for each in (first, second)}
    slots = {name: each.slot for name, each in both.items()}
    before = {name: (each.lines(), each.told()) for name, each in both.items()}
    gone = [*processes(first), *processes(second), third.wrapper(), third.machine()]
    since = time.monotonic()
    with ThreadPoolExecutor(1) as beside:
        quitting = beside.submit(here.client.quit, 90)
        took = seconds_to_end(gone, since, MOST_TO_LEAVE)
        quitting.result()
    measured(f"quit: the tasks had gone after {took:.1f} s, "
             f"the client after {time.monotonic() - since:.1f} s")
    written = {name: json.loads((slot / "vmjob_totals.json").read_text())["cpu_seconds"]
               for name, slot in slots.items()}
    for name, slot in slots.items():
        log = (slot / "stderr.txt").read_text()
        assert re.search(r"the client wants us to leave\n[^$]*checkpoint \d", log), log
        assert "there was no time" not in log
        assert (slot / "vmjob" / "stdout").read_bytes().count(b"\n") >= before[name][0]
        assert written[name] >= before[name][1].cpu_time - 1
        assert written[name] >= kept_by_client(here, name) > 0
    here.client.start()
    assert both[second.name].told().suspended
    here.client.resume(second.name)
    for name, each in both.items():
        each.goes_on(1)
        assert each.lines() >= before[name][0]
        told = each.wait(lambda task, name=name: task.cpu_time >= written[name])  # type: ignore[misc]
        measured(f"processor time: told {before[name][1].cpu_time:.1f} before, "
              f"written {written[name]:.1f}, told {told.cpu_time:.1f} after")
        assert told.cpu_time < written[name] + 30


def test_the_successor_of_a_killed_client_finds_the_slots_free(
        here: World, first: Task, second: Task) -> None:
    both = (first, second)
    for each in both:
        each.goes_on()
    here.client.suspend(second.name)
    second.wait(lambda task: task.active == "SUSPENDED")
    old = [process for each in both for process in processes(each)]
    lines = [each.lines() for each in both]
    starts = [each.log().count(CONTINUES) for each in both]
    since = time.monotonic()
    here.client.kill()
    with ThreadPoolExecutor(1) as beside:
        starting = beside.submit(here.client.start)
        took = seconds_to_end(old, since, AT_ONCE)
        starting.result()
    here.client.resume(second.name)
    measured(f"killed: all old processes had gone after {took:.2f} s")
    for each, count, start in zip(both, lines, starts, strict=True):
        each.goes_on()
        assert each.lines() >= count - AGAIN
        assert each.log().count(CONTINUES) == start + 1
        assert len(owners(each)) == 1
        assert not set(processes(each)) & set(old)
    here.client.set_preferences(disk_interval=NEVER)  # the rest is faster so


@pytest.mark.parametrize("word", JOBS)
def test_it_ends_with_the_right_answer(here: World, word: str) -> None:
    job = here.job(word)
    before = here.client.task(job.name)
    result = job.ends_well()
    assert before is None or result.cpu_time >= before.cpu_time
    assert result.elapsed > 0
    said = re.search(r"processor: +([0-9.]+) s", result.stderr_out)
    assert said
    assert abs(result.cpu_time - float(said[1])) < 1
