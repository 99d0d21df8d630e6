"""The files of ours that go into a machine: the init scripts and the agent."""

from __future__ import annotations

import importlib.resources
import io
import tarfile

__all__ = ["agent_sources", "digest_input", "job_library", "overlay_tar", "resource"]

#: Where the guest keeps our files.
GUEST_DIRECTORY = "usr/lib/vmjob"
AGENT_PACKAGE = "vmjob_agent"
#: Where programs look for what they import, include, read or call, and with which mode.
LIBRARY = {"vmjob_job.py": ("usr/lib/python3/dist-packages/vmjob_job.py", 0o644),
           "vmjob_job.sh": (f"{GUEST_DIRECTORY}/vmjob_job.sh", 0o644),
           "vmjob_job.h": ("usr/include/vmjob_job.h", 0o644),
           "vboxmonitor": ("usr/bin/vboxmonitor", 0o755)}



def resource(name: str) -> bytes:
    """The script ``name`` of ``vmjob/image/guest``: init, pid1 or customize."""
    return (importlib.resources.files("vmjob.image") / "guest" / name).read_bytes()


def agent_sources() -> dict[str, bytes]:
    """The agent's modules: file name -> source. Empty while there is no agent package."""
    directory = importlib.resources.files("vmjob") / "guest" / "agent"
    if not directory.is_dir():
        return {}
    return {entry.name: entry.read_bytes()
            for entry in sorted(directory.iterdir(), key=lambda entry: entry.name)
            if entry.name.endswith(".py") and entry.is_file()}


def job_library() -> dict[str, bytes]:
    """What jobs may use to talk to the host: file name -> source."""
    directory = importlib.resources.files("vmjob") / "guest" / "library"
    return {name: (directory / name).read_bytes() for name in LIBRARY}


def digest_input() -> list[tuple[str, bytes]]:
    """All guest files as (name, content): what an image's digest covers."""
    scripts = [(f"script/{name}", resource(name)) for name in ("customize", "init", "pid1")]
    scripts += [(f"agent/{name}", data) for name, data in agent_sources().items()]
    return scripts + [(f"library/{name}", data) for name, data in job_library().items()]


def overlay_tar(agent: dict[str, bytes], library: dict[str, bytes], pid1: bytes,
                mtime: int) -> bytes:
    """A tar archive of what is laid over Debian's files: all owned by root, all of one time.

    An archive, because it carries owners and modes through a build that runs without root.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, mode: int, data: bytes | None, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.mode, info.mtime, info.uname, info.gname = mode, mtime, "root", "root"
            if link:
                info.type, info.linkname = tarfile.SYMTYPE, link
                tar.addfile(info)
            elif data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

        # Different in each machine: the agent writes them when the host says who this one is.
        for name in ("hosts", "machine-id"):
            add(f"etc/{name}", 0o777, None, link=f"/run/{name}")
        add("etc/hostname", 0o777, None, link="/proc/sys/kernel/hostname")
        add("job", 0o755, None)
        add(GUEST_DIRECTORY, 0o755, None)
        add(f"{GUEST_DIRECTORY}/init", 0o755, pid1)
        add(f"{GUEST_DIRECTORY}/{AGENT_PACKAGE}", 0o755, None)
        for name, data in sorted(agent.items()):
            add(f"{GUEST_DIRECTORY}/{AGENT_PACKAGE}/{name}", 0o644, data)
        add("usr/include", 0o755, None)
        for name, data in sorted(library.items()):
            path, mode = LIBRARY[name]
            add(path, mode, data)
    return buffer.getvalue()
