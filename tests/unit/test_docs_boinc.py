"""The pages about BOINC say what the code says."""

from __future__ import annotations

import asyncio
import re
import tomllib
from pathlib import Path

import click
import pytest

from vmjob import errors
from vmjob.cli.project import project
from vmjob.cli.wrapper import IGNORED, PASSTHROUGH, wrapper
from vmjob.engine.record import Record
from vmjob.errors import VmjobError, all_errors
from vmjob.grid.boinc import exitcodes
from vmjob.home import Home
from vmjob.job.model import Job, Network
from vmjob.machine.contract import BootParts
from vmjob.machine.qemu import accelerators, programs
from vmjob.machine.qemu.accelerators import Proof
from vmjob.wrapper import contents, outcome, places, policy, totals
from vmjob.wrapper.ground import check_room
from vmjob.wrapper.outcome import Again, Finish, Postpone
from vmjob.wrapper.policy import Policy

ROOT = Path(__file__).parents[2]
WRAPPER = (ROOT / "docs/reference/wrapper.md").read_text()
VOLUNTEER = (ROOT / "docs/how-to/boinc-volunteer.md").read_text()
ADMIN = (ROOT / "docs/how-to/boinc-admin.md").read_text()
PROJECT = (ROOT / "docs/reference/project.md").read_text()
BY_CODE = {each.code: each for each in all_errors()}
#: Errors that nothing in the wrapper's reach raises, and the root of all.
NOT_MET = {"vmjob-error", "unknown-machine", "package-invalid", "key-file-invalid",
           "signature-invalid", "client-failed", "keeper-lost", "machine-kept", "result-overdue"}
BOOT = BootParts("digest", Path("kernel"), Path("initrd"), Path("root"), Path("scratch"))


def section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables in a text, heads too."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")]
            for line in text.splitlines() if line.startswith("| ")]


# -- the wrapper -----------------------------------------------------------------------------------


def test_every_option_of_the_wrapper_is_in_the_reference() -> None:
    table = section(WRAPPER, "Options")
    for parameter in wrapper.params:
        if isinstance(parameter, click.Option):
            assert f"`{parameter.opts[0]}" in table, parameter.name
    for each in (*IGNORED, PASSTHROUGH):
        assert f"`{each}" in table


def test_every_name_that_the_wrapper_looks_for_or_writes_is_in_the_reference() -> None:
    looked = section(WRAPPER, "What it looks for in the slot")
    for each in (*contents.JOB_FILES, f"{contents.IMAGE}/manifest.json", contents.QEMU):
        assert f"`{each}`" in looked
    written = section(WRAPPER, "What it writes")
    assert f"`{totals.FILE}`" in written
    for field in totals.Totals.__struct_fields__:
        assert f"`{field}`" in written, field


@pytest.mark.parametrize("row", rows(section(WRAPPER, "Outcome"))[2:], ids=lambda row: row[0][:40])
def test_the_outcome_table_is_what_happens(row: list[str]) -> None:
    for code in re.findall(r"`([a-z-]+)`", row[1]):
        if code == VmjobError.code:
            continue
        kind = BY_CODE[code]
        record = Record(exit_code=kind.exit_code, error=kind("x").as_dict())
        first, second, sixth = (outcome.of_record(record, before) for before in (0, 1, 5))
        if number := re.match(r"exit code (\d+)", row[2]):
            assert first == sixth == Finish(int(number[1])), code
        elif row[2].startswith("again"):
            assert isinstance(first, Again)
            assert isinstance(second, Postpone)
            assert isinstance(sixth, Finish)
            assert f"exit code {sixth.code}" in row[2]
        else:
            assert row[2].startswith("postponed")
            assert isinstance(first, Postpone)
            assert isinstance(sixth, Postpone)
            assert first.notice == ("with a notice" in row[2])


def test_every_error_is_in_the_outcome_table_once() -> None:
    found = re.findall(r"`([a-z-]+)`", "".join(
        row[1] for row in rows(section(WRAPPER, "Outcome"))[2:]))
    assert sorted(found) == sorted((BY_CODE.keys() - NOT_MET) | {"vmjob-error"})


