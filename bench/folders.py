"""How soon a file that one side has written is there on the other."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from vmjob.engine.record import Record
from vmjob.engine.request import Request
from vmjob.engine.run import run_job
from vmjob.grid.contract import Quiet
from vmjob.home import Home
from vmjob.job.files import Folder
from vmjob.job.model import Job, Task
from vmjob.shape import machine_shape

MEMORY = 256
#: Files that are there besides.
SIZES = (10, 300, 1000)
#: Seconds between two looks for a file of the guest's.
LOOK = 0.005

#: Answers each file of the host's by a message, at once, and then writes one of its own.
ANSWERING = """
import os, sys, time
to_host = os.environ["VMJOB_TO_HOST"]
def say(text):
    with open(to_host, "w") as fifo:
        fifo.write(text + "\\n")
say("ready")
for number in range(int(sys.argv[1])):
    while not os.path.exists(f"h{number}"):
        time.sleep(0.01)
    say("saw")
    time.sleep(0.3)  # the folder is at rest again
    with open(f"g{number}", "w") as file:
        file.write("x")
    say("wrote")
"""


class _Heard(Quiet):
    def __init__(self) -> None:
        self.messages: asyncio.Queue[str] = asyncio.Queue()

    def message(self, text: str) -> None:
        self.messages.put_nowait(text)


async def delays(home: Home, place: Path, runs: int) -> dict[str, float]:
    """Medians and longest, both ways, for folders of several sizes."""
    figures = {}
    for count in SIZES:
        shared = place / f"shared{count}"
        shared.mkdir()
        for number in range(count):
            (shared / f"file{number}").write_text(f"{number}\n")
        there, back = await _one(home, shared, runs)
        for way, found in (("host to guest", there), ("guest to host", back)):
            figures[f"folder of {count}: {way} s"] = statistics.median(found)
            figures[f"folder of {count}: {way}, longest s"] = max(found)
    return figures


async def _one(home: Home, shared: Path, runs: int) -> tuple[list[float], list[float]]:
    heard = _Heard()
    job = Job((Task(("python3", "-c", ANSWERING, str(runs)), cwd="shared"),), memory_mb=MEMORY,
              folders=(Folder("shared", shared, "shared"),))
    made = await machine_shape(home, "default", "tcg", memory_mb=MEMORY, cpus=1,
                               disk_gb=job.disk_gb, network="none", cpu="host")
    running = asyncio.ensure_future(
        run_job(home, Request(job, made.driver, made.spec, {}), heard))
    there, back = [], []
    await _said(heard, running, "ready")
    for number in range(runs):
        await asyncio.sleep(1)  # the folder is at rest
        began = time.perf_counter()
        (shared / f"h{number}").write_text("x")
        await _said(heard, running, "saw")
        there.append(time.perf_counter() - began)
        await _said(heard, running, "wrote")
        began = time.perf_counter()
        while not (shared / f"g{number}").exists():  # noqa: ASYNC110 - nobody announces a file
            await asyncio.sleep(LOOK)
        back.append(time.perf_counter() - began)
    record = await running
    if record.exit_code != 0:
        raise RuntimeError(f"the job ended with {record.exit_code}: {record.error}")
    return there, back


async def _said(heard: _Heard, running: asyncio.Future[Record], text: str) -> None:
    """Wait for a message of the job's; raises when it ends before."""
    getting = asyncio.ensure_future(heard.messages.get())
    waited: list[asyncio.Future[Any]] = [getting, running]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if not getting.done() or getting.result() != text:
        getting.cancel()
        raise RuntimeError(f"the job did not say {text!r}")
