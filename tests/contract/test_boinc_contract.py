"""What an app and the client say to each other, whichever program the app is made with.

Each test is held by an app on `vmjob.grid.boinc`, and by one on BOINC's own library (Debian's
``libboinc-app7``): what that does is right by definition.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.simulated_client import DEADLINE, SimulatedClient
from vmjob.grid.boinc import Channel, Runtime, SlotTaken, open_channels, resolve
from vmjob.grid.boinc.initdata import read
from vmjob.grid.boinc.lockfile import SlotLock

APPS = Path(__file__).parent / "boinc_apps"
OURS = [sys.executable, str(APPS / "runtime_app.py"), "35"]
LIBRARY = [sys.executable, str(APPS / "library_app.py")]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[SimulatedClient]:
    with SimulatedClient(tmp_path) as made:
        yield made


@pytest.fixture(params=[OURS, LIBRARY], ids=["runtime", "library"])
def command(request: pytest.FixtureRequest) -> list[str]:
    return list(request.param)


def started(client: SimulatedClient, command: list[str], cpu: str = "0") -> None:
    client.start(command)
    client.until_said(f"ready {cpu}")


def test_a_status_has_both_cpu_times_and_a_changed_one_is_a_checkpoint(
        client: SimulatedClient, command: list[str]) -> None:
    started(client, command)
    client.tell("report 1.5 0 0.25")
    client.until(lambda: client.seen.current_cpu_time == 1.5, "the CPU time is known")
    assert client.seen.fraction_done == 0.25
    assert client.seen.checkpoints == []
    client.tell("report 2.5 2.5 0.5")
    client.until(lambda: client.seen.checkpoints == [2.5], "the checkpoint is known")
    assert (client.seen.current_cpu_time, client.seen.fraction_done) == (2.5, 0.5)
    count = len(client.seen.statuses)
    client.until(lambda: len(client.seen.statuses) > count, "the status is repeated")
    assert all({"current_cpu_time", "checkpoint_cpu_time"} <= each.keys()
               for each in client.seen.statuses)
    assert client.seen.checkpoints == [2.5]


def test_a_job_that_goes_on_knows_its_cpu_time_and_makes_no_checkpoint_by_that(
        tmp_path: Path, command: list[str]) -> None:
    with SimulatedClient(tmp_path, wu_cpu_time=59.2417) as client:
        started(client, command, "59.2417")
        client.tell("report 60 59.2417 0.5")
        client.until(lambda: client.seen.current_cpu_time == 60, "the CPU time is known")
        assert client.seen.checkpoints == []


def test_suspend_and_resume_arrive_in_their_order(
        client: SimulatedClient, command: list[str]) -> None:
    started(client, command)
    client.queue += ["<suspend/>\n"]
    client.until_said("suspended")
    client.queue += ["<resume/>\n"]
    client.until_said("resumed")
    client.queue += ["<suspend/>\n"]
    client.until(lambda: client.said.count("suspended") == 2, "the app is suspended again")


@pytest.mark.parametrize("order", ["quit", "abort"])
def test_the_order_to_leave_arrives(
        client: SimulatedClient, command: list[str], order: str) -> None:
    started(client, command)
    client.queue += [f"<{order}/>\n"]
    client.until_said(order)
    client.tell("exit 0")
    assert client.ended() == "restart"


def test_changed_preferences_are_read_anew(client: SimulatedClient, command: list[str]) -> None:
    started(client, command)
    client.write_init_data(checkpoint_period=120.0)
    client.queue += ["<reread_app_info/>\n"]
    client.until_said("reread")
    if command is OURS:
        client.until_said("period 120")


def test_a_finished_job_tells_so_with_its_last_status_before(
        client: SimulatedClient, command: list[str]) -> None:
    started(client, command)
    client.tell("report 3.5 3.5 1")
    client.until(lambda: client.seen.current_cpu_time == 3.5, "the status is known")
    client.tell("finish 0 1 all went well")
    assert client.ended() == "finished"
    lines = (client.slot / "boinc_finish_called").read_text().split("\n")
    assert lines[:3] == ["0", "all went well", "notice"]
    assert client.seen.current_cpu_time == 3.5


def test_a_job_that_failed_ends_with_its_code(
        client: SimulatedClient, command: list[str]) -> None:
    started(client, command)
    client.tell("finish 195 0")
    assert client.ended() == "failed 195"
    assert (client.slot / "boinc_finish_called").read_text() == "195\n"


def test_a_temporary_exit_has_the_three_lines(
        client: SimulatedClient, command: list[str]) -> None:
    started(client, command)
    client.tell("temporary 60 1 the disk is full")
    assert client.ended() == "postponed 60 'the disk is full' notice=True"


def test_a_trickle_waits_for_the_one_before(client: SimulatedClient, command: list[str]) -> None:
    started(client, command)
    client.listens = False
    client.tell("trickle cpu 1.5 seconds")
    client.until_said("trickle 1")
    client.listens = True
    client.until(lambda: client.seen.trickles, "the client takes the trickle")
    assert client.seen.trickles == ["<variety>cpu</variety>\n1.5 seconds"]
    if command is OURS:  # the library overwrites the file
        client.tell("trickle cpu too early")
        client.until_said("trickle 0")


def test_an_output_is_uploaded_before_the_end(
        client: SimulatedClient, command: list[str]) -> None:
    started(client, command)
    client.tell("upload out_1")
    client.until(lambda: client.seen.uploads == ["out_1"], "the client uploads")
    if command is OURS:
        client.until_said("Uploaded(name='out_1', status=0)")


def test_addresses_are_told(client: SimulatedClient, command: list[str]) -> None:
    started(client, command)
    client.tell("web http://127.0.0.1:8080/")
    client.until(lambda: client.seen.addresses.get("web_graphics_url")
                 == "http://127.0.0.1:8080/", "the web address is known")
    client.tell("desktop 127.0.0.1:3389")
    client.until(lambda: client.seen.addresses.get("remote_desktop_addr")
                 == "127.0.0.1:3389", "the other address is known")


def test_an_app_waits_for_the_lock_before_it_touches_the_channels(
        client: SimulatedClient, command: list[str]) -> None:
    lock = SlotLock(client.slot)
    lock.take(0)
    with lock:
        client.start(command)
        client.put(0, "<suspend/>\n")
        until = time.monotonic() + 1.0
        client.until(lambda: time.monotonic() > until, "a second passes")
        assert client.said == []
        assert client.memory[0] == 1
    if command is OURS:  # the library looks again after 35 s only
        client.until_said("ready 0")
        client.until_said("suspended")


def test_an_app_of_the_library_keeps_ours_out(client: SimulatedClient) -> None:
    started(client, LIBRARY)
    with pytest.raises(SlotTaken):
        SlotLock(client.slot).take(0.2)


def test_a_slot_that_stays_taken_is_left(client: SimulatedClient) -> None:
    with (client.slot / "boinc_lockfile").open("wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        client.start([*OURS[:2], "0.3"])
        client.until_said("taken")


# -- what only ours does, and what only the real one can judge -------------------------------------


def test_memory_and_network_are_told_when_they_change(client: SimulatedClient) -> None:
    started(client, OURS)
    client.until_said("network 1")
    client.until_said("memory 11000000 22000000000")
    client.heartbeat = "<heartbeat/>\n<network_suspended/>\n"
    client.until_said("network 0")


#: A client that starts an app as its child, as the real one does, and waits to be killed.
PARENT = """
import os, subprocess, sys, time
from pathlib import Path
path = Path("init_data.xml")
path.write_text(path.read_text().replace("<client_pid>0<", f"<client_pid>{os.getpid()}<"))
subprocess.Popen(sys.argv[1:], stdin=0, stdout=1)
time.sleep(60)
"""


def test_an_app_notices_at_once_that_its_client_was_killed(tmp_path: Path) -> None:
    with SimulatedClient(tmp_path, client_pid=0) as client:
        client.start([sys.executable, "-c", PARENT, *OURS])
        client.until_said("ready 0")
        client.app_outlives_us = True
        assert client.process is not None
        client.process.send_signal(signal.SIGKILL)
        client.process.wait()
        assert client.until_said("gone") < 10.0  # and not by its silence, after 20
        # A new client may have another instance on the same channels already.
        client.put(0, "<suspend/>\n")
        client.tell("report 1 1 0.5")
        client.tell("finish 0 0 too late")
        client.until((client.slot / "boinc_finish_called").exists, "the app has ended")
        assert client.memory[0] == 1
        assert not client.seen.statuses
        assert "suspended" not in client.said


def test_the_library_reads_our_graphics_status(client: SimulatedClient) -> None:
    started(client, OURS)
    client.queue += ["<suspend/>\n"]
    client.until_said("suspended")
    client.tell("status_file")
    client.until_said("written")
    code = """
