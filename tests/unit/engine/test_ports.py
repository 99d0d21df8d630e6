"""A job's ports are where it says, or elsewhere, which is told; for other computers by consent."""

from __future__ import annotations

import socket
from pathlib import Path

import anyio
import pytest

from vmjob.engine.record import Record
from vmjob.engine.request import Request
from vmjob.engine.run import run_job
from vmjob.grid.contract import Quiet
from vmjob.home import Home
from vmjob.job.model import Forward, Job, Network, Task
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver

pytestmark = pytest.mark.anyio


class Heard(Quiet):
    def __init__(self) -> None:
        self.addresses: list[tuple[str, str]] = []
        self.warnings: list[str] = []

    def address(self, what: str, where: str) -> None:
        self.addresses.append((what, where))

    def warning(self, text: str) -> None:
        self.warnings.append(text)


async def run(home: Home, shape: MachineSpec, grid: Heard, *forwards: Forward,
              announce: Path | None = None, network: Network = Network.NAT) -> Record:
    from dataclasses import replace

    job = Job((Task(("true",)),), network=network, forwards=forwards, announce=announce)
    with anyio.fail_after(60):
        return await run_job(home, Request(job, FakeDriver(), replace(shape, network=str(network)),
                                           {}), grid)


async def test_a_taken_port_is_replaced_by_a_free_one_which_is_told(
        home: Home, fake_shape: MachineSpec, tmp_path: Path) -> None:
    grid = Heard()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        record = await run(home, fake_shape, grid, Forward(80, port, web=True), announce=tmp_path)
    assert record.error is None
    ((what, where),) = grid.addresses
    assert what == "web"
    other = int(where.rpartition(":")[2].strip("/"))
    assert other != port
    assert any(f"port {port} of this computer is taken" in text for text in grid.warnings)
    assert f"<host_port>{other}</host_port>" in (tmp_path / "vbox_webapi.xml").read_text()


async def test_what_an_older_process_announced_is_replaced_and_no_link_followed(
        home: Home, fake_shape: MachineSpec, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "slot").mkdir()
    for name in ("vbox_webapi.xml", "vbox_webapi.xml.new"):
        (tmp_path / "slot" / name).symlink_to(victim)
    await run(home, fake_shape, Heard(), Forward(80, web=True), announce=tmp_path / "slot")
    assert victim.read_text() == "mine"
    assert "<webapi>" in (tmp_path / "slot" / "vbox_webapi.xml").read_text()


async def test_ports_for_other_computers_need_consent(home: Home,
                                                      fake_shape: MachineSpec) -> None:
    grid = Heard()
    await run(home, fake_shape, grid, Forward(22, remote=True))
    assert any("--allow-remote-ports" in text for text in grid.warnings)


async def test_ports_without_a_network_are_told_and_not_opened(home: Home,
                                                               fake_shape: MachineSpec) -> None:
    grid = Heard()
    record = await run(home, fake_shape, grid, Forward(22), network=Network.NONE)
    assert record.exit_code == 0
    assert grid.addresses == []
    assert len(grid.warnings) == 1
