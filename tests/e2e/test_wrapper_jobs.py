"""Jobs in virtual machines, from the project's server through the real client and back.

All run side by side on one client; the tests read what the client showed meanwhile, and what it
reported.
"""

from __future__ import annotations

import re
import socketserver
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.conftest import eventually
from tests.e2e.project import DEADLINE, Project
from tests.unit.job.test_vmwrapper import EXAMPLE
from vmjob.home import Home
from vmjob.image.store import Image
from vmjob.project.devserver import Result

pytestmark = [pytest.mark.e2e, pytest.mark.vm, pytest.mark.timeout(900)]

WORKER = Path(__file__).parents[2] / "examples" / "worker" / "worker.py"
TARS = ("cctools-2_5_2-i686-linux-2.6.tar", "apache-activemq-5.2.0.tar", "boincvm.tar")
#: Jobs that are there at once, besides those that are there for something else.
TEN = 10
#: Of ``lib/error_numbers.h`` and ``lib/common_defs.h``. What the client has ended is a compute
#: error, or aborted where that was reported before the client had seen the process end.
TIME_LIMIT, ENDED = 197, {3, 6}

VBOX = """\
<vbox_job>
    <os_name>Linux26_64</os_name>
    <memory_size_mb>512</memory_size_mb>
    <enable_shared_directory/>
    <completion_trigger_file>completed</completion_trigger_file>
    <fraction_done_filename>fraction</fraction_done_filename>
    <trickle_trigger_file>word</trickle_trigger_file>
    <intermediate_upload_file>early</intermediate_upload_file>
    <temporary_exit_trigger_file>later</temporary_exit_trigger_file>
</vbox_job>
"""
#: Copies, tells how far it is, and says by a file that it is over.
COPYING = r"""#!/bin/sh
cat in > out
echo "networks: $(ls /sys/class/net | tr '\n' ' ')" >> out
for i in 1 2 3 4 5 6; do echo "0.${i}5" > fraction.new; mv fraction.new fraction; sleep 1; done
printf '0\n0\nall is copied\n' > completed.new
mv completed.new completed
sleep 1000
"""
#: Talks with the project, and gives it one output before the end.
TALKING = r"""#!/bin/sh
echo 'early words' > early.new; mv early.new early
printf '<greeting>hello</greeting>' > word.new; mv word.new word
until ls trickle_down_* > /dev/null 2>&1; do sleep 0.2; done
cat trickle_down_* > out
"""
#: Wants to be continued later; what it knows then is in its memory only.
WAITING = r"""#!/bin/sh
token=$(head -c 8 /dev/urandom | od -An -tx1 | tr -d ' \n')
echo "begun $token" >> out
printf '10\n1\nthe licence server is busy' > later.new; mv later.new later
for i in 1 2 3 4 5 6 7 8; do sleep 1; done
echo "ended $token" >> out
"""
SCRIPT = 'run = "sh script"\ninputs = ["script"]\noutputs = ["out"]\n'
#: The answer depends on the job's number; long enough for all to be there at once.
SUMMING = r"""
python3 -c 'print(sum(i * i for i in range({number} * 10000)))' > out
sleep 20
"""
#: Some work now and then, and a word on how far it is.
STEADY = r"""
for i in $(seq 11 40); do
  n=0; while [ $n -lt 3000 ]; do n=$((n + 1)); done
  echo "fraction_done 0.$i" > "$VMJOB_TO_HOST"
  sleep 0.8
done
echo done > out
"""
#: Asks a server of this computer, again and again, until that says that it is enough.
ASKING = r"""
import socket, time
failed = answered = 0
while True:
    try:
        with socket.create_connection(("10.0.2.2", {port}), timeout=2) as server:
            server.sendall(b"may I end?\n")
            said = server.makefile("rb").readline()
    except OSError:
        failed += 1
    else:
        answered += 1
        if said == b"yes\n":
            break
    time.sleep(0.3)
open("out", "w").write(f"{{answered}} answered, {{failed}} failed\n")
"""


class Listener(socketserver.ThreadingTCPServer):
    """A server on loopback that counts who asks."""

    daemon_threads = True
    asked = 0
    enough = False


class Answer(socketserver.StreamRequestHandler):
    server: Listener

    def handle(self) -> None:
        if self.rfile.readline():
            self.server.asked += 1
            self.wfile.write(b"yes\n" if self.server.enough else b"no\n")


@dataclass
class Run:
    """The project, its jobs (word -> result's name), and the server that one of them asks."""

    project: Project
    listener: Listener
    names: dict[str, str] = field(default_factory=dict)
    ten: list[str] = field(default_factory=list)
    endless: str = ""
    #: Of that one, while it ran: its end is not in a test's hands.
    processes: list[psutil.Process] = field(default_factory=list)

    def result(self, word: str) -> Result:
        found = self.project.result(self.names[word])
        assert found.succeeded, (found.message, found.stderr_out[:2000])
        return found

    def output(self, word: str, name: str = "out") -> str:
        return self.result(word).outputs[name].read_text()