import ctypes, json, sys
sys.path.insert(0, sys.argv[1])
from library_app import State, api
numbers = [ctypes.c_double() for _ in range(4)]
state = State()
failed = api._Z27boinc_parse_graphics_statusPdS_S_S_P12BOINC_STATUS(
    *map(ctypes.byref, numbers), ctypes.byref(state))
print(json.dumps([failed, *(each.value for each in numbers[1:]), state.suspended,
                  state.quit_request, state.abort_request]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(APPS)], cwd=client.slot,
                          timeout=DEADLINE, capture_output=True, check=True)
    assert json.loads(done.stdout) == [0, 1.5, 2.5, 0.5, 1, 0, 0]


def test_names_are_resolved_as_the_library_does(client: SimulatedClient) -> None:
    names = ["linked", "deep/linked", "plain", "missing", "empty", "symbolic", "almost", "spaced"]
    client.link("linked", "a file & more")
    client.link("deep/linked", "physical")
    (client.slot / "plain").write_text("data\n<soft_link>../../elsewhere</soft_link>\n")
    (client.slot / "empty").touch()
    (client.slot / "symbolic").symlink_to("../../projects/other")
    (client.slot / "almost").write_text("<soft_link>../../elsewhere\n")
    (client.slot / "spaced").write_text("  <soft_link> ../../elsewhere </soft_link>  \n")
    code = """
import ctypes, os, sys
library = ctypes.CDLL("libboinc.so.7")
for name in sys.argv[1:]:
    found = ctypes.create_string_buffer(1024)
    library.boinc_resolve_filename(os.fsencode(name), found, 1024)
    print(os.fsdecode(found.value))
"""
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=client.slot, timeout=DEADLINE,
                          capture_output=True, check=True, text=True)
    assert done.stdout.splitlines() == [
        str(resolve(name, client.slot).relative_to(client.slot)) for name in names]


@pytest.fixture
def native(client: SimulatedClient) -> Iterator[Callable[..., object]]:
    """Asks the client's own functions to do something with its channels."""
    with subprocess.Popen(
            [sys.executable, str(APPS / "native_channels.py"), client.slot / "boinc_mmap_file"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(*what: object) -> object:
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("text", ["<suspend/>\n", "x", "é" * 500, "y" * 1022])
def test_the_clients_functions_and_our_channels_understand_each_other(
        client: SimulatedClient, native: Callable[..., object], text: str) -> None:
    with open_channels(client.slot, read(client.slot / "init_data.xml")) as ours:
        for channel in Channel:
            assert native("get", channel) is None
            assert ours.put(channel, text)
            assert not native("put", channel, "not taken yet")
            assert native("get", channel) == text
            assert ours.get(channel) is None
            assert native("put", channel, text)
            assert not ours.put(channel, "not taken yet")
            assert ours.get(channel) == text
            assert native("get", channel) is None


def test_no_descriptor_of_a_runtime_is_left(client: SimulatedClient) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with Runtime.open(client.slot) as runtime:
        runtime.listen(lambda event: None)
    assert sorted(os.listdir("/proc/self/fd")) == before
