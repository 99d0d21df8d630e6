"""``python simulated_vmjob.py HOW -- ARGUMENTS``: `vmjob` whose machines are simulated.

HOW is ``plain``, or how the disk of a second checkpoint behaves: ``stuck`` never ends to write it.
``margin=S``: as `vmjob.cli.signals.MARGIN`.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vmjob.cli import signals
from vmjob.host import durable
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import SimulatedDriver
from vmjob.shape import Shape

manifests = 0
sync = durable.sync


async def shape(home: Any, image: str, accel: str, *, progress: Any = None,
                **more: Any) -> Shape:
    spec = MachineSpec(id="", directory=home.root, boot=None, memory_mb=128)
    manifest = SimpleNamespace(parts={"root": SimpleNamespace(sha256="")}, kernel_version="")
    found: Any = SimpleNamespace(name=image, manifest=manifest)
    return Shape(SimulatedDriver(), spec, found, "")


def stuck(path: Path) -> None:
    """Sync all of a first checkpoint, and never that of a second one."""
    global manifests
    manifests += path.name[0].isdigit() and path.name.endswith(".json.new")
    if manifests > 1:
        (path.parent.parent / "reached").touch()
        threading.Event().wait()
    sync(path)


def main(how: list[str], arguments: list[str]) -> None:
    import vmjob.shape
    from vmjob.cli.main import main as vmjob_main

    vmjob.shape.machine_shape = shape  # type: ignore[assignment]
    for word in how:
        if word == "stuck":
            durable.sync = stuck
        elif word.startswith("margin="):
            signals.MARGIN = float(word.partition("=")[2])
    sys.argv[1:] = arguments
    vmjob_main()


if __name__ == "__main__":
    at = sys.argv.index("--")
    main(sys.argv[1:at], sys.argv[at + 1:])
