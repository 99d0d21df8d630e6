"""A keeper whose machines are fake: ``python fake_keeper.py KIND HOME NAME new|again FD``."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio

from vmjob.errors import CheckpointFailed
from vmjob.keeper.server import serve
from vmjob.machine.contract import Checkpoint, Driver, MachineSpec
from vmjob.machine.fake import FakeDriver, FakeMachine, Faults, SimulatedDriver


class KeptMachine(FakeMachine):
    """One whose checkpoints have its files, and nothing that ran."""

    def __init__(self, spec: MachineSpec, faults: Faults, kind: str) -> None:
        super().__init__(spec, faults)
        self._kind = kind

    async def start(self):  # type: ignore[no-untyped-def]
        if self._kind == "slow-start" and not self.spec.freezable:
            (self.spec.directory.parent / "reached").touch()
            await anyio.sleep_forever()
        return await super().start()

    async def checkpoint(self, directory: Path, name: str,
                         while_still: Callable[[], None]) -> Checkpoint:
        if self._kind == "no-checkpoint":
            raise CheckpointFailed("the disk said no")
        while_still()
        if self._kind == "slow-checkpoint":
            (directory / f"{name}.half").write_text("half")
            (self.spec.directory.parent / "reached").touch()
            await anyio.sleep_forever()
        shutil.make_archive(str(directory / name), "tar", self.workdir)
        return Checkpoint((f"{name}.tar",), {"archive": f"{name}.tar"}, 0.0, 0)


class KeptDriver(FakeDriver):
    """Makes them."""

    capabilities = replace(FakeDriver.capabilities, checkpoint=True)

    def __init__(self, kind: str) -> None:
        super().__init__(Faults(start="out of luck") if kind == "broken" else Faults())
        self._kind = kind

    async def create(self, spec: MachineSpec) -> FakeMachine:
        machine = KeptMachine(spec, self._faults, self._kind)
        machine.workdir.mkdir()
        if spec.saved is not None:
            shutil.unpack_archive(spec.saved.directory / spec.saved.state["archive"],
                                  machine.workdir, "tar")
        return machine


def stuck(path: Path) -> None:
    """A disk that does not answer when the second checkpoint is to be published."""
    if path.name == "000002.json.new":
        (path.parent.parent / "reached").touch()
        threading.Event().wait()
    sync(path)


def driver_of(kind: str) -> Driver:
    return SimulatedDriver(steps=4) if kind in ("simulated", "stuck-disk") else KeptDriver(kind)


if __name__ == "__main__":
    import vmjob.engine.freezing
    from vmjob.host import durable

    vmjob.engine.freezing.QUIET = 0  # a fake machine has no kernel that puts work off
    sync = durable.sync
    if sys.argv[1] == "stuck-disk":
        durable.sync = stuck
    sys.exit(serve(*sys.argv[2:], driver=driver_of(sys.argv[1])))
