"""Folders in step, with the real agent as a process of this computer."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any

import pytest

import vmjob
from tests.unit.engine.both_sides import Both, both, rest, session, text, tree, until
from vmjob.engine.folders import Mirror
from vmjob.errors import HostError
from vmjob.guest.folders import News
from vmjob.home import Home
from vmjob.job.files import Folder
from vmjob.machine.fake import SimulatedDriver, SimulatedMachine

__all__ = ["both", "session"]
pytestmark = pytest.mark.anyio


async def test_what_the_host_has_is_there_before_the_first_task(both: Both) -> None:
    (both.host / "a").write_text("a")
    (both.host / "tool").write_text("#!/bin/sh\n")
    (both.host / "tool").chmod(0o755)
    (both.host / "deep" / "er").mkdir(parents=True)
    (both.host / "deep" / "er" / "b").write_text("b")
    os.utime(both.host / "a", ns=(1_000_000_001, 1_000_000_001))
    await both.mirror().fill()
    assert tree(both.guest) == tree(both.host)


async def test_changes_appear_on_the_other_side(both: Both) -> None:
    (both.host / "a").write_text("a")
    mirror = both.mirror()
    await mirror.fill()
    (both.guest / "new").write_text("from the guest")
    await until(mirror, lambda: text(both.host / "new") == "from the guest")
    (both.host / "newer").write_text("from the host")
    await until(mirror, lambda: text(both.guest / "newer") == "from the host")
    (both.guest / "a").write_text("changed there")
    await until(mirror, lambda: text(both.host / "a") == "changed there")
    (both.host / "a").write_text("changed here")
    await until(mirror, lambda: text(both.guest / "a") == "changed here")
    (both.guest / "new").unlink()
    await until(mirror, lambda: not (both.host / "new").exists())
    (both.host / "a").unlink()
    await until(mirror, lambda: not (both.guest / "a").exists())
    (both.guest / "d").mkdir()
    (both.guest / "d" / "x").write_text("x")
    await until(mirror, lambda: text(both.host / "d" / "x") == "x")
    await rest(mirror)
    assert tree(both.guest) == tree(both.host)
    assert not both.warnings


async def test_what_is_not_live_comes_back_after_the_last_task(both: Both) -> None:
    (both.host / "same").write_text("same")
    (both.host / "old").write_text("old")
    (both.host / "gone").write_text("gone")
    mirror = both.mirror(live=False)
    await mirror.fill()
    (both.guest / "old").write_text("new")
    (both.guest / "made").write_text("made")
    (both.guest / "gone").unlink()
    assert await mirror.step() is False
    assert text(both.host / "old") == "old"
    await mirror.collect()
    assert {path.name: path.read_text() for path in both.host.iterdir()} == {
        "same": "same", "old": "new", "made": "made"}


async def test_a_change_appears_within_a_second(both: Both) -> None:
    for number in range(300):
        (both.host / f"file-{number}").write_text("x")
    mirror = both.mirror()
    await mirror.fill()
    await rest(mirror)
    took = []
    for number in range(3):
        (both.guest / f"file-{number}").write_text("changed")
        took.append(await until(mirror, lambda: text(both.host / f"file-{number}") == "changed"))  # noqa: B023
        (both.host / f"file-{number}").write_text("again")
        took.append(await until(mirror, lambda: text(both.guest / f"file-{number}") == "again"))  # noqa: B023
    assert sorted(took)[3] < 5, took  # a busy computer; 0.5 on one that is not


async def test_a_file_that_is_touched_is_a_change(both: Both) -> None:
    both.guest.mkdir()
    (both.guest / "heartbeat").write_text("")
    mirror = both.mirror()
    await mirror.fill()
    os.utime(both.guest / "heartbeat", ns=(5, 5))
    await until(mirror, lambda: (both.host / "heartbeat").exists()
                and (both.host / "heartbeat").stat().st_mtime_ns == 5)


async def test_what_was_in_the_guest_before_is_no_change(both: Both) -> None:
    both.guest.mkdir()
    (both.guest / "of the image").write_text("x")
    mirror = both.mirror()
    await mirror.fill()
    await rest(mirror)
    await mirror.collect()
    assert tree(both.host) == {}


async def test_a_file_that_is_open_for_writing_does_not_come(both: Both) -> None:
    mirror = both.mirror()
    await mirror.fill()
    with (both.guest / "result").open("w") as file:
        file.write("half")
        file.flush()
        (both.guest / "other").write_text("x")
        await until(mirror, lambda: text(both.host / "other") == "x")
        await rest(mirror)
        assert text(both.host / "result") is None
        file.write(" and whole")
    await until(mirror, lambda: text(both.host / "result") is not None)
    assert text(both.host / "result") == "half and whole"


async def test_a_file_that_is_mapped_for_writing_does_not_come(both: Both) -> None:
    mirror = both.mirror()
    await mirror.fill()
    path = both.guest / "mapped"
    path.write_bytes(b"half")
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4)
    await rest(mirror)
    assert text(both.host / "mapped") is None
    mapped.close()
    await until(mirror, lambda: text(both.host / "mapped") == "half")


async def test_a_file_written_piece_by_piece_comes_whole(both: Both) -> None:
    """It is closed between the pieces, as ``echo >> file`` does."""
    mirror = both.mirror()
    await mirror.fill()
    seen: set[str | None] = set()
    task = await both.session.client.start([
        "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10; do echo $i >> shared/log; sleep 0.05; done"])
    whole = "".join(f"{number}\n" for number in range(1, 11))

    def came() -> bool:
        seen.add(text(both.host / "log"))
        return whole in seen

    await until(mirror, came)
    assert seen == {None, whole}
    both.session.client.forget(task)


async def test_the_guest_wins_where_both_changed(both: Both) -> None:
    (both.host / "a").write_text("a")
    mirror = both.mirror()
    await mirror.fill()
    (both.guest / "a").write_text("the guest's")
    (both.host / "a").write_text("the host's own")
    await rest(mirror)
    assert text(both.guest / "a") == text(both.host / "a") == "the guest's"


async def test_a_file_beats_its_absence(both: Both) -> None:
    for name in ("a", "b"):
        (both.host / name).write_text("old")
    mirror = both.mirror()
    await mirror.fill()
    (both.guest / "a").unlink()
    (both.host / "a").write_text("new")
    (both.guest / "b").write_text("new")
    (both.host / "b").unlink()
    await rest(mirror)
    for root in (both.host, both.guest):
        assert {path.name: path.read_text() for path in root.iterdir()} == {"a": "new", "b": "new"}


# -- what a folder is to be ------------------------------------------------------------------


async def test_the_directory_is_made_for_its_owner_alone(both: Both, tmp_path: Path) -> None:
    mirror = both.mirror(source=tmp_path / "new" / "folder")
    await mirror.fill()
    assert stat.S_IMODE((tmp_path / "new" / "folder").stat().st_mode) == 0o700


async def test_texts_and_copies_are_there_first(both: Both, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("copied")
    (tmp_path / "in").chmod(0o755)
    (tmp_path / "there").write_text("not copied")
    (both.host / "there").write_text("was there")
    mirror = both.mirror(texts={"settings": "said"},
                         copies=(tmp_path / "in", tmp_path / "there"))
    await mirror.fill()
    for root in (both.host, both.guest):
        assert {path.name: path.read_text() for path in root.iterdir()} == {
            "settings": "said", "in": "copied", "there": "was there"}
        assert (root / "in").stat().st_mode & 0o777 == 0o755


async def test_names_that_are_not_the_jobs_business_stay_on_their_side(both: Both) -> None:
    for root in (both.host, both.guest):
        root.mkdir(exist_ok=True)
        (root / "lock").write_text(f"of {root.name}")
        (root / "d").mkdir()
    mirror = both.mirror(without=("lock", "machine"))
    await mirror.fill()
    (both.host / "machine").mkdir()
    (both.host / "machine" / "disk").write_text("x")
    (both.guest / "lock").write_text("changed there")
    (both.guest / "d" / "lock").write_text("deep down it is any name")
    await until(mirror, lambda: (both.host / "d" / "lock").exists())
    await rest(mirror)
    await mirror.collect()
    assert text(both.host / "lock") == "of host"
    assert text(both.guest / "lock") == "changed there"
    assert not (both.guest / "machine").exists()


async def test_a_star_in_such_a_name_stands_for_any_characters(both: Both) -> None:
    """The volunteer's disk images stay out of a shared slot, whatever their numbers are."""
    both.guest.mkdir(exist_ok=True)
    for name in ("vm_image.vdi", "vm_image_2.vdi", "vm_image.vdi.txt", "boinc_ufs_out",
                 "boinc_app"):
        (both.host / name).write_text("of host")
    mirror = both.mirror(without=("vm_image*.vdi", "boinc_ufs_*", "*a*b*"))
    await mirror.fill()
    assert sorted(path.name for path in both.guest.iterdir()) == ["boinc_app", "vm_image.vdi.txt"]
    (both.guest / "boinc_ufs_out").write_text("of guest")
    await rest(mirror)
    await mirror.collect()
    assert text(both.host / "boinc_ufs_out") == "of host"


