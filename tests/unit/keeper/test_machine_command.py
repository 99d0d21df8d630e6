"""`vmjob machine` as a user types it, as far as no machine runs; `tests/vm` has the rest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from vmjob.cli.machine import machine
from vmjob.cli.main import cli, print_json, report
from vmjob.errors import GuestRefused
from vmjob.home import Home


def vmjob(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["machine", *arguments])


@pytest.mark.usefixtures("home")
def test_a_machine_is_made_listed_and_destroyed() -> None:
    assert vmjob("create", "lab", "--memory", "256").stdout == "lab\n"
    assert json.loads(vmjob("create", "auto", "--json").stdout)["name"] == "m1"
    listed = json.loads(vmjob("list", "--json").stdout)["machines"]
    assert [(each["name"], each["state"], each["memory_mb"]) for each in listed] == \
        [("lab", "created", 256), ("m1", "created", 512)]
    assert "lab" in vmjob("list").stdout
    assert vmjob("status", "lab").stdout.startswith("lab: created")
    assert vmjob("logs", "lab").stdout == ""
    assert vmjob("destroy", "lab").exit_code == 0
    assert vmjob("destroy", "m1").exit_code == 0
    assert "no machines" in vmjob("list").stdout


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("arguments", "code"), [
    (["status", "nobody"], "unknown-machine"), (["start", "nobody"], "unknown-machine"),
    (["exec", "nobody", "--", "true"], "unknown-machine"),
    (["destroy", "nobody"], "unknown-machine"), (["logs", "nobody"], "unknown-machine"),
    (["create", "a/b"], "usage"), (["stop", "a\x1b"], "usage"), (["create", "lab"], "wrong-state"),
    (["create", "new", "--memory", "1"], "usage"),
    (["create", "new", "--image", "nothing"], "image-missing"),
    (["exec", "lab"], "usage"), (["exec", "lab", "--", "true"], "wrong-state"),
    (["exec", "lab", "--env", "x", "--", "true"], "usage"),
    (["suspend", "lab"], "wrong-state"), (["resume", "lab"], "wrong-state"),
    (["restore", "lab"], "wrong-state"), (["stop", "lab", "--checkpoint"], "wrong-state"),
    (["console", "lab"], "wrong-state"), (["put", "lab", "/x"], "wrong-state"),
    (["get", "lab", "x", "a" * 300], "wrong-state")])
def test_what_cannot_be_done_has_a_code_and_an_advice(arguments: list[str], code: str) -> None:
    vmjob("create", "lab")
    # Options are read up to `--`.
    at = arguments.index("--") if "--" in arguments else len(arguments)
    done = vmjob(*arguments[:at], "--json", *arguments[at:])
    error = json.loads(done.stdout)["error"]
    assert (done.exit_code, error["code"]) == (125, code)
    assert error["advice"]
    plain = vmjob(*arguments)
    assert plain.exit_code == 125
    assert f"[{code}]" in plain.output


@pytest.mark.usefixtures("home")
def test_what_is_stopped_can_be_stopped() -> None:
    vmjob("create", "lab")
    assert vmjob("stop", "lab").exit_code == 0


def test_a_dry_run_of_clean_shows_what_clean_removes(home: Home) -> None:
    vmjob("create", "lab")
    (home.slots / "lab" / "machine").mkdir()
    for option, verb in (["--dry-run"], "would remove"), ([], "removed"):
        done = CliRunner().invoke(cli, ["clean", *option])
        assert done.stdout == f"{verb} {home.slots / 'lab' / 'machine'}\n"
    assert "Nothing" in CliRunner().invoke(cli, ["clean"]).stdout
    assert vmjob("status", "lab").exit_code == 0


def test_a_name_that_is_no_text_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine's files may have any."""
    print_json({"entries": [{"name": "\udcff"}]})
    assert json.loads(capsys.readouterr().out) == {"entries": [{"name": "\udcff"}]}


def test_an_error_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = GuestRefused("it said \x1b]52;c;eA==\x07", advice="First.\nThen.")
    error.context["console"] = "boot\x1b]0;owned\x07\n\tat\x9b2J"
    report(error.as_dict())
    said = capsys.readouterr().err
    assert not [c for c in said if not c.isprintable() and c not in "\n\t"]
    assert "First.\nThen.\n" in said
    assert "| boot\ufffd]0;owned\ufffd\n       | \tat" in said


def test_every_subcommand_is_one_of_the_documented_and_teaches() -> None:
    assert set(machine.commands) == {
        "create", "start", "suspend", "resume", "checkpoint", "restore", "stop", "destroy",
        "status", "list", "exec", "put", "get", "ls", "mkdir", "delete", "message", "console",
        "logs", "priority"}
    assert "vmjob machine exec lab" in vmjob("--help").stdout


def test_other_commands_do_not_pay_for_it() -> None:
    script = ("import sys; from vmjob.cli.main import cli\n"
              "try: cli(['run', '--help'])\nexcept SystemExit: pass\n"
              "assert not [m for m in sys.modules if m.startswith('vmjob.keeper')]")
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=30)
