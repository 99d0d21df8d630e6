"""What jobs link, import or read to talk to the host: the same words from every language."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vmjob
from vmjob.image.guestfiles import LIBRARY, job_library

SOURCES = Path(vmjob.__file__).parent / "guest" / "library"
SAID = ["fraction_done 0.25", "ops_cumulative 1500000000000 7", "checkpoint_completed"]

PYTHON = """
import vmjob_job as job
job.fraction_done(0.25)
job.ops_cumulative(1.5e12, 7)
assert not job.time_to_checkpoint()
job.checkpoint_completed()
"""
SHELL = """set -eu
. ./vmjob_job.sh
fraction_done 0.25
ops_cumulative 1500000000000 7
if time_to_checkpoint; then exit 1; fi
checkpoint_completed
"""
C = """
#include "vmjob_job.h"
int main(void) {
    vmjob_fraction_done(0.25);
    vmjob_ops_cumulative(1.5e12, 7);
    if (vmjob_time_to_checkpoint()) return 1;
    vmjob_checkpoint_completed();
    return 0;
}
"""


def commands(language: str, directory: Path) -> list[list[str]]:
    if language == "python":
        return [[sys.executable, "-c", PYTHON]]
    if language == "shell":
        return [["sh", "-c", SHELL]]
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    (directory / "job.c").write_text(C)
    return [["cc", "-std=c90", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-o",
             str(directory / "job"), str(directory / "job.c")], [str(directory / "job")]]


@pytest.mark.parametrize("language", ["python", "shell", "c"])
@pytest.mark.parametrize("inside", [True, False])
def test_every_language_says_the_same_words(language: str, inside: bool, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    heard.write_text("")
    env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    if inside:
        env["VMJOB_TO_HOST"] = str(heard)
    for command in commands(language, tmp_path):
        subprocess.run(command, cwd=SOURCES, env=env, check=True, timeout=60)
    assert heard.read_text().splitlines() == (SAID if inside else [])


def test_nobody_listening_is_no_reason_to_fail(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "VMJOB_TO_HOST": str(tmp_path / "no" / "pipe"),
           "PYTHONDONTWRITEBYTECODE": "1"}
    for command in commands("python", tmp_path):
        subprocess.run(command, cwd=SOURCES, env=env, check=True, timeout=60)


def test_vboxmonitor_copies_its_input_to_its_output_and_to_the_host(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    done = subprocess.run(["sh", SOURCES / "vboxmonitor"], input=b"one\ntwo\n",
                          capture_output=True, check=True, timeout=60,
                          env={"PATH": os.environ["PATH"], "VMJOB_TO_HOST": str(heard)})
    assert done.stdout == heard.read_bytes() == b"one\ntwo\n"


def test_every_file_of_it_is_in_the_images() -> None:
    assert set(job_library()) == set(LIBRARY) == {
        path.name for path in SOURCES.iterdir() if path.is_file()}