async def test_an_agent_that_tells_of_such_a_name_all_the_same_gets_nothing_written(
        both: Both) -> None:
    """Who is root in the machine can be its agent, and would rewrite its own job file."""
    (both.host / "vbox_job.xml").write_text("of host")
    mirror = both.mirror(without=("vbox_job.xml", "vmjob"))
    asked = mirror._client.folder

    async def lie(path: str, seen: int, *, without: object = (), most: int = 10_000,
                  begin: bool = False) -> News:
        return await asked(path, seen, without=(), most=most, begin=begin)

    mirror._client.folder = lie  # type: ignore[method-assign]
    await mirror.fill()
    (both.guest / "vbox_job.xml").write_text("of guest")
    (both.guest / "vmjob").mkdir()
    (both.guest / "vmjob" / "job.json").write_text("of guest")
    (both.guest / "honest").write_text("of guest")
    await until(mirror, lambda: (both.host / "honest").exists())
    await rest(mirror)
    await mirror.collect()
    assert text(both.host / "vbox_job.xml") == "of host"
    assert not (both.host / "vmjob").exists()


async def test_what_had_no_place_is_tried_once_more_at_the_end(both: Both) -> None:
    """The wait for that may be longer than what is left of the job."""
    mirror = both.mirror()
    await mirror.fill()
    os.mkfifo(both.host / "out")
    (both.guest / "out").write_text("result")
    await until(mirror, lambda: bool(both.warnings))
    (both.host / "out").unlink()
    await mirror.collect()
    assert text(both.host / "out") == "result"


