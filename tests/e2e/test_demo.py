"""What a newcomer sees in one command."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import psutil
import pytest

from vmjob.home import Home

pytestmark = [pytest.mark.e2e, pytest.mark.vm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def test_the_demo_shows_a_jobs_life_under_the_real_client(vm_home: Home, tmp_path: Path) -> None:
    done = subprocess.run(
        ["script/demo", "--boinc", "20"], cwd=ROOT, text=True, capture_output=True, check=False,
        env={**os.environ, "DEMO_RESULTS": str(tmp_path / "results"),
             "VMJOB_HOME": str(vm_home.root), "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-4000:]
    assert "succeeded, exit status 0" in done.stdout
    assert "A LINE IN THE FILE" in done.stdout
    assert "2 starts" in done.stdout
    picture = (tmp_path / "results" / "boinc" / "life.svg").read_text()
    texts = {each.text for each in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert {"suspended", "resumed", "client quits", "client starts"} <= texts
    assert not [each for each in psutil.process_iter(["cwd"])
                if str(tmp_path) in (each.info["cwd"] or "")]
