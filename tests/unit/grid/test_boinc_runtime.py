"""The runtime keeps an app and its client in touch, whatever goes wrong on either side."""

from __future__ import annotations

import errno
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.simulated_client import DEADLINE, HEARTBEAT, STATUS, TRICKLE_DOWN, SimulatedClient
from vmjob.grid.boinc import (
    Abort,
    ChannelsUnusable,
    ClientGone,
    Event,
    Memory,
    Network,
    Quit,
    Reread,
    Resume,
    Runtime,
    SlotTaken,
    SlotUnusable,
    Status,
    Suspend,
    TrickleDown,
    Uploaded,
    files,
    outgoing,
)

#: Holds the lock of a slot until its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from vmjob.grid.boinc import SlotLock
with SlotLock(Path()) as lock:
    lock.take(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def assert_free(slot: Path) -> None:
    """Another process could have the slot; this one could in any case."""
    done = subprocess.run([sys.executable, "-c", HOLDER], cwd=slot, timeout=DEADLINE, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    assert done.stdout == "held\n"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[SimulatedClient]:
    """One whose app is this process."""
    with SimulatedClient(tmp_path, client_pid=os.getppid()) as made:
        yield made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract tests keep the real pace."""
    monkeypatch.setattr("vmjob.grid.boinc.runtime.POLL_PERIOD", 0.02)


class App:
    """A runtime that listens, and what it heard."""

    def __init__(self, client: SimulatedClient, start: Callable[[Event], None] | None = None,
                 ) -> None:
        self.client = client
        self.heard: list[Event] = []
        self.runtime = Runtime.open(client.slot, lock_wait=0)
        self._first = start

    def _hear(self, event: Event) -> None:
        self.heard.append(event)
        if self._first is not None:
            self._first(event)

    def __enter__(self) -> Self:
        self.runtime.listen(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        self.runtime.close()

    def until_heard(self, event: Event) -> None:
        self.client.until(lambda: event in self.heard, f"{event} is heard")


# -- what is heard ---------------------------------------------------------------------------------


def test_everything_that_the_client_says_is_heard_in_its_order(client: SimulatedClient) -> None:
    with App(client) as app:
        for order, event in (("suspend", Suspend()), ("resume", Resume()), ("quit", Quit()),
                             ("abort", Abort())):
            client.queue.append(f"<{order}/>\n")
            app.until_heard(event)
    control = [each for each in app.heard if isinstance(each, Suspend | Resume | Quit | Abort)]
    assert control == [Suspend(), Resume(), Quit(), Abort()]


def test_the_first_heartbeat_decides_about_the_network_and_then_changes_do(
        client: SimulatedClient) -> None:
    client.heartbeat = "<heartbeat/>\n<network_suspended/>\n"
    with App(client) as app:
        app.until_heard(Network(False))
        client.queue.append("<network_available/>\n")
        app.until_heard(Network(True))
        client.heartbeat = "<heartbeat/><wss>5</wss><max_wss>7</max_wss>"
        app.until_heard(Memory(5, 7))
    assert [each for each in app.heard if isinstance(each, Network)] == [
        Network(False), Network(True)]


def test_new_preferences_are_told_and_broken_ones_leave_the_old(client: SimulatedClient) -> None:
    with App(client) as app:
        (client.slot / "init_data.xml").write_text("<app_init")
        client.queue.append("<reread_app_info/>\n")
        client.queue.append("<suspend/>\n")
        app.until_heard(Suspend())
        assert app.runtime.init is not None
        assert app.runtime.init.checkpoint_period == 60
        client.write_init_data(checkpoint_period=120.0)
        client.queue.append("<reread_app_info/>\n")
        client.until(lambda: app.runtime.init.checkpoint_period == 120, "the new ones are known")
        assert Reread(app.runtime.init) in app.heard
    assert sum(isinstance(each, Reread) for each in app.heard) == 1


def test_messages_of_the_server_are_told_once_and_after_a_restart_again(
        client: SimulatedClient) -> None:
    path = client.slot / "trickle_down_1700000000"
    with App(client) as app:
        path.write_text("hello")
        (client.slot / "trickle_down_link").symlink_to("/etc/passwd")
        client.put(TRICKLE_DOWN, "<have_trickle_down/>\n")
        app.until_heard(TrickleDown(path))
        client.until(lambda: client.put(TRICKLE_DOWN, "<have_trickle_down/>\n"), "it is taken")
        client.until(lambda: client.put(TRICKLE_DOWN, "<upload_file_status/>\n"), "it is taken")
    assert app.heard.count(TrickleDown(path)) == 1
    assert sum(isinstance(each, TrickleDown) for each in app.heard) == 1
    with App(client) as again:
        again.until_heard(TrickleDown(path))


def test_an_upload_is_told_each_time(client: SimulatedClient) -> None:
    with App(client) as app:
        for count in (1, 2):
            app.runtime.upload("out")
            client.until(lambda: app.heard.count(Uploaded("out", 0)) == count, "it is told")  # noqa: B023


def test_a_receiver_that_fails_does_not_deafen_the_runtime(
        client: SimulatedClient, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, Suspend):
            raise ZeroDivisionError
        if isinstance(event, Resume):
            sys.exit(3)

    with App(client, fail) as app:
        client.queue += ["<suspend/>\n", "<resume/>\n", "<quit/>\n"]
        app.until_heard(Quit())
    assert "the receiver of Suspend failed" in caplog.text
    assert "the receiver of Resume failed" in caplog.text


def test_a_slot_that_breaks_does_not_deafen_the_runtime(
        client: SimulatedClient, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def broken(directory: Path) -> list[object]:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(files, "incoming_trickles", broken)
    with App(client) as app:
        for order, event in (("suspend", Suspend()), ("quit", Quit())):
            client.queue.append(f"<{order}/>\n")
            app.until_heard(event)
    assert caplog.text.count("the connection with the client is disturbed") == 1


def test_garbage_in_the_channels_is_nothing(client: SimulatedClient) -> None:
    client.heartbeat = b"\xff" * 1023  # type: ignore[assignment]
    with App(client) as app:
        for channel in (0, 2, 7):
            client.put(channel, b"\xfe<" * 511)
        client.queue.append("<quit/>\n")
        app.until_heard(Quit())
    assert app.heard == [Quit()]


def test_a_slow_receiver_does_not_keep_the_runtime_from_closing(
        client: SimulatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmjob.grid.boinc.runtime.CLOSE_WAIT", 0.1)
    go = threading.Event()

    def hang(event: Event) -> None:
        go.wait(DEADLINE)

    with App(client, hang) as app:
        client.queue.append("<suspend/>\n")
        app.until_heard(Suspend())
        start = time.monotonic()
    assert time.monotonic() - start < DEADLINE / 2
    # Its thread may still take a message, so nobody else may have the slot.
    with pytest.raises(AssertionError):
        assert_free(client.slot)
    go.set()
    assert app.runtime._thread is not None
    app.runtime._thread.join(DEADLINE)
    assert not app.runtime._thread.is_alive()
    app.runtime._slot_lock.release()


def test_a_slow_disk_does_not_deafen_the_runtime(
        client: SimulatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    go, writing = threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        writing.set()
        go.wait(DEADLINE)

    monkeypatch.setattr(os, "fsync", slow)
    with App(client) as app:
        thread = threading.Thread(target=app.runtime.trickle_up, args=("a", "b"))
        thread.start()
        assert writing.wait(DEADLINE)
        client.queue.append("<suspend/>\n")
        app.runtime.report(Status(3.0))
        app.until_heard(Suspend())
        client.until(lambda: client.seen.current_cpu_time == 3.0, "the status is known")
        go.set()
        thread.join(DEADLINE)
        client.until(lambda: client.seen.trickles, "the trickle is taken")


def test_a_client_that_is_not_our_parent_is_gone_with_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with SimulatedClient(tmp_path, client_pid=process.pid) as client:
        with App(client) as app:
            app.until_heard(ClientGone())
            app.runtime.report(Status(1.0))
            app.runtime.checkpointed(1.0)
            # The channels may be another instance's by now.
            client.until(lambda: client.memory[HEARTBEAT * 1024], "a heartbeat is there")
            app.runtime.finish(0)
        assert client.memory[STATUS * 1024] == 0
        assert client.memory[HEARTBEAT * 1024] == 1
    assert app.heard == [ClientGone()]


# -- what is said ----------------------------------------------------------------------------------


def test_an_idle_job_still_makes_checkpoints(
        client: SimulatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "STATUS_PERIOD", 0.05)
    with App(client) as app:
        app.runtime.report(Status(7.5))
        for count in range(1, 5):
            app.runtime.checkpointed(7.5)
            client.until(lambda: len(client.seen.checkpoints) == count, "one more is seen")  # noqa: B023
    assert client.seen.current_cpu_time == pytest.approx(7.5, abs=0.01)


def test_two_checkpoints_in_one_status_are_one_and_not_none(client: SimulatedClient) -> None:
    with App(client) as app:
        app.runtime.checkpointed(7.5)
        client.until(lambda: client.seen.checkpoints == [7.5], "the first is seen")
        app.runtime.checkpointed(7.5)
        app.runtime.checkpointed(7.5)
        client.until(lambda: len(client.seen.checkpoints) == 2, "another one is seen")


def test_another_process_is_named_only_while_the_caller_says_so(
        client: SimulatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "STATUS_PERIOD", 0.05)
    monkeypatch.setattr("vmjob.grid.boinc.runtime.FINISH_WAIT", 0.2)
    with App(client) as app:
        app.runtime.report(Status(1.0, other_pid=4711))
        client.until(lambda: client.seen.other_pids, "it is named")
        app.runtime.report(Status(2.0))
        client.until(lambda: client.seen.current_cpu_time == 2.0, "the next status is known")
        app.runtime.finish(0)
    assert "other_pid" not in client.seen.statuses[-1]
    assert set(client.seen.other_pids) == {4711}


def test_a_client_that_never_looks_costs_a_bounded_time(client: SimulatedClient) -> None:
    client.listens = False
    with App(client) as app:
        app.runtime.report(Status(1.0))
        client.until(lambda: client.memory[STATUS * 1024], "a status waits")
        app.runtime.web_address("http://127.0.0.1:1/")
        app.runtime.web_address("http://127.0.0.1:2/")
        start = time.monotonic()
        app.runtime.finish(0)
        assert time.monotonic() - start < 3.0
    assert (client.slot / "boinc_finish_called").exists()


def test_the_last_word_on_leaving_is_the_newest(client: SimulatedClient) -> None:
    with App(client) as app:
        app.runtime.report(Status(1.0))
        client.until(lambda: client.seen.current_cpu_time == 1.0, "the first is seen")
        app.runtime.report(Status(2.0))
    client.until(lambda: client.seen.current_cpu_time == 2.0, "the last is seen")


def test_what_an_earlier_run_said_at_its_end_is_forgotten(client: SimulatedClient) -> None:
    for name in ("boinc_finish_called", "boinc_temporary_exit"):
        (client.slot / name).write_text("0\n")
    with App(client):
        assert client.verdict(0) == "restart"


def test_what_an_earlier_run_wanted_sent_is_sent(client: SimulatedClient) -> None:
    (client.slot / "trickle_up.xml").write_text("left")
    (client.slot / "boinc_ufr_out").touch()
    with App(client):
        client.until(lambda: client.seen.trickles == ["left"], "the trickle is taken")
        assert client.seen.uploads == ["out"]


def test_trickles_are_a_second_apart(client: SimulatedClient) -> None:
    with App(client) as app:
        start = time.monotonic()
        assert app.runtime.trickle_up("a", "1")
        client.until(lambda: app.runtime.trickle_up("a", "2"), "the next one is taken")
        assert time.monotonic() - start > 1.0
        client.until(lambda: len(client.seen.trickles) == 2, "the client has both")
    assert client.seen.trickles == ["<variety>a</variety>\n1", "<variety>a</variety>\n2"]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\0", "a\n", "x" * 300])
def test_an_upload_of_what_is_no_name_is_refused(client: SimulatedClient, name: str) -> None:
    before = sorted(os.listdir(client.slot))
    with App(client) as app, pytest.raises(ValueError):
        app.runtime.upload(name)
    assert sorted({*os.listdir(client.slot)} - {"boinc_lockfile"}) == before


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "reason", "verdict"), [
    (60.7, "busy", "postponed 60 'busy' notice=False"),
    (-5, "", "postponed 0 'no reason given' notice=False"),
    (1e9, "two\nlines\t\x1b[0m", "postponed 86400 'two lines [0m' notice=False"),
    (float("nan"), " ", "postponed 0 'no reason given' notice=False"),
    (float("inf"), "é" * 500, f"postponed 86400 '{'é' * 120}' notice=False"),
])
def test_a_temporary_exit_is_always_understood(
        client: SimulatedClient, seconds: float, reason: str, verdict: str) -> None:
    with App(client) as app:
        app.runtime.temporary_exit(seconds, reason)
    assert client.verdict(0) == verdict


def test_who_finds_the_slot_taken_postpones_no_job_that_ends(client: SimulatedClient) -> None:
    with App(client) as app:
        (client.slot / "boinc_temporary_exit").write_text("120\nanother instance\n\n")
        app.runtime.finish(0)
    assert client.verdict(0) == "finished"


def test_a_full_disk_does_not_undo_a_finished_job(
        client: SimulatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with App(client) as app:
        monkeypatch.setattr(os, "fsync", full)
        monkeypatch.setattr(os, "write", full)
        app.runtime.finish(0, "done")
        assert not list(client.slot.glob("part.*"))
    assert client.verdict(0) == "finished"


def test_who_cannot_say_that_the_job_is_finished_hears_of_it(client: SimulatedClient) -> None:
    with App(client) as app:
        (client.slot / "boinc_finish_called").mkdir()
        with pytest.raises(OSError, match="directory"):
            app.runtime.finish(0)


def test_what_is_said_after_the_end_is_not_heard_and_does_no_harm(client: SimulatedClient) -> None:
    with App(client) as app:
        pass
    app.runtime.report(Status(1.0))
    app.runtime.checkpointed(1.0)
    assert not app.runtime.trickle_up("a", "b")
    app.runtime.web_address("http://127.0.0.1/")
    app.runtime.finish(0)
    assert not client.memory[STATUS * 1024]


def test_closing_twice_and_listening_twice(client: SimulatedClient) -> None:
    with App(client) as app:
        with pytest.raises(RuntimeError):
            app.runtime.listen(print)
        app.runtime.close()
    app.runtime.close()


def test_a_runtime_may_be_closed_by_its_receiver(
        client: SimulatedClient, caplog: pytest.LogCaptureFixture) -> None:
    done: queue.Queue[bool] = queue.Queue()

    def leave(event: Event) -> None:
        app.runtime.close()
        done.put(True)

    app = App(client, leave)
    with app:
        client.queue.append("<quit/>\n")
        app.until_heard(Quit())
        assert done.get(timeout=DEADLINE)
        assert app.runtime._thread is not None
        app.runtime._thread.join(DEADLINE)
    assert not caplog.text


# -- the slot --------------------------------------------------------------------------------------


def test_without_a_client_all_succeeds_and_nothing_is_written(tmp_path: Path) -> None:
    with Runtime.open(tmp_path) as runtime:
        assert runtime.standalone
        assert runtime.init is None
        runtime.listen(print)
        runtime.report(Status(1.0, 0.5))
        runtime.checkpointed(1.0)
        assert runtime.trickle_up("a", "b")
        assert runtime.trickle_up("a", "b")
        runtime.upload("out")
        runtime.web_address("http://127.0.0.1/")
        runtime.remote_desktop("127.0.0.1:1")
        assert not list(tmp_path.iterdir())
        runtime.finish(3, "so far")
    assert (tmp_path / "boinc_finish_called").read_text() == "3\nso far\n\n"
    (tmp_path / "init_data.xml").write_text("<app_init_data><gpu_type>ATI</gpu_type>")
    with Runtime.open(tmp_path) as runtime:
        assert runtime.standalone
        assert runtime.init is not None


def test_shared_memory_of_the_old_kind_is_refused_with_its_cause(tmp_path: Path) -> None:
    with SimulatedClient(tmp_path, shm_key=16778408) as client, \
            pytest.raises(ChannelsUnusable, match="api_version"):
        Runtime.open(client.slot)


@pytest.mark.parametrize("what", ["missing", "short", "link", "pipe", "directory"])
def test_channels_that_are_not_the_clients_are_refused(client: SimulatedClient, what: str) -> None:
    path = client.slot / "boinc_mmap_file"
    path.rename(client.root / "away")
    if what == "short":
        path.write_bytes(bytes(8191))
    elif what == "link":
        path.symlink_to(client.root / "away")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    with pytest.raises(ChannelsUnusable, match="boinc_mmap_file"):
        Runtime.open(client.slot)
    assert_free(client.slot)


def test_a_slot_that_cannot_be_locked_is_refused_by_name(client: SimulatedClient) -> None:
    (client.slot / "boinc_lockfile").symlink_to("/etc/passwd")
    with pytest.raises(SlotUnusable, match="boinc_lockfile"):
        Runtime.open(client.slot)


def test_the_lock_is_waited_for_and_then_had(client: SimulatedClient) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER], cwd=client.slot, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SlotTaken):
            Runtime.open(client.slot, lock_wait=0.2)
        threading.Timer(0.3, holder.stdin.close).start()
        start = time.monotonic()
        with Runtime.open(client.slot, lock_wait=DEADLINE):
            assert time.monotonic() - start < DEADLINE / 2


def test_nobody_waits_for_a_slot_when_his_client_has_ended(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with SimulatedClient(tmp_path, client_pid=gone.pid) as client, \
            subprocess.Popen([sys.executable, "-c", HOLDER], cwd=client.slot, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        start = time.monotonic()
        with pytest.raises(SlotTaken):
            Runtime.open(client.slot, lock_wait=DEADLINE)
        assert time.monotonic() - start < DEADLINE / 2
        holder.communicate()
