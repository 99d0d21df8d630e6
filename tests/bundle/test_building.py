"""What goes into a bundle, without building one."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from bundling import debian, emulator, interpreter, libraries
from bundling.content import File, archive


def test_the_same_files_give_the_same_archive_in_any_order() -> None:
    tree = {"b/x": File(b"1"), "a": File(b"2", executable=True)}
    packed = archive(tree, 1_700_000_000)
    assert packed == archive(dict(reversed(tree.items())), 1_700_000_000)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert [(each.name, each.mode, each.uid) for each in tar] == [
            ("a", 0o755, 0), ("b/x", 0o644, 0)]


def test_libraries_are_read_from_what_the_loader_lists() -> None:
    listed = """\
\tlinux-vdso.so.1 (0x00007ffd)
\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f12)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f13)
"""
    assert libraries.parse_list(listed) == {"libz.so.1": Path("/lib/x86_64-linux-gnu/libz.so.1")}


def test_a_missing_library_ends_the_build() -> None:
    with pytest.raises(ValueError, match=r"libnone\.so\.1"):
        libraries.parse_list("\tlibnone.so.1 => not found\n")


def test_a_library_has_its_package_and_source_under_either_name() -> None:
    names = [Path("/usr/lib/x86_64-linux-gnu/libc.so.6"), Path("/lib/x86_64-linux-gnu/libc.so.6")]
    first, second = map(debian.package_of, names)
    assert first == second
    assert (first.name, first.source) == ("libc6:amd64", "glibc")


def test_a_file_of_nobody_ends_the_build(tmp_path: Path) -> None:
    with pytest.raises(LookupError):
        debian.package_of(tmp_path / "x")


def test_a_version_in_a_file_name_has_no_signs_that_urls_give_a_meaning() -> None:
    assert emulator.version_in_name("1:7.2+dfsg-7+deb12u18") == "7.2.dfsg-7.deb12u18"
    assert emulator.version_in_name("7.2~rc1") == "7.2.rc1"


def test_vmjob_needs_what_its_dependencies_need_but_no_lexers() -> None:
    found = interpreter.requirements("vmjob")
    assert {"anyio", "click", "msgspec", "psutil", "qemu-qmp", "rich", "idna"} <= found
    assert "pygments" not in found


def test_every_sh_can_read_the_scripts() -> None:
    for script in (*interpreter.FILES.glob("*.sh"),):
        subprocess.run(["sh", "-n", script], check=True, timeout=20)
    subprocess.run(["sh", "-n"], input=emulator.launcher("qemu-img", firmware=False), text=True,
                   check=True, timeout=20)


def test_an_installed_version_is_recognized_by_its_content() -> None:
    one, other = (interpreter.one_file({"x": File(data)}) for data in (b"1", b"2"))
    assert one[:interpreter.SKIP] != other[:interpreter.SKIP]
    assert one == interpreter.one_file({"x": File(b"1")})
    assert b"@" not in one[:interpreter.SKIP].replace(b'"$@"', b"")
