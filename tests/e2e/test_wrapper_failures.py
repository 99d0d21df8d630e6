"""Jobs that fail, must not run here, or do not want to end: what the project and the volunteer see.

All run side by side on one client, whose owner has a policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.conftest import eventually
from tests.e2e.project import DEADLINE, Project
from vmjob.home import Home
from vmjob.image.store import Image
from vmjob.project.devserver import Result
from vmjob.wrapper.policy import FILE

pytestmark = [pytest.mark.e2e, pytest.mark.vm, pytest.mark.timeout(900)]

MIB = 1 << 20
#: What the client sends of stderr.txt, bytes.
SENT = 63 << 10
#: Of ``lib/error_numbers.h`` and ``lib/common_defs.h``.
DISK_LIMIT, CHILD_FAILED = 196, 195
COMPUTE_ERROR, ABORTED = 3, 6

SCRIPT = 'run = "sh script"\ninputs = ["script"]\noutputs = ["out"]\n'
#: A program of VMwrapper's, and a daemon that no polite signal ends.
XML = """\
<job_desc>
    <task>
        <virtualmachine>V</virtualmachine>
        <application>script</application>
        <copy_app_to_VM>1</copy_app_to_VM>
        <copy_file_from_VM>out</copy_file_from_VM>
    </task>
</job_desc>
"""
DAEMON = """\
inputs = ["script"]
outputs = ["out"]
[[task]]
daemon = true
run = ["sh", "-c", "trap '' HUP INT TERM; while :; do sleep 1; done"]
[[task]]
run = "sh script"
"""
POLICY = "memory_mb = 600\nnetwork = false\n"
#: What the owner is told to write where a job needs emulation.
CONSENT = 'accelerators = ["kvm", "tcg"]'

#: Says much more than anybody wants to read, and fails.
FLOODING = r"""
seq 1 400000
seq 1 300000 >&2
echo 'the reason is the last line' >&2
exit 7
"""
#: Leaves behind what ignores all polite signals, in sessions of its own, and goes on writing.
LINGERING = r"""
echo done > out
for n in 1 2 3 4; do
  setsid sh -c "trap '' HUP INT QUIT TERM PIPE; while :; do echo flood; done" &
  setsid sh -c "trap '' HUP INT QUIT TERM; while :; do sleep 1000; done" > /dev/null 2>&1 &
done
"""
FLOOD_FOR_EVER = r"""
echo done > out
( trap '' HUP INT QUIT TERM; while :; do sleep 1000; done ) > /dev/null 2>&1 &
timeout -s KILL 8 yes 'a line of a flood that has no end'
exit 0
"""
#: More on its disk than 80 % of what it may have.
WRITING = r"""
head -c 60000000 /dev/urandom > data; sync
sleep 15
echo done > out
"""


#: The jobs that the policy is in the way of.
FORBIDDEN = {"big", "online", "slow"}


@dataclass
class Run:
    """The project, and its jobs: word -> result's name."""

    project: Project
    names: dict[str, str] = field(default_factory=dict)

    def result(self, word: str) -> Result:
        return self.project.result(self.names[word])


