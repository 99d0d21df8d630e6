"""Any file is a job or has an error, whichever language it is taken for."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vmjob.job"]):
    from vmjob.errors import InputMissing, InputUnreadable
    from vmjob.job.codes import CODES
    from vmjob.job.languages import read_bytes
    from vmjob.job.reading import Level, Surroundings
    from vmjob.job.vbox_elements import FORWARD, KNOWN, OUTDATED

NOWHERE = Surroundings(Path("/nonexistent/slots/0"), Path("/nonexistent/projects/x"))

_NAMES = [
    *sorted(KNOWN | FORWARD | OUTDATED.keys()), "job_desc", "task", "application",
    "command_line", "weight", "setenv", "daemon", "time_limit", "unzip_input", "zip_output",
    "zipfilename", "filename", "virtualmachine", "unzip_task", "VMmanage_task", "copy_file_to_VM",
    "checkpoint_filename", "stdin_filename", "exec_dir"]
#: What a byte stands for in a file that looks like one.
TOKENS = [*(f"<{name}>" for name in _NAMES), *(f"</{name}>" for name in _NAMES), "<vbox_job>",
          "</vbox_job>", "<", ">", "/", "/>", "<!--", "-->", "<![CDATA[", "]]>", "&lt;", "&#9;",
          "&", "\n", " ", "1", "0", "-", ".", "e9", "{x}", "a", "../", "$PROJECT_DIR", "$NTHREADS",
          "boinc_resolve(", ")", '"', "'", "\\", "=", "*", "é", "\x1b"]
assert len(TOKENS) <= 256


def one(data: bytes) -> None:
    """The first byte says what the others are: bytes of XML, of TOML, or tokens."""
    if not data:
        return
    kind, rest = data[0] % 3, data[1:]
    if kind == 2:
        rest = "".join(TOKENS[byte % len(TOKENS)] for byte in rest).encode()
    reading = read_bytes(rest, NOWHERE, is_toml=kind == 1)
    assert (reading.job is None) == any(each.level is Level.ERROR for each in reading.findings)
    assert all(each.code in CODES for each in reading.findings)
    assert all(each.what.isprintable() and each.instead.isprintable() for each in reading.findings)
    if reading.job is not None:
        try:
            reading.job.check()
        except (InputMissing, InputUnreadable):
            pass  # which files are there is not the reader's to know


atheris.Setup(sys.argv, one)
atheris.Fuzz()
