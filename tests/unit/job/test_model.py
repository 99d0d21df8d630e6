"""What a user writes with --in and --out, and which jobs can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.errors import BadPath, InputMissing, InputUnreadable, UsageError, VmjobError
from vmjob.job.files import (
    Folder,
    Input,
    Output,
    check_guest_path,
    check_input,
    is_directory,
    parse_input,
    parse_output,
)
from vmjob.job.model import Job, Task, Triggers

GOOD = Job(tasks=(Task(("true",)),))


@given(st.text())
def test_any_text_is_a_safe_path_or_a_usage_error(text: str) -> None:
    try:
        path = check_guest_path(text)
    except UsageError:
        return
    assert path == text
    assert ".." not in PurePosixPath(path).parts
    assert path.isprintable() or not any(ord(c) < 32 for c in path)
    path.encode("utf-8")


@given(st.text(st.characters(blacklist_characters="\0")))
def test_any_text_after_out_is_an_output_or_a_usage_error(text: str) -> None:
    try:
        output = parse_output(text)
    except UsageError:
        return
    assert output.source
    assert output.destination.is_absolute()


def test_a_source_with_a_colon_in_its_name_is_that_file_when_it_exists(tmp_path: Path) -> None:
    odd = tmp_path / "a:b"
    odd.touch()
    assert parse_input(str(odd)) == Input(odd, "a:b")
    assert parse_input(f"{odd}:c") == Input(odd, "c")


def test_a_name_that_no_file_can_have_is_that_of_a_missing_file() -> None:
    long = "a" * 300
    assert parse_input(f"{long}:b") == Input(Path(long), "b")
    with pytest.raises(InputMissing):
        check_input(parse_input(f"{long}:b"))
    assert not is_directory(Path(long))


@pytest.mark.parametrize("text", [".", "./", "sub/.."])
def test_the_current_directory_has_the_name_it_has(text: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    if text == "sub/..":
        with pytest.raises(BadPath):
            parse_input(text)
    else:
        assert parse_input(text).destination == "here"


@pytest.mark.parametrize(("destination", "error"), [
    ("../up", BadPath), ("", BadPath), ("/", BadPath), ("new\nline", BadPath), ("ok", None)])
def test_an_input_goes_to_a_path_of_the_machine_only(tmp_path: Path, destination: str,
                                                     error: type[VmjobError] | None) -> None:
    (tmp_path / "file").touch()
    given = Input(tmp_path / "file", destination)
    if error is None:
        check_input(given)
        return
    with pytest.raises(error):
        check_input(given)


def test_an_input_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="nothing"):
        check_input(Input(tmp_path / "nothing", "x"))
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(InputMissing):
        check_input(Input(tmp_path / "dangling", "x"))
    (tmp_path / "file").touch()
    with pytest.raises(InputMissing):
        check_input(Input(tmp_path / "file" / "below", "x"))


def test_an_input_that_may_not_be_read_is_unreadable(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").touch()

    def refuse(*args: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root, who runs some of these tests, may read all
    with pytest.raises(InputUnreadable, match="secret"):
        check_input(Input(tmp_path / "secret", "x"))


def test_two_outputs_cannot_go_to_one_place(tmp_path: Path) -> None:
    outputs = (Output("a", tmp_path / "x"), Output("b", tmp_path / "x"))
    with pytest.raises(BadPath, match="two outputs"):
        replace(GOOD, outputs=outputs).check()
    replace(GOOD, outputs=outputs[:1]).check()


@pytest.mark.parametrize("change", [
    {"memory_mb": 127}, {"memory_mb": -1}, {"cpus": 256}, {"disk_gb": 1025}, {"time_limit": -1.0},
    {"tasks": (Task(("true",)), Task(("",)))}, {"tasks": (Task(("true",)), Task(()))}])
def test_a_job_that_cannot_be_says_what_is_wrong(change: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        replace(GOOD, **change).check()  # type: ignore[arg-type]
    assert caught.value.message
    assert caught.value.advice


@pytest.mark.parametrize("change", [
    {"memory_mb": 128}, {"cpus": 255}, {"disk_gb": 1}, {"disk_gb": 1024}, {"time_limit": 0.001}])
def test_the_limits_themselves_are_allowed(change: dict[str, object]) -> None:
    replace(GOOD, **change).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", ".hidden", "", "a\nb", "n" * 65, "é"])
def test_a_folders_name_leads_nowhere(name: str, tmp_path: Path) -> None:
    """Files of the slot and of the machine are called after it."""
    folder = Folder(name, tmp_path, "there")
    with pytest.raises(UsageError, match="no name of a folder"):
        replace(GOOD, folders=(folder,)).check()
    replace(GOOD, folders=(replace(folder, name="a-name.1"),)).check()


@pytest.mark.parametrize("more", [{"live": False}, {"writable": False}, {"name": "other"}])
def test_trigger_files_that_nobody_would_see_are_refused(
        more: dict[str, Any], tmp_path: Path) -> None:
    folder = Folder("shared", tmp_path, "shared")
    job = replace(GOOD, folders=(folder,), triggers=Triggers(completion="done"))
    job.check()
    with pytest.raises(UsageError, match="live and writable"):
        replace(job, folders=(replace(folder, **more),)).check()
