"""The real BOINC client computes for the development server: all in one run of it, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import TOKEN, eventually
from vmjob.project import signing
from vmjob.project.devclient import DevClient
from vmjob.project.devserver import DevServer, Result
from vmjob.project.trial import compute
from vmjob.project.version import Source, build

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PLATFORM = "x86_64-pc-linux-gnu"
#: Seconds that one client may take for everything; it takes 45.
DEADLINE = 150.0

#: A program as the client starts it; the first argument says what it does. It talks to the client
#: by bytes in the file of eight channels of 1024: 0 brings orders, 6 and 7 tell of trickles.
PROGRAM = r"""#!/bin/sh
link() { sed -n 's/.*<soft_link>\(.*\)<.soft_link>.*/\1/p' "$1"; }
ended() {  # whether the client wants us to; what it says is taken, or it could say no more
  [ "$(head -c 1 boinc_mmap_file | tr '\001' x | tr -d '\000')" ] || return 1
  order=$(head -c 1024 boinc_mmap_file | tr -d '\000')
  printf '\000' | dd of=boinc_mmap_file bs=1 conv=notrunc 2>/dev/null
  case $order in *"<abort/>"*|*"<quit/>"*) return 0 ;; esac
  return 1
}
pause() { ended && exit 1; sleep 0.2; }
say() {  # CHANNEL TEXT: the text first, the flag last
  printf '%s\000' "$2" | dd of=boinc_mmap_file bs=1 seek=$(($1 * 1024 + 1)) conv=notrunc 2>/dev/null
  printf '\001' | dd of=boinc_mmap_file bs=1 seek=$(($1 * 1024)) conv=notrunc 2>/dev/null
}
echo "doing $1 with [$2]" >&2
case $1 in
  copy) cat "$(link in)" "$(link data/file)" > "$(link out)" ;;
  exit) exit $2 ;;
  wait) while :; do pause; done ;;
  talk)
    printf '<variety>greeting</variety>\nhello\n' > trickle_up.xml
    say 6 '<have_new_trickle_up/>'
    until ls trickle_down_* > /dev/null 2>&1; do pause; done
    cat trickle_down_* > "$(link out)" ;;
  orphan) setsid sleep 300 > /dev/null 2>&1 & echo started > "$(link out)" ;;
