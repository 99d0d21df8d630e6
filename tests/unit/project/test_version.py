"""App versions: what is written is what BOINC's tools read, and a name never gets two contents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmjob.errors import InputMissing, PackageInvalid, UsageError, VmjobError
from vmjob.project import names, signing, version
from vmjob.project.version import Source, build, read

MAIN = Source("", "w_1.00_main", ".sh", content=b"#!/bin/sh\n", main_program=True)


def built(root: Path, *sources: Source, key: signing.PrivateKey | None = None,
          number: str = "1.00") -> version.AppVersion:
    return build(root, [MAIN, *sources], app="w", version=number, platform="x86_64-pc-linux-gnu",
                 plan_class="vmjob", key=key)


def test_a_version_is_where_update_versions_looks(tmp_path: Path) -> None:
    made = built(tmp_path, Source("in/data", "w_1.00_data", content=b"x", copy_file=True))
    assert made.directory == tmp_path / "w" / "1.00" / "x86_64-pc-linux-gnu__vmjob"
    assert (made.app, made.version_num, made.platform, made.plan_class) == (
        "w", 100, "x86_64-pc-linux-gnu", "vmjob")
    assert read(made.directory) == made
    main, data = made.files
    assert main.main_program
    assert main.path.stat().st_mode & 0o777 == 0o755
    assert (data.logical_name, data.copy_file, data.executable) == ("in/data", True, False)
    assert sorted(each.name for each in tmp_path.glob("w/1.00/*")) == ["x86_64-pc-linux-gnu__vmjob"]


def test_the_description_asks_for_a_wrappers_priority_and_never_against_the_throttle(
        tmp_path: Path) -> None:
    made = built(tmp_path)
    assert made.directory is not None
    text = (made.directory / "version.xml").read_text()
    assert "<is_wrapper/>" in text
    assert "<api_version>7.5.0</api_version>" in text
    assert "dont_throttle" not in text
    assert made.is_wrapper


def test_a_large_program_can_be_executed_and_large_data_is_not_copied(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "LINK_FROM", 4)
    large = tmp_path / "large"
    large.write_bytes(b"large")
    large.chmod(0o644)
    made = built(tmp_path, Source("p", "p", path=large, executable=True),
                 Source("d", "d", path=large))
    _, program, data = made.files
    assert program.executable
    assert program.path.stat().st_mode & 0o777 == 0o755
    assert data.path.samefile(large)
    assert large.stat().st_mode & 0o777 == 0o644


def test_a_physical_name_changes_with_the_content(tmp_path: Path) -> None:
    first = built(tmp_path / "a", Source("d", "w_1.00_d", ".xml", content=b"1")).files[1]
    second = built(tmp_path / "b", Source("d", "w_1.00_d", ".xml", content=b"2")).files[1]
    assert first.physical_name != second.physical_name
    assert first.physical_name.endswith(".xml")


def test_a_version_that_is_there_is_not_changed(tmp_path: Path) -> None:
    made = built(tmp_path)
    with pytest.raises(PackageInvalid, match="already"):
        built(tmp_path, Source("d", "d", content=b"1"))
    assert made.directory is not None
    assert read(made.directory) == made


def test_signatures_stand_beside_the_files_and_verify(tmp_path: Path) -> None:
    key = signing.generate()
    made = built(tmp_path, Source("d", "d", content=b"1"), key=key)
    for each in made.files:
        assert key.public.verifies(signing.md5_of(each.path), each.signature)
        assert each.path.with_name(f"{each.physical_name}.sig").read_text() == each.signature


def test_shared_files_are_linked_and_others_copied(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"0" * 100)
    made = built(tmp_path / "apps", Source("s", "s", path=tmp_path / "big", shared=True),
                 Source("c", "c", path=tmp_path / "big"))
    assert [each.path.samefile(tmp_path / "big") for each in made.files[1:]] == [True, False]


def test_nothing_is_left_of_a_version_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        built(tmp_path, Source("d", "d", path=tmp_path / "nothing"))
    with pytest.raises(PackageInvalid, match="main program"):
        build(tmp_path, [], app="w", version="1.00", platform="p", plan_class="")
    with pytest.raises(PackageInvalid, match="called"):
        built(tmp_path, Source("d", "d1", content=b"1"), Source("d", "d2", content=b"2"))
    with pytest.raises(UsageError):
        built(tmp_path, Source("../d", "d", content=b"1"))
    assert list(tmp_path.glob("w/1.00/*")) == []


def laid_out(root: Path, text: str, *files: str) -> Path:
    directory = root / "app" / "2.05" / "x86_64-pc-linux-gnu__c"
    directory.mkdir(parents=True)
    (directory / "version.xml").write_text(text)
    for each in files:
        (directory / each).write_text(each)
    return directory


def test_a_version_of_the_field_is_read(tmp_path: Path) -> None:
    """The form of a real project's file (boinc2docker)."""
    made = read(laid_out(tmp_path, """<version>
   <file>
      <!-- this name has to be changed -->
      <physical_name>vboxwrapper_26105</physical_name>
      <main_program/>
   </file>
   <file>
      <physical_name>vm_cache.vdi</physical_name>
      <logical_name>vm_cache.vdi</logical_name>
      <copy_file/>
      <gzip/>
   </file>
   <dont_throttle/>
   <needs_network/>
</version>""", "vboxwrapper_26105", "vm_cache.vdi", "beside"))
    assert (made.version_num, made.plan_class, made.needs_network) == (205, "c", True)
    assert [(each.physical_name, each.logical_name, each.main_program, each.copy_file)
            for each in made.files] == [
        ("vboxwrapper_26105", "", True, False), ("vm_cache.vdi", "vm_cache.vdi", False, True),
        ("beside", "", False, False)]


