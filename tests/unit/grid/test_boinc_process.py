"""What an app does first, where its files are, and the calls for Windows, which only a fake saw."""

from __future__ import annotations

import ast
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmjob.grid.boinc import ChannelsUnusable, clean_environment, exitcodes, files, resolve, windows


def test_what_the_client_lets_us_inherit_is_closed() -> None:
    code = ("import os\nfrom vmjob.grid.boinc import close_inherited\nclose_inherited()\n"
            "os.write(1, ' '.join(sorted(os.listdir('/proc/self/fd'))).encode())")
    reader, writer = os.pipe()
    os.dup2(writer, 200)
    try:
        done = subprocess.run([sys.executable, "-c", code], pass_fds=[reader, writer, 200],
                              capture_output=True, check=True, timeout=60)
    finally:
        for fd in (reader, writer, 200):
            os.close(fd)
    assert done.stdout == b"0 1 2 3"  # 3 is the look itself


@pytest.mark.parametrize(("before", "after"), [
    ("../../projects/X:.:../..", None),
    ("../../projects/X:.:../..:/opt/lib:/usr/lib", "/opt/lib:/usr/lib"),
    ("", None), (":", None), ("/opt/lib::", "/opt/lib"),
])
def test_no_library_of_the_project_is_loaded_into_a_program_of_the_system(
        before: str, after: str | None) -> None:
    given = {"LD_LIBRARY_PATH": before, "PATH": "/bin"}
    assert clean_environment(given) == {
        "PATH": "/bin", **({} if after is None else {"LD_LIBRARY_PATH": after})}
    assert given["LD_LIBRARY_PATH"] == before
    assert clean_environment({"PATH": "/bin"}) == {"PATH": "/bin"}


def test_the_package_is_useful_on_its_own() -> None:
    """It imports the standard library and itself."""
    for path in Path(files.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("vmjob.grid.boinc") \
                    or name.split(".")[0] in sys.stdlib_module_names, f"{path.name}: {name}"


def test_exit_codes_have_names() -> None:
    assert list(exitcodes.NAMES) == list(range(192, 210))
    assert exitcodes.NAMES[exitcodes.EXIT_INIT_FAILURE] == "EXIT_INIT_FAILURE"


@pytest.mark.parametrize("data", [b"", b"\xff" * 5000, b"<soft_link></soft_link>",
                                  b"<soft_link>a\0b</soft_link>", b"x<soft_link>a</soft_link>"])
def test_what_is_no_link_stands_for_itself(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe", "missing", "a\0b"):
        assert resolve(name, tmp_path) == tmp_path / name


def test_a_file_is_replaced_as_a_whole_or_not_at_all(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    (tmp_path / "part.file").symlink_to("/etc/passwd")  # left by whoever: replaced, not followed
    files.write_whole(path, b"old", durable=True)
    assert not path.is_symlink()

    def full(_: object, __: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="space"):
        files.write_whole(path, b"new", durable=False)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


class Kernel32:
    """The few calls, and the memory of a client that is a service or not."""

    def __init__(self, existing: str = "", error: int = 0, ended: bool = False) -> None:
        self.memory = ctypes.create_string_buffer(8192)
        self.calls: list[str] = []
        self._existing = existing
        self._error = error
        self._ended = ended

    def OpenFileMappingW(self, access: int, inherit: bool, name: str) -> int | None:  # noqa: N802
        self.calls.append(f"open {name}")
        return 7 if name == self._existing else None

    def MapViewOfFile(self, handle: int, *_: int) -> int:  # noqa: N802
        self.calls.append(f"map {handle}")
        return ctypes.addressof(self.memory)

    def UnmapViewOfFile(self, address: int) -> None:  # noqa: N802
        self.calls.append("unmap")

    def CloseHandle(self, handle: int) -> None:  # noqa: N802
        self.calls.append(f"close {handle}")

    def CreateFileW(self, *arguments: object) -> int | None:  # noqa: N802
        assert arguments[2] == 0  # shared with nobody
        return ctypes.c_void_p(-1).value if self._error else 9

    def OpenProcess(self, *_: object) -> int | None:  # noqa: N802
        return None if self._error else 9

    def WaitForSingleObject(self, handle: int, milliseconds: int) -> int:  # noqa: N802
        assert milliseconds == 0
        return 0 if self._ended else 258

    def GetLastError(self) -> int:  # noqa: N802
        return self._error


@pytest.mark.parametrize("name", ["Global\\shm_boinc_3", "shm_boinc_3"])
def test_on_windows_the_mapping_of_a_service_is_tried_first(name: str) -> None:
    kernel = Kernel32(name)
    memory, release = windows.open_memory("boinc_3", kernel)
    assert len(memory) == 8192
    memory[5] = 1
    assert kernel.memory.raw[5] == 1
    memory.release()
    release()
    assert kernel.calls[0] == "open Global\\shm_boinc_3"
    assert kernel.calls[-3:] == ["map 7", "unmap", "close 7"]
    for wrong in ("", "boinc_4"):
        with pytest.raises(ChannelsUnusable):
            windows.open_memory(wrong, kernel)


def test_on_windows_the_lock_is_a_file_that_nobody_else_may_open(tmp_path: Path) -> None:
    assert windows.lock(tmp_path, Kernel32()) == 9
    assert windows.lock(tmp_path, Kernel32(error=32)) is None
    with pytest.raises(OSError, match="error 5"):
        windows.lock(tmp_path, Kernel32(error=5))


def test_on_windows_a_process_is_there_until_it_ends() -> None:
    assert windows.exists(1, Kernel32())
    assert not windows.exists(1, Kernel32(ended=True))
    assert windows.exists(1, Kernel32(error=5))  # another user's
    assert not windows.exists(1, Kernel32(error=87))
