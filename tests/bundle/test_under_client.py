"""The real client starts the bundle as an application's main program, QEMU comes along."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.bundle.conftest import PROGRAMS, Bundles
from vmjob.image.store import Image
from vmjob.project import signing
from vmjob.project.devclient import DevClient
from vmjob.project.devserver import DevServer
from vmjob.project.package import package
from vmjob.project.trial import compute

pytestmark = [pytest.mark.e2e, pytest.mark.vm, pytest.mark.timeout(400)]

#: Seconds for the client's own time, a machine that boots under emulation and is frozen, and the
#: job.
DEADLINE = 240.0
JOB = """
memory_mb = 256
outputs = ["out"]

[[task]]
run = ["sh", "-c", "uname -s > out; exit 0"]
"""


def test_a_volunteer_with_neither_python_nor_qemu_computes_for_a_project(
        bundles: Bundles, default_image: Image, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in (*PROGRAMS, "sed", "dd", "mv", "cp", "chmod", "dirname", "id"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    assert shutil.which("python3", path=tools) is None
    assert shutil.which("qemu-system-x86_64", path=tools) is None
    key = signing.generate()
    (tmp_path / "vmjob.toml").write_text(JOB)
    made = package(tmp_path / "apps", app="bundled", number="1.00", job=tmp_path / "vmjob.toml",
                   image=default_image, wrapper=bundles.vmjob, qemu=bundles.qemu, key=key)
    assert made.version.directory is not None
    with DevServer(tmp_path / "server", key=key) as server:
        server.add_version(made.version.directory)
        name = server.add_job(app="bundled", outputs=["out"], command_line="--allow-emulation",
                              disk_bound=10e9, memory_bound=5e8)
        with DevClient(tmp_path / "client", url=server.url, authenticator=server.authenticator,
                       environment={"PATH": str(tools)}) as client:
            result = compute(server, client, [name], DEADLINE)[name]
            programs = client.project_directory / "vmjob" / "programs"
            unpacked = {path.name.partition("-")[0] for path in programs.iterdir()}
        assert client.leftovers == []
    assert result.succeeded, result.stderr_out
    assert result.stderr_out.startswith("SUCCEEDED")
    assert "machine:     qemu" in result.stderr_out
    assert result.outputs["out"].read_text() == "Linux\n"
    assert {"qemu", "wrapper"} <= unpacked
