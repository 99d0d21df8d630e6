"""The example on the page of the BOINC runtime is a whole app, with a client and without."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.simulated_client import SimulatedClient
from vmjob.grid import boinc

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "boinc-runtime.md"


def test_the_example_on_the_page_is_an_app(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example
    with SimulatedClient(tmp_path, wu_cpu_time=10) as client:
        out = client.link("out", "result_0_0")
        client.queue.append("<suspend/>\n")
        client.start([sys.executable, "-c", example[1]])
        client.until(lambda: client.memory[0] == 0 and not client.queue, "it is suspended")
        client.queue.append("<resume/>\n")
        assert client.ended() == "finished"
        assert out.read_text() == "42\n"
        assert client.seen.fraction_done == 1.0
        assert client.seen.checkpoints == [10.5]
        assert client.seen.current_cpu_time == 11.0


def test_every_event_and_call_is_on_the_page() -> None:
    page = PAGE.read_text()
    for name in dir(boinc.Runtime):
        assert name.startswith("_") or re.search(rf"`(Runtime\.)?{name}\b", page), name
    for event in boinc.Event.__args__:
        assert f"`{event.__name__}(" in page, event