def queue(run: Run) -> None:
    add, names = run.project.add, run.names
    names["seven"] = add("script", {"script": FLOODING}, ["out"])
    names["forgotten"] = add("script", {"script": "exit 0\n"}, ["out"])
    names["forgotten in XML"] = add("xml", {"script": "#!/bin/sh\nexit 0\n"}, ["out"])
    names["unknown"] = add("script", {"script": "echo done > out\n"}, ["out", "extra"])
    names["large"] = add("script", {"script": "sleep 1000\n", "bulk": b"." * (30 * MIB)}, ["out"],
                         copy_inputs=["bulk"], disk_bound=20e6)
    names["writing"] = add("script", {"script": WRITING}, ["out"], disk_bound=70e6)
    names["lingering"] = add("script", {"script": LINGERING}, ["out"])
    names["flood"] = add("script", {"script": FLOOD_FOR_EVER}, ["out"])
    names["daemon"] = add("daemon", {"script": "echo done > out\n"}, ["out"])
    names["slow"] = add("script", {"script": "echo done > out\n"}, ["out"], consent=False)
    names["big"] = add("big", {"script": "echo done > out\n"}, ["out"])
    names["online"] = add("online", {"script": "echo done > out\n"}, ["out"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, app_image: Image,
        shared_home: Home) -> Iterator[Run]:
    project = Project(tmp_path_factory.mktemp("failures"), app_image, shared_home, cpus=12)
    run = Run(project)
    project.app("script", SCRIPT, inputs=["script"])
    project.app("xml", XML, job_name="job.xml", inputs=["script"])
    project.app("daemon", DAEMON, inputs=["script"])
    project.app("big", f"memory_mb = 1024\n{SCRIPT}", inputs=["script"])
    project.app("online", f'network = "nat"\n{SCRIPT}', inputs=["script"])
    queue(run)
    (project.client.folder / FILE).write_text(POLICY)
    with project:
        yield run


@pytest.fixture
def project(run: Run) -> Project:
    """For what is shown when a test fails."""
    return run.project


def cause(result: Result) -> str:
    """The first line of what the project's server gets to read."""
    return result.stderr_out.partition("\n")[0]


@pytest.mark.parametrize(("word", "reason"), [
    ("big", "the job needs 1024 MiB of memory; at most 600 are allowed"),
    ("online", "the job needs the network, which is not allowed"),
    ("slow", "hardware virtualization does not work here")])
def test_what_the_owner_does_not_allow_is_postponed_and_he_is_told_why(
        run: Run, project: Project, word: str, reason: str) -> None:
    name = run.names[word]
    said = f"Task {name} postponed for 120 seconds: {reason}"
    assert eventually(lambda: any(said in each.text for each in project.client.messages()), 200)
    message = next(each for each in project.client.messages() if said in each.text)
    assert message.priority == "user notification"
    assert FILE in message.text  # and what to do about it
    assert (CONSENT in message.text) == (word == "slow")
    assert any(said in each for each in project.client.notices())
    task = project.client.task(name)
    assert task is not None
    assert task.active == ""
    assert name not in project.server.results
    stderr = (project.slot_of(name) / "stderr.txt").read_text()
    assert stderr.startswith(f"POSTPONED for 120 s: {reason}")


def test_the_jobs_exit_code_is_reported_and_the_cause_comes_first(run: Run) -> None:
    result = run.result("seven")
    assert (result.exit_status, result.state) == (7, COMPUTE_ERROR)
    assert "process exited with code 7" in result.message
    assert cause(result) == "FAILED: the job ended with exit code 7"
    assert len(result.stderr_out.encode()) <= SENT
    assert "the reason is the last line" in result.stderr_out
    assert "stderr (1988923 bytes in all)" in result.stderr_out
    assert "stdout (2688895 bytes in all)" in result.stderr_out
    assert "\n400000\n" in result.stderr_out
    assert "\n1\n" not in result.stderr_out


@pytest.mark.parametrize("word", ["forgotten", "forgotten in XML"])
def test_a_declared_output_that_is_missing_is_the_cause_of_the_failure(run: Run,
                                                                       word: str) -> None:
    result = run.result(word)
    assert (result.exit_status, result.state) == (CHILD_FAILED, COMPUTE_ERROR)
    assert "'out'" in cause(result)
    assert cause(result).startswith("FAILED: ")
    assert result.outputs == {}


def test_an_output_that_only_the_project_knows_of_is_named_when_it_is_missing(run: Run) -> None:
    result = run.result("unknown")
    assert (result.exit_status, result.state) == (0, COMPUTE_ERROR)  # the job itself succeeded
    assert "-161" in result.message  # ERR_NOT_FOUND
    assert "the job made no 'extra'" in result.stderr_out


def test_a_job_that_takes_too_much_disk_is_ended_by_the_client(run: Run) -> None:
    result = run.result("large")
    assert result.exit_status == DISK_LIMIT
    assert result.state in {COMPUTE_ERROR, ABORTED}  # by what the client saw first: the end, or us


def test_the_disk_limit_is_in_the_log_before_it_is_reached(run: Run) -> None:
    result = run.result("writing")
    assert "the client ends it at 66" in result.stderr_out  # MiB; 70e6 bytes


@pytest.mark.parametrize("word", ["lingering", "flood", "daemon"])
def test_what_a_job_leaves_running_in_its_machine_ends_with_it(run: Run, project: Project,
                                                               word: str) -> None:
    result = run.result(word)
    assert result.succeeded, (result.message, result.stderr_out[:2000])
    assert result.outputs["out"].read_text() == "done\n"
    assert len(result.stderr_out.encode()) <= SENT
    assert result.elapsed < DEADLINE


def test_what_the_owner_has_come_to_allow_runs(run: Run, project: Project) -> None:
    for word in run.names.keys() - FORBIDDEN:
        run.result(word)  # the client is about to end, and those shall be through
    (project.client.folder / FILE).write_text(f"{CONSENT}\n")
    project.client.restart()  # or it would take two minutes until they are tried again
    for word in FORBIDDEN:
        result = run.result(word)
        assert result.succeeded, (result.message, result.stderr_out[:2000])
        assert result.outputs["out"].read_text() == "done\n"
        assert "start 2" in result.stderr_out


def test_nothing_remains_of_all_these_jobs(run: Run, project: Project) -> None:
    for word in run.names:
        run.result(word)
    slots = project.client.folder / "slots"
    assert eventually(lambda: not any(path.is_file() for path in slots.rglob("*")), 30), \
        sorted(slots.rglob("*"))
    project.client.close()
    assert project.client.leftovers == []
    assert project.left() == []