def offer(project: Project) -> None:
    """The apps: one for each kind of job file, one with a network."""
    for name in TARS:
        with tarfile.open(project.root / name, "w") as tar:
            tar.add(WORKER, name.removesuffix(".tar"))
    project.app("worker", EXAMPLE, job_name="job.xml", copied=[], inputs=["in", "stdin"],
                files={"worker.py": WORKER, **{name: project.root / name for name in TARS}})
    project.app("copied", VBOX, job_name="vbox_job.xml", file_prefix="shared")
    project.app("linked", VBOX, job_name="vbox_job.xml")
    project.app("script", SCRIPT, inputs=["script"])
    # The client lets a task stand that needs the network when there is none; one that merely uses
    # it runs on.
    project.app("online", SCRIPT.replace("sh", "python3", 1) + 'network = "nat"\n',
                inputs=["script"], needs_network=False)


def queue(run: Run) -> None:
    add, port = run.project.add, run.listener.server_address[1]
    # The server promises 1e9 operations a second; a limit below 120 s would become 12 hours.
    run.endless = add("script", {"script": "sleep 100000\n"}, ["out"], fpops_bound=121e9)
    run.names["waiting"] = add("linked", {"shared/boinc_app": WAITING}, ["shared/out"])
    run.names["online"] = add("online", {"script": ASKING.format(port=port)}, ["out"])
    run.names["worker"] = add("worker", {"in": "of the file\n", "stdin": "of the input\n"},
                              ["out", "stdout", "stderr"], copy_inputs=["in"],
                              copy_outputs=["out"])
    run.names["steady"] = add("script", {"script": STEADY}, ["out"])
    run.names["talking"] = add("linked", {"shared/boinc_app": TALKING}, ["shared/out", "early"],
                               arguments="--trickle 2")
    run.names["linked"] = add("linked", {"shared/boinc_app": COPYING, "shared/in": "by a link\n"},
                              ["shared/out"])
    run.names["copied"] = add("copied", {"boinc_app": COPYING, "in": "by a copy\n"}, ["out"],
                              copy_inputs=["boinc_app", "in"], copy_outputs=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, app_image: Image,
        shared_home: Home) -> Iterator[Run]:
    root = tmp_path_factory.mktemp("jobs")
    with Listener(("127.0.0.1", 0), Answer) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        project = Project(root, app_image, shared_home, cpus=TEN + 9, checkpoint_period=3)
        run = Run(project, listener)
        offer(project)
        queue(run)
        with project:
            log = project.slot_of(run.endless) / "stderr.txt"
            assert eventually(lambda: log.exists() and "the job runs" in log.read_text(), DEADLINE)
            run.processes = [psutil.Process(pid) for pid in project.pids(run.endless)]
            yield run
        listener.shutdown()
        thread.join()


@pytest.fixture
def project(run: Run) -> Project:
    """For what is shown when a test fails."""
    return run.project


def test_an_image_of_the_app_is_linked_and_not_copied(run: Run, project: Project) -> None:
    name = run.names["online"]
    project.until(name, lambda task: task.active == "EXECUTING" and task.cpu_time > 1)
    slot = project.slot_of(name)
    links = {path.name: path.read_text() for path in (slot / "vmjob_image").iterdir()}
    assert links.keys() == {"kernel", "initrd", "root.squashfs", "scratch.qcow2", "loader.zip",
                            "manifest.json"}
    assert all("<soft_link>../../projects/" in text for text in links.values())
    adopted = [path for path in (project.client.project_directory / "vmjob" / "images").rglob("*")
               if path.is_file() and path.name != "manifest.json"]
    assert adopted
    assert all(path.is_symlink() for path in adopted)


def test_without_the_network_a_guest_is_cut_off_and_with_it_connected(
        run: Run, project: Project) -> None:
    name, listener = run.names["online"], run.listener

    def is_quiet() -> bool:
        asked = listener.asked
        time.sleep(3)
        return listener.asked == asked

    assert eventually(lambda: listener.asked >= 3, DEADLINE)
    stderr = project.slot_of(name) / "stderr.txt"
    project.client.set_network_mode("never")
    try:
        assert eventually(lambda: "the network is off" in stderr.read_text(), 60)
        assert eventually(is_quiet, 60)  # what was under way has arrived
        asked = listener.asked
        time.sleep(5)
        assert listener.asked == asked
        task = project.client.task(name)
        assert task is not None
        assert task.active == "EXECUTING"
    finally:
        project.client.set_network_mode("always")
    try:
        assert eventually(lambda: listener.asked > asked + 1, 60)
        assert "the network is on" in stderr.read_text()
    finally:
        listener.enough = True
    answered, _, failed, _ = run.output("online").split()
    assert int(answered) >= 4
    assert int(failed) >= 1