def test_an_only_file_is_the_main_program(tmp_path: Path) -> None:
    directory = laid_out(tmp_path, "", "program")
    (directory / "version.xml").unlink()
    assert read(directory).main_program.physical_name == "program"


@pytest.mark.parametrize(("text", "files"), [
    ("<version><file><physical_name>a</physical_name></file></version>", ()),
    ("<version></version>", ("a", "b")),
    ("<version><api_version>5.9.0</api_version></version>", ("a",)),
    ("<version><api_version>x</api_version></version>", ("a",)),
    ("<version><file><physical_name>../x</physical_name><main_program/></file></version>", ("a",)),
    ("<version><file><physical_name>a</physical_name><logical_name>/</logical_name></file>",
     ("a",)),
    ("<other/>", ("a",)), ("<version>", ("a",)), ("", ("a",)), ("<!DOCTYPE x>", ("a",)),
    ("<version/><version/>", ("a",)), ("x" * (1 << 21), ("a",))])
def test_a_version_that_makes_no_sense_is_refused(tmp_path: Path, text: str,
                                                  files: tuple[str, ...]) -> None:
    with pytest.raises(VmjobError):
        read(laid_out(tmp_path, text, *files))


def test_no_link_is_followed(tmp_path: Path) -> None:
    directory = laid_out(tmp_path, "<version></version>")
    (directory / "main").symlink_to("/etc/passwd")
    with pytest.raises(PackageInvalid, match="regular"):
        read(directory)
    (directory / "main").unlink()
    os.mkfifo(directory / "main")
    with pytest.raises(PackageInvalid, match="regular"):
        read(directory)


@pytest.mark.parametrize("name", ["vbox64", "my_VBox", "a__b", "_a", "a_", "a-b", "docker",
                                  "a" * 33])
def test_a_plan_class_that_clients_treat_in_a_special_way_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        names.check_plan_class(name)


@pytest.mark.parametrize(("text", "number"), [("1.00", 100), ("0.05", 5), ("12.34", 1234)])
def test_a_version_number_is_that_of_boincs_tools(text: str, number: int) -> None:
    assert names.version_number(text) == number


@pytest.mark.parametrize("text", ["1", "1.5", "1.005", "01.00", "", "1.00\n", "-1.00", "1.0x"])
def test_a_version_number_that_can_be_misread_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        names.version_number(text)


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", "a/..", ".a", "a/.b", "a b", "a\n",
                                  "a/b/c/d/e", "x" * 161, "a\\b", "<a>", "é"])
def test_a_logical_name_stays_in_the_slot(name: str) -> None:
    with pytest.raises(UsageError):
        names.check_logical(name)


@pytest.mark.parametrize("name", ["version.xml", "a.sig", "vboxwrapper_1", "a/b", ".a", ""])
def test_a_physical_name_means_nothing_else_to_boinc(name: str) -> None:
    with pytest.raises(UsageError):
        names.check_physical(name)
