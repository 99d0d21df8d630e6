"""What is remembered of a proof, and what is asked again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vmjob.errors import (
    HostMemoryLow,
    KernelModuleMissing,
    MachineStartFailed,
    VirtualizationInUse,
    VmjobError,
)
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec
from vmjob.machine.virtualbox import accelerators, device, programs

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("error", "again"), [
    (VirtualizationInUse("another has it"), True), (HostMemoryLow("too little"), True),
    (KernelModuleMissing("none"), False), (MachineStartFailed("no"), False)])
async def test_a_fault_that_passes_proves_nothing_for_long(
        home: Home, monkeypatch: pytest.MonkeyPatch, error: VmjobError, again: bool) -> None:
    starts = 0

    class Machine:
        def __init__(self, spec: MachineSpec) -> None: ...

        async def define(self) -> None: ...

        async def start(self) -> None:
            nonlocal starts
            starts += 1
            if starts == 1:
                raise error

        def console(self) -> str:
            return accelerators.PROOF

        async def destroy(self) -> None: ...

    monkeypatch.setattr(accelerators, "VirtualBoxMachine", Machine)
    monkeypatch.setattr(programs, "find", lambda: SimpleNamespace(manage=""))
    monkeypatch.setattr(programs, "usable_version", lambda _: SimpleNamespace(text="7.2"))
    monkeypatch.setattr(device, "why_not", lambda: "")
    monkeypatch.setattr(device, "identity", lambda: "")
    first, second = [await accelerators.prove(home, "hm") for _ in range(2)]
    assert (first.works, first.why) == (False, error.message)
    assert second.works is again
    assert (await accelerators.prove(home, "hm")).works is again
    assert starts == 1 + again