esac
echo 0 > boinc_finish_called
"""

#: What the client asks of who brings his own app.
APP_INFO = f"""<app_info>
<app>
<name>own</name>
</app>
<file_info>
<name>main</name>
<executable/>
</file_info>
<file_info>
<name>own_data</name>
</file_info>
<app_version>
<app_name>own</app_name>
<version_num>42</version_num>
<platform>{PLATFORM}</platform>
<api_version>7.5.0</api_version>
<file_ref>
<file_name>main</file_name>
<main_program/>
</file_ref>
<file_ref>
<file_name>own_data</file_name>
<open_name>data/file</open_name>
</file_ref>
</app_version>
</app_info>
"""


@dataclass
class Run:
    """What is being computed: job's word -> result's name."""

    server: DevServer
    client: DevClient
    names: dict[str, str]
    root: Path

    def result(self, word: str) -> Result:
        name = self.names[word]
        return compute(self.server, self.client, [name], DEADLINE)[name]


def app(root: Path, name: str = "lab", key: signing.PrivateKey | None = None) -> Path:
    made = build(root / "apps", [
        Source("", f"{name}_main", ".sh", content=PROGRAM.encode(), main_program=True),
        Source("data/file", f"{name}_data", content=b"of the app\n")],
        app=name, version="1.00", platform=PLATFORM, plan_class="vmjob", key=key)
    assert made.directory is not None
    return made.directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("e2e")
    (root / "in").write_bytes(b"of the workunit\n" * 1000)  # enough for an upload in two steps
    app(root)
    return root


@pytest.fixture(scope="module")
def trial(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command that a scientist types, running meanwhile."""
    directory = next((root / "apps" / "lab" / "1.00").iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "vmjob", "project", "serve-dev", str(directory), "--with-client",
         "--input", f"in={root / 'in'}", "--output", "out", "--command-line", "copy 'x y'",
         "--jobs", "2", "--root", str(root / "trial"), "--deadline", str(DEADLINE)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def anonymous(root: Path) -> Iterator[Run]:
    """A client of another project that brought its app itself."""
    with DevServer(root / "other server") as server:
        name = server.add_job(app="own", inputs={"in": root / "in"}, outputs=["out"],
                              command_line="copy own")
        client = DevClient(root / "other client", url=server.url,
                           authenticator=server.authenticator,
                           environment={"VMJOB_TEST_TOKEN": TOKEN})
        client.project_directory.mkdir(parents=True)
        (client.project_directory / "main").write_text(PROGRAM)
        (client.project_directory / "main").chmod(0o755)  # what is not fetched, nobody makes so
        (client.project_directory / "own_data").write_text("own\n")
        (client.project_directory / "app_info.xml").write_text(APP_INFO)
        with client:
            yield Run(server, client, {"copy": name}, root)


@pytest.fixture(scope="module")
def run(root: Path, trial: subprocess.Popen[bytes], anonymous: Run) -> Iterator[Run]:
    with DevServer(root / "server", next_rpc_delay=5) as server:
        server.add_version(next((root / "apps" / "lab" / "1.00").iterdir()))
        server.add_version(app(root, "forged", signing.generate()), signatures="serve")
        names = {word: server.add_job(app="lab", inputs={"in": root / "in"}, outputs=outputs,
                                      command_line=line)
                 for word, line, outputs in (
                     ("copy", "copy 'two words'", ["out"]), ("exit", "exit 7", []),
                     ("abort", "wait", []), ("volunteer", "wait", []), ("talk", "talk", ["out"]),
                     ("orphan", "orphan", ["out"]))}
        names["forged"] = server.add_job(app="forged", command_line="exit 0")
        client = DevClient(root / "client", url=server.url, authenticator=server.authenticator,
                           cpus=8, environment={"VMJOB_TEST_TOKEN": TOKEN})
        with client:
            yield Run(server, client, names, root)


def test_a_job_runs_and_its_outputs_come_back(run: Run) -> None:
    result = run.result("copy")
    assert result.succeeded
    assert result.outputs["out"].read_bytes() == (run.root / "in").read_bytes() + b"of the app\n"
    assert result.stderr_out == "doing copy with [two words]"
    assert (result.version_num, result.plan_class) == (100, "vmjob")


def test_an_exit_code_is_reported_as_it_is(run: Run) -> None:
    result = run.result("exit")
    assert (result.exit_status, result.state, result.succeeded) == (7, 3, False)
    assert "code 7" in result.message
    assert "doing exit" in result.stderr_out


def test_a_program_with_another_signature_is_not_run(run: Run) -> None:
    result = run.result("forged")
    assert not result.succeeded
    assert result.stderr_out == ""
    # ERR_RSA_FAILED of lib/error_numbers.h, and what it is part of.
    assert "-120" in result.message
    assert "signature" in run.client.log


@pytest.fixture(scope="module")
def stirred(run: Run) -> Run:
    """All that needs a request of the client, on its way at once."""
    talking, ending = run.names["talk"], run.names["abort"]
    volunteered = run.names["volunteer"]
    run.server.wait_event("trickle", DEADLINE, result=talking)
    for name in (ending, volunteered):
        run.client.wait_task(name, lambda task: task.active == "EXECUTING", DEADLINE)
    run.server.send_trickle_down(talking, "<answer>42</answer>")
    run.server.abort(ending)
    run.server.message("the lab is moving", "notice")
    run.client.update()
    run.client.suspend(volunteered)
    run.client.wait_task(volunteered, lambda task: task.active == "SUSPENDED", 20)
    run.client.resume(volunteered)
    run.client.wait_task(volunteered, lambda task: task.active == "EXECUTING", 20)
    run.client.abort(volunteered)
    return run


def test_messages_go_between_a_running_job_and_the_project(stirred: Run) -> None:
    assert [(each.variety, each.text) for each in stirred.server.trickles] == [
        ("greeting", "hello")]
    assert "<answer>42</answer>" in stirred.result("talk").outputs["out"].read_text()


def test_the_project_ends_a_job(stirred: Run) -> None:
    result = stirred.result("abort")
    assert (result.exit_status, result.state) == (202, 6)  # EXIT_ABORTED_BY_PROJECT


def test_the_volunteer_suspends_resumes_and_ends_a_job(stirred: Run) -> None:
    result = stirred.result("volunteer")
    assert (result.exit_status, result.state) == (203, 6)  # EXIT_ABORTED_VIA_GUI
    assert result.elapsed > 1


def test_a_message_of_the_project_is_a_notice(stirred: Run) -> None:
    # Nothing announces it; the client writes its log when the reply has come.
    assert eventually(lambda: any("the lab is moving" in each.text
                                  and each.priority == "user notification"
                                  for each in stirred.client.messages()), 30)
    assert any("the lab is moving" in each for each in stirred.client.notices())


def test_a_client_with_its_own_app_gets_jobs_without_app_versions(anonymous: Run) -> None:
    result = anonymous.result("copy")
    assert (result.succeeded, result.version_num) == (True, 42), result
    assert result.stderr_out == "doing copy with [own]"
    assert {each.facts["name"] for each in anonymous.server.events if each.kind == "download"} == {
        f"{anonymous.names['copy'].removesuffix('_0')}_in"}


def test_the_client_is_an_ordinary_program_on_loopback(run: Run) -> None:
    assert run.client.pid is not None
    process = psutil.Process(run.client.pid)
    listening = [each.laddr.ip for each in process.net_connections()
                 if each.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}
    assert set(process.environ()) <= {"PATH", "HOME", "USER", "LC_ALL", "VMJOB_TEST_TOKEN"}
    assert Path(process.environ()["HOME"]) == run.client.folder


def test_preferences_and_modes_reach_the_client(run: Run) -> None:
    def said(text: str) -> bool:
        return any(text in each.text for each in run.client.messages())

    run.client.set_preferences(max_ncpus_pct=50)
    assert eventually(lambda: said("max CPUs used: 4"), 20)
    run.client.set_network_mode("never", 60)
    assert eventually(lambda: said("Suspending network activity - user request"), 20)
    run.client.set_run_mode("never", 60)
    assert eventually(lambda: said("Suspending computation - user request"), 20)
    run.client.set_network_mode("always")
    run.client.set_run_mode("always")


def test_one_command_tries_an_app_version(trial: subprocess.Popen[bytes], root: Path) -> None:
    out, err = trial.communicate(timeout=DEADLINE)
    assert trial.returncode == 0, err.decode()
    said = out.decode()
    assert said.count("succeeded, exit status 0") == 2
    assert "| doing copy with [x y]" in said
    outputs = sorted((root / "trial" / "upload").iterdir())
    assert [each.read_bytes() for each in outputs] == [
        (root / "in").read_bytes() + b"of the app\n"] * 2
    assert all(str(each) in said for each in outputs)
    assert "EXECUTING" in err.decode()


def test_a_client_that_was_killed_is_started_again_in_its_folder(run: Run) -> None:
    run.result("orphan")
    run.client.kill()
    assert run.client.pid is None
    assert run.client.exit_status == -9
    run.client.restart()
    assert run.client.pid is not None
    assert any(each.project == "vmjob development" for each in run.client.messages())


def test_what_a_task_left_behind_is_found_and_ended(run: Run) -> None:
    run.result("orphan")
    run.client.close(grace=0.1)
    assert [each.command for each in run.client.leftovers] == ["sleep 300"]
    assert not any(psutil.pid_exists(each.pid) for each in run.client.leftovers)


def test_a_failed_trial_says_so_by_its_exit_code(root: Path, tmp_path: Path) -> None:
    """Not by a job, for that takes half a minute more: by a deadline that nothing can meet."""
    directory = next((root / "apps" / "lab" / "1.00").iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "vmjob", "project", "serve-dev", str(directory), "--with-client",
         "--root", str(tmp_path), "--deadline", "1", "--json"], capture_output=True, timeout=60,
        env={**os.environ}, check=False)
    assert done.returncode == 125
    assert json.loads(done.stdout)["error"]["code"] == "result-overdue"


def test_when_the_command_is_killed_no_client_remains(root: Path, tmp_path: Path) -> None:
    directory = next((root / "apps" / "lab" / "1.00").iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "vmjob", "project", "serve-dev", str(directory), "--with-client",
         "--root", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "client" / "client.log"
    assert eventually(lambda: log.exists() and "Starting BOINC client" in log.read_text(), 30)
    below = psutil.Process(process.pid).children(recursive=True)
    assert "boinc" in {each.name() for each in below}
    process.kill()
    process.wait(10)
    assert psutil.wait_procs(below, timeout=20)[1] == []