def test_a_running_job_talks_with_the_project(run: Run, project: Project) -> None:
    name, server = run.names["talking"], project.server
    server.wait_event("trickle", DEADLINE, result=name, variety="word")
    server.wait_event("trickle", DEADLINE, result=name, variety="cpu_time")
    # And gives it an output that it has finished, before its own end.
    server.wait_event("upload", DEADLINE, name=f"{name}_1")
    task = project.client.task(name)
    assert task is not None
    assert task.active == "EXECUTING"
    server.send_trickle_down(name, "<answer>42</answer>")
    assert "<answer>42</answer>" in run.output("talking", "shared/out")
    assert run.output("talking", "early") == "early words\n"
    texts = [each.text for each in server.trickles if each.result == name]
    assert texts.count("<greeting>hello</greeting>") == 1
    assert any("<cpu_time>" in each for each in texts)


def test_the_worker_of_vmwrapper_gives_its_three_outputs(run: Run, project: Project) -> None:
    result = run.result("worker")
    assert result.outputs["out"].read_text() == "OF THE FILE\nOF THE INPUT\n"
    assert result.outputs["stdout"].read_text() == (
        "worker: 13 bytes on stdin, 12 bytes in the file\nworker: used 5 CPU seconds\n")
    assert result.outputs["stderr"].read_text() == ""
    # That is what its machine believes; what it got of a busy computer may be less.
    assert re.search(r"^processor: .* (5\.\d|[6-9]\.\d|\d\d\.\d) s in the machine$",
                     result.stderr_out, re.MULTILINE)
    assert result.cpu_time > 1
    assert any(0 < task.fraction_done < 1 for task in project.seen[run.names["worker"]])
    assert result.stderr_out.startswith("SUCCEEDED\n")


def test_the_client_shows_how_far_a_job_is_and_what_it_has_used(
        run: Run, project: Project) -> None:
    run.result("steady")
    seen = [task for task in project.seen[run.names["steady"]] if task.active == "EXECUTING"]
    for found in ([task.fraction_done for task in seen], [task.cpu_time for task in seen]):
        assert found == sorted(found)
        assert len(set(found) - {0.0}) >= 4
    said = {n / 100 for n in range(11, 41)}
    assert {task.fraction_done for task in seen} <= {0.0, 1.0, *said}  # 1: it has ended
    kept = [task for task in seen if task.checkpoint_cpu_time > 0]
    assert kept
    assert all(task.checkpoint_cpu_time <= task.cpu_time + 0.01 for task in kept)


@pytest.mark.parametrize(("word", "name", "given"), [
    ("linked", "shared/out", "by a link\n"), ("copied", "out", "by a copy\n")])
def test_a_vbox_job_reads_and_writes_its_shared_folder(run: Run, project: Project, word: str,
                                                       name: str, given: str) -> None:
    assert run.output(word, name) == f"{given}networks: lo \n"
    seen = {task.fraction_done for task in project.seen[run.names[word]]}
    assert len(seen & {0.15, 0.25, 0.35, 0.45, 0.55, 0.65}) >= 2


def test_ten_jobs_run_at_once_and_each_has_its_own_answer(run: Run, project: Project) -> None:
    run.ten = [project.add("script", {"script": SUMMING.format(number=number)}, ["out"])
               for number in range(1, TEN + 1)]
    results = [project.result(name) for name in run.ten]
    assert [each.outputs["out"].read_text() for each in results if each.succeeded] == [
        f"{sum(i * i for i in range(number * 10000))}\n" for number in range(1, TEN + 1)]
    assert project.most_at_once >= TEN


def test_a_job_that_asks_for_it_is_continued_later(run: Run, project: Project) -> None:
    begun, ended = run.output("waiting", "shared/out").splitlines()
    assert begun.split()[0] == "begun"
    assert ended == begun.replace("begun", "ended")  # its memory is what it was
    why = "the job is to be continued after 10 seconds: the licence server is busy"
    said = f"Task {run.names['waiting']} postponed for 10 seconds: {why}"
    assert any(said in each.text and each.priority == "user notification"
               for each in project.client.messages())
    assert any(said in each for each in project.client.notices())
    assert run.result("waiting").stderr_out.count("start 2") == 1


def test_a_job_that_takes_too_long_is_ended_by_the_client(run: Run, project: Project) -> None:
    assert len(run.processes) >= 2  # the wrapper and the machine
    result = project.result(run.endless)
    assert result.exit_status == TIME_LIMIT
    assert result.state in ENDED
    assert "exceeded elapsed time limit 121" in result.message
    # The client may report a task that it has told to end before that has ended: without times.
    assert result.elapsed == 0 or 120 < result.elapsed < 240
    assert eventually(lambda: not any(each.is_running() for each in run.processes), 60)


def test_nothing_remains_of_all_these_jobs(run: Run, project: Project) -> None:
    for name in (*run.names.values(), *run.ten, run.endless):
        project.result(name)
    slots = project.client.folder / "slots"
    assert eventually(lambda: not any(path.is_file() for path in slots.rglob("*")), 30), \
        sorted(slots.rglob("*"))
    assert not list((project.client.project_directory / "vmjob" / "machines").glob("*"))
    project.client.close()
    assert project.client.leftovers == []
    assert project.left() == []
