"""Windows' side of the slot: a named mapping, an exclusive file, a process by its handle.

NEVER RUN on Windows: written from the documented rules, and tested with a fake of the calls only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmjob.grid.boinc.errors import ChannelsUnusable

__all__ = ["exists", "lock", "mapping_names", "open_memory", "unlock"]

_LENGTH = 8192
_FILE_MAP_WRITE_AND_READ = 0x0006
_GENERIC_READ_AND_WRITE = 0xC0000000
_OPEN_ALWAYS = 4
_NORMAL_FILE = 0x80
_QUERY_LIMITED_INFORMATION = 0x1000
_SYNCHRONIZE = 0x00100000
_INVALID_HANDLE = ctypes.c_void_p(-1).value
_SHARING_VIOLATION = 32
_ACCESS_DENIED = 5
_WAIT_OBJECT_0 = 0


def mapping_names(comm_obj_name: str) -> tuple[str, str]:
    """Where the client's memory may be: for a client that is a service, and for one that is not."""
    return f"Global\\shm_{comm_obj_name}", f"shm_{comm_obj_name}"


def open_memory(comm_obj_name: str, kernel: Any = None) -> tuple[memoryview, Callable[[], None]]:
    """The client's mapping, which must exist (`mmap` would make a new one)."""
    kernel = kernel or _kernel32()
    if not comm_obj_name:
        raise ChannelsUnusable("init_data.xml has no <comm_obj_name>")
    for name in mapping_names(comm_obj_name):
        handle = kernel.OpenFileMappingW(_FILE_MAP_WRITE_AND_READ, False, name)
        if not handle:
            continue
        address = kernel.MapViewOfFile(handle, _FILE_MAP_WRITE_AND_READ, 0, 0, _LENGTH)
        if not address:
            kernel.CloseHandle(handle)
            break

        def release(address: int = address, handle: int = handle) -> None:
            kernel.UnmapViewOfFile(address)
            kernel.CloseHandle(handle)

        array = (ctypes.c_ubyte * _LENGTH).from_address(address)
        return memoryview(array).cast("B"), release
    raise ChannelsUnusable(f"the client's shared memory shm_{comm_obj_name} cannot be opened")


def lock(path: Path, kernel: Any = None) -> int | None:
    """Open a file so that nobody else can; None when somebody has."""
    kernel = kernel or _kernel32()
    handle: int = kernel.CreateFileW(str(path), _GENERIC_READ_AND_WRITE, 0, None, _OPEN_ALWAYS,
                                     _NORMAL_FILE, None)
    if handle != _INVALID_HANDLE:
        return handle
    error = kernel.GetLastError()
    if error == _SHARING_VIOLATION:
        return None
    raise OSError(0, f"Windows error {error}", str(path), error)


def unlock(handle: int, kernel: Any = None) -> None:
    """Close what `lock` returned."""
    (kernel or _kernel32()).CloseHandle(handle)


def exists(pid: int, kernel: Any = None) -> bool:
    """Whether a process runs. (`os.kill` with 0 would send it Ctrl-C here.)"""
    kernel = kernel or _kernel32()
    handle = kernel.OpenProcess(_SYNCHRONIZE | _QUERY_LIMITED_INFORMATION, False, pid)
    if not handle:
        return bool(kernel.GetLastError() == _ACCESS_DENIED)
    try:
        return bool(kernel.WaitForSingleObject(handle, 0) != _WAIT_OBJECT_0)
    finally:
        kernel.CloseHandle(handle)


class _Kernel32:
    """The calls, with handles and addresses as wide as they are."""

    def __init__(self) -> None:
        library: Any = getattr(ctypes, "WinDLL")("kernel32", use_last_error=True)  # noqa: B009
        for name in ("OpenFileMappingW", "MapViewOfFile", "CreateFileW", "OpenProcess"):
            getattr(library, name).restype = ctypes.c_void_p
        library.OpenFileMappingW.argtypes = [ctypes.c_uint32, ctypes.c_int, ctypes.c_wchar_p]
        library.MapViewOfFile.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32,
                                          ctypes.c_uint32, ctypes.c_size_t]
        library.UnmapViewOfFile.argtypes = [ctypes.c_void_p]
        library.CloseHandle.argtypes = [ctypes.c_void_p]
        library.CreateFileW.argtypes = [ctypes.c_wchar_p, ctypes.c_uint32, ctypes.c_uint32,
                                        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32,
                                        ctypes.c_void_p]
        library.OpenProcess.argtypes = [ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32]
        library.WaitForSingleObject.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._library = library

    def GetLastError(self) -> int:  # noqa: N802
        # ctypes keeps the value of its own last call; the library's may be overwritten by then.
        return int(getattr(ctypes, "get_last_error")())  # noqa: B009

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


_loaded: list[_Kernel32] = []


def _kernel32() -> _Kernel32:
    if not _loaded:
        _loaded.append(_Kernel32())
    return _loaded[0]