def test_the_back_off_is_what_the_page_says() -> None:
    assert "2 minutes, then 4, 8 and so on to 4 hours" in WRAPPER
    assert [outcome.delay(number) // 60 for number in (0, 1, 2, 50)] == [2, 4, 8, 240]


# -- the volunteer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", VOLUNTEER, re.DOTALL))
def test_an_example_of_a_policy_is_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / policy.FILE
    path.write_text(text)
    found = policy.read([path])
    for key, value in tomllib.loads(text).items():
        said = getattr(found, key)
        assert (sorted(said) if isinstance(said, frozenset) else said) == value


def test_every_key_of_a_policy_is_explained_and_shown() -> None:
    explained = {row[0] for row in rows(section(VOLUNTEER, "The policy file"))[2:]}
    keys = set(Policy.__struct_fields__) - {"path"}
    assert explained == {f"`{each}`" for each in keys}
    shown = "".join(re.findall(r"```toml\n(.*?)```", VOLUNTEER, re.DOTALL))
    for each in keys:
        assert f"{each} = " in shown
    assert policy.FILE in VOLUNTEER
    assert str(policy.SYSTEM) in VOLUNTEER


def reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[VmjobError]:
    """What the code raises where the page says what it means."""
    found: list[VmjobError] = []

    def heard(action: object) -> None:
        with pytest.raises(VmjobError) as raised:
            action()  # type: ignore[operator]
        found.append(raised.value)

    job = Job((), memory_mb=8192, network=Network.NAT)
    heard(lambda: Policy(allow=False, path="p").check(job))
    heard(lambda: Policy(network=False, path="p").check(job))
    heard(lambda: Policy(memory_mb=4096, path="p").check(job))
    bad = tmp_path / policy.FILE
    bad.write_text("allow = 7\n")
    heard(lambda: policy.read([bad]))
    with places.taken(tmp_path / "places", 1):
        heard(lambda: places.taken(tmp_path / "places", 1).__enter__())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(programs.VARIABLE, raising=False)
    for each in (programs.system_binary(), "qemu-img", "setpriv"):
        heard(lambda each=each: programs.find(each))

    home, hardware = Home(tmp_path / "home"), frozenset({"kvm"})
    for why in ("this user may not open /dev/kvm", "there is no /dev/kvm",
                "a Linux kernel did not boot within 10 s"):
        async def prove(*_: object, why: str = why, **__: object) -> Proof:
            return Proof("kvm", False, why)

        monkeypatch.setattr(accelerators, "prove", prove)
        heard(lambda: asyncio.run(accelerators.choose(home, "auto", BOOT, hardware)))
        unusable = found.pop()
        assert isinstance(unusable, errors.AcceleratorUnusable)
        found.append(Policy().asking_for_emulation(unusable, hardware))
        found.append(Policy(accelerators=hardware).asking_for_emulation(unusable, hardware))
    heard(lambda: asyncio.run(accelerators.choose(home, "kvm", BOOT, hardware)))
    heard(lambda: asyncio.run(accelerators.choose(home, "tcg", BOOT, hardware)))
    memory = type("M", (), {"available": 4096 << 20})
    monkeypatch.setattr("vmjob.wrapper.ground.memory", lambda: memory)
    heard(lambda: check_room(job, tmp_path))
    memory.available = 1 << 40  # type: ignore[attr-defined]
    monkeypatch.setattr("vmjob.wrapper.ground.disk_free", lambda _: 100 << 20)
    heard(lambda: check_room(job, tmp_path))
    return found


def test_every_reason_is_explained_and_what_to_do_is_shown_whole(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explained = [row[0].split("`")[1].strip() for row in rows(section(VOLUNTEER, "Messages"))[2:]]
    used = set()
    for error in reasons(tmp_path, monkeypatch):
        told = outcome.of_error(error.as_dict(), 0)
        assert isinstance(told, Postpone)
        assert len(told.reason.encode()) <= 240
        matching = [each for each in explained if each in told.reason]
        assert len(matching) == 1, told.reason
        used.update(matching)
    # The rest is raised in the midst of machines: at least, its words are in the code.
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for each in set(explained) - used:
        piece = re.split(r"\d[\d.]*", each)[0].strip()
        assert piece in source, each


# -- the project -----------------------------------------------------------------------------------


def test_the_codes_to_triage_by_have_boincs_names() -> None:
    for row in rows(section(ADMIN, "Read a failed result"))[2:]:
        numbers = [int(each) for each in re.findall(r"\d+", row[0])]
        names = re.findall(r"`(EXIT_\w+)`", row[1])
        assert [exitcodes.NAMES[each] for each in numbers if each in exitcodes.NAMES] == names
    codes = {done.code for kind in all_errors()
             if isinstance(done := outcome.of_error(kind("x").as_dict(), 9), Finish)}
    assert all(f"\n| {code} |" in ADMIN for code in codes)


@pytest.mark.parametrize("name", ["package", "serve-dev"])
def test_every_option_of_the_projects_side_is_in_the_reference(name: str) -> None:
    text = section(PROJECT, f"`{name}`")
    for parameter in project.commands[name].params:
        if isinstance(parameter, click.Option) and parameter.name != "as_json":
            assert f"`{parameter.opts[0]}" in text, parameter.name


def test_the_commands_of_the_first_page_are_those_that_a_test_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    tutorial = (ROOT / "docs/tutorial/boinc-app.md").read_text()
    shown = [text for text in re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
             if "vmjob project" in text]
    run = "".join(re.findall(r"```sh\n(.*?)```", tutorial, re.DOTALL))
    assert len(shown) == 1
    for command in re.split(r"(?<!\\)\n", shown[0]):
        assert command in run