@pytest.mark.parametrize(("number", "lost"), [(errno.EROFS, True), (errno.EIO, True),
                                              (errno.EISDIR, False)])
async def test_a_result_that_this_computer_does_not_take_is_no_success(
        both: Both, monkeypatch: pytest.MonkeyPatch, number: int, lost: bool) -> None:
    """A directory of that name is the job's own doing, and a warning; a broken disk is not."""
    mirror = both.mirror()
    await mirror.fill()
    (both.guest / "result").write_text("42")

    def refused(*args: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr("vmjob.engine.folders.place", refused)
        with pytest.raises(HostError, match="result") if lost else contextlib.nullcontext():
            await mirror.collect()
    await mirror.collect()
    assert (both.host / "result").read_text() == "42"


async def test_secrets_never_reach_the_guest(both: Both, tmp_path: Path) -> None:
    """``init_data.xml`` is redacted wherever it comes from, and never comes back."""
    (tmp_path / "init_data.xml").write_text("secret")
    (both.host / "deep").mkdir()
    (both.host / "deep" / "init_data.xml").write_text("secret, too")
    (both.host / "linked").write_text(f"<soft_link>{tmp_path / 'init_data.xml'}</soft_link>\n")
    mirror = both.mirror(copies=(tmp_path / "init_data.xml",), links=True)
    await mirror.fill()
    found = {str(path.relative_to(both.guest)): path.read_text()
             for path in both.guest.rglob("*") if path.is_file()}
    assert found == dict.fromkeys(["init_data.xml", "deep/init_data.xml", "linked"], "redacted")
    (both.guest / "deep" / "init_data.xml").write_text("forged")
    (both.host / "late").mkdir()
    (both.host / "late" / "init_data.xml").write_text("secret still")
    await until(mirror, lambda: (both.guest / "late" / "init_data.xml").exists())
    await rest(mirror)
    await mirror.collect()
    assert text(both.guest / "late" / "init_data.xml") == "redacted"
    assert text(both.host / "deep" / "init_data.xml") == "secret, too"
    assert text(both.host / "late" / "init_data.xml") == "secret still"


async def test_a_folder_that_is_not_writable_is_the_hosts_alone(both: Both) -> None:
    (both.host / "a").write_text("a")
    mirror = both.mirror(writable=False)
    await mirror.fill()
    (both.guest / "a").write_text("changed there")
    (both.guest / "new").write_text("new")
    await rest(mirror)
    (both.host / "a").write_text("the host's")
    await until(mirror, lambda: text(both.guest / "a") == "the host's")
    await mirror.collect()
    assert {path.name: path.read_text() for path in both.host.iterdir()} == {"a": "the host's"}


async def test_links_of_boinc_stand_for_what_they_name(both: Both, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "in_1").write_text("input")
    (both.host / "in").write_text("<soft_link>../project/in_1</soft_link>\n")
    (both.host / "out").write_text("<soft_link>../project/out_1</soft_link>\n")
    (both.host / "by_symlink").symlink_to(project / "in_1")
    mirror = both.mirror(links=True)
    await mirror.fill()
    assert {path.name: path.read_text() for path in both.guest.iterdir()} == {
        "in": "input", "by_symlink": "input"}
    (both.guest / "out").write_text("output")
    await until(mirror, lambda: text(project / "out_1") == "output")
    (both.guest / "out").write_text("more output")
    await until(mirror, lambda: text(project / "out_1") == "more output")
    assert text(both.host / "out") == "<soft_link>../project/out_1</soft_link>\n"
    (both.guest / "out").unlink()
    await rest(mirror)
    assert (both.host / "out").exists()
    assert text(project / "out_1") == "more output"
    assert {path.name for path in project.iterdir()} == {"in_1", "out_1"}


async def test_a_guest_changes_no_linked_file_of_others(both: Both, tmp_path: Path) -> None:
    (tmp_path / "shared_by_jobs").write_text("everybody's")
    (both.host / "in").write_text("<soft_link>../shared_by_jobs</soft_link>")
    mirror = both.mirror(links=True)
    await mirror.fill()
    (both.guest / "in").chmod(0o755)
    await rest(mirror)
    assert both.warnings == []  # it wrote nothing
    (both.guest / "in").write_text("forged")
    await rest(mirror)
    (both.guest / "in").unlink()
    await mirror.collect()
    assert text(tmp_path / "shared_by_jobs") == "everybody's"
    assert "is left as it is" in both.warnings[0]


async def test_an_output_of_an_earlier_run_may_be_written_again(both: Both,
                                                                tmp_path: Path) -> None:
    (both.host / "out").write_text("<soft_link>../out_1</soft_link>")
    mirror = both.mirror(links=True, journal=tmp_path / "journal")
    await mirror.fill()
    (both.guest / "out").write_text("first run")
    await mirror.collect()
    (both.guest / "out").unlink()
    again = both.mirror(links=True, journal=tmp_path / "journal")
    await again.fill()
    (both.guest / "out").write_text("second run")
    await again.collect()
    assert text(tmp_path / "out_1") == "second run"


async def test_a_trigger_is_removed_on_both_sides_and_stays_away(both: Both) -> None:
    mirror = both.mirror()
    await mirror.fill()
    (both.guest / "trigger").write_text("now")
    await until(mirror, lambda: mirror.version("trigger") is not None)
    version = mirror.version("trigger")
    assert version
    assert text(both.host / "trigger") == "now"
    assert await mirror.remove("trigger", version)
    assert not (both.host / "trigger").exists()
    assert not (both.guest / "trigger").exists()
    await rest(mirror)
    assert mirror.version("trigger") is None
    assert not (both.host / "trigger").exists()
    assert await mirror.remove("trigger", version) is False


async def test_a_newer_trigger_of_that_name_is_not_lost(both: Both) -> None:
    mirror = both.mirror()
    await mirror.fill()
    (both.guest / "trigger").write_text("one")
    await until(mirror, lambda: mirror.version("trigger") is not None)
    version = mirror.version("trigger")
    assert version
    (both.guest / "trigger").write_text("another")
    assert await mirror.remove("trigger", version)
    assert text(both.guest / "trigger") == "another"
    await until(mirror, lambda: text(both.host / "trigger") == "another")


async def test_the_jobs_own_directory_can_be_a_folder(both: Both) -> None:
    (both.host / "in").write_text("in")
    mirror = both.mirror(destination="")
    await mirror.fill()
    assert text(both.guest.parent / "in") == "in"
    (both.guest.parent / "out").write_text("out")
    await until(mirror, lambda: text(both.host / "out") == "out")


async def test_what_came_after_a_checkpoint_is_not_the_hosts_doing(both: Both,
                                                                   tmp_path: Path) -> None:
    """The guest goes back: it gets no file of its own future, but all that the host did."""
    mirror = both.mirror(journal=tmp_path / "journal")
    await mirror.fill()
    known = json.loads(json.dumps(mirror.known()))
    (both.guest / "future").write_text("x")
    (both.guest / "changed here").write_text("x")
    await until(mirror, lambda: (both.host / "future").exists()
                and (both.host / "changed here").exists())
    for path in both.guest.iterdir():
        path.unlink()
    await mirror._hear_all()  # so that the agent knows of nothing else, as if it had gone back
    (both.host / "changed here").write_text("the host's")
    again = both.mirror(journal=tmp_path / "journal", known=known)
    await rest(again)
    assert not (both.guest / "future").exists()
    assert again.version("future") is None
    assert text(both.host / "future") == "x"
    assert text(both.guest / "changed here") == "the host's"
    (both.guest / "future").write_text("anew")
    await until(again, lambda: text(both.host / "future") == "anew")


async def test_an_agent_that_remembers_nothing_is_asked_for_everything(home: Home,
                                                                       tmp_path: Path) -> None:
    """As that of a simulated machine, which continues with its files alone."""
    folder = Folder("shared", tmp_path / "host", "shared")
    driver = SimulatedDriver()

    def mirror(machine: vmjob.AsyncMachine, known: dict[str, Any] | None = None) -> Mirror:
        assert machine._session is not None
        return Mirror(folder, machine._session.client, redact=bytes, warn=lambda text: None,
                      known=known, journal=tmp_path / "journal")

    def workdir(machine: vmjob.AsyncMachine) -> Path:
        assert machine._session is not None
        assert isinstance(machine._session.machine, SimulatedMachine)
        return machine._session.machine.workdir / "shared"

    async with vmjob.AsyncMachine.create(driver=driver, slot=tmp_path / "slot") as machine:
        stepped = mirror(machine)
        await stepped.fill()
        (workdir(machine) / "a").write_text("a")
        (workdir(machine) / "b").write_text("b")
        await until(stepped, lambda: len(list(folder.source.iterdir())) == 2)
        await machine.checkpoint()
        known = stepped.known()
        (workdir(machine) / "a").unlink()
        await until(stepped, lambda: not (folder.source / "a").exists())
    (folder.source / "c").write_text("c")
    async with vmjob.AsyncMachine.restore(tmp_path / "slot", driver=driver) as machine:
        stepped = mirror(machine, known)
        await until(stepped, lambda: (workdir(machine) / "c").exists())
        await rest(stepped)
        assert sorted(path.name for path in workdir(machine).iterdir()) == ["a", "b", "c"]
