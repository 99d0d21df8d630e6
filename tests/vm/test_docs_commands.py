"""Every command in the documentation runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmjob.home import Home

pytestmark = pytest.mark.vm

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/tutorial/first-job.md", "docs/tutorial/first-job-file.md",
         "docs/how-to/images.md", "docs/how-to/job-files.md", "docs/how-to/messages.md",
         "docs/how-to/machines.md", "docs/how-to/pool.md", "docs/how-to/survive.md",
         "docs/how-to/boinc-admin.md"]
#: These need the real BOINC client.
CLIENT_PAGES = ["docs/tutorial/boinc-app.md", "docs/reference/project.md"]
#: A page whose commands another test runs: that test names it.
ELSEWHERE = {"docs/reference/boinc-runtime.md": "tests/contract/test_boinc_page.py"}


@pytest.mark.parametrize("page", [
    *PAGES, *(pytest.param(each, marks=pytest.mark.e2e) for each in CLIENT_PAGES)])
def test_the_commands_of_a_page_run_in_order(page: str, vm_home: Home, tmp_path: Path) -> None:
    place = tmp_path / "work"
    place.mkdir()
    shutil.copytree(ROOT / "examples", place / "examples")  # readers are in their clone
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```$", (ROOT / page).read_text(),
                        re.MULTILINE | re.DOTALL)
    assert blocks
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, text in blocks:
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else \
            [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=place, env=environment, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def test_the_page_lists_are_complete() -> None:
    with_commands = {str(path.relative_to(ROOT)) for path in
                     [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
                     if re.search(r"^```(sh|python)$", path.read_text(), re.MULTILINE)}
    assert with_commands == {*PAGES, *CLIENT_PAGES, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text()
