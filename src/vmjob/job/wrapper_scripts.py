"""What runs in the machine for a ``job.xml``: the wrapper's own work with zips, as small programs.

Each is given to the machine's ``python3 -c`` or ``sh -c`` in the job's directory.
"""

from __future__ import annotations

import re

__all__ = ["LIST", "LOCAL_FIRST", "UNZIP", "ZIP", "python_pattern"]

#: The names that were there at first, between the first task and the last.
BEFORE = ".vmjob-files-before"

#: The program of that name in the job's directory, or else of the machine.
LOCAL_FIRST = 'if [ -e "./$0" ]; then exec "./$0" "$@"; else exec "$0" "$@"; fi'

#: Unpacks a zip and removes it, if it is there, as BOINC's wrapper does. Modes are those of the
#: zip: zipfile does not set them, and there may be programs in it.
UNZIP = """\
import os, sys, zipfile
name = sys.argv[1]
if os.path.exists(name):
    with zipfile.ZipFile(name) as packed:
        for item in packed.infolist():
            path = packed.extract(item)
            mode = item.external_attr >> 16 & 0o777
            if mode and not item.is_dir():
                os.chmod(path, mode)
    os.remove(name)
"""

#: Keeps the names that are there now.
LIST = f"""\
import json, os
names = os.listdir(".")
with open({BEFORE!r}, "w") as file:
    json.dump(names, file)
"""

#: Packs what is new and matches one of the patterns, unless the zip is there already.
ZIP = f"""\
import json, os, re, sys, zipfile
name, *patterns = sys.argv[1:]
with open({BEFORE!r}) as file:
    before = {{*json.load(file), {BEFORE!r}, "temp.zip"}}
os.remove({BEFORE!r})
if not os.path.exists(name):
    found = [each for each in sorted(os.listdir(".")) if each not in before
             and any(re.search(pattern, each) for pattern in patterns)]
    with zipfile.ZipFile("temp.zip", "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as packed:
        for top in found:
            packed.write(top)
            for directory, below, files in os.walk(top):
                for each in sorted(below + files):
                    packed.write(os.path.join(directory, each))
    os.rename("temp.zip", name)
"""

_PIECE = re.compile(r"\\(.)|\[(\^?)(\]?[^]]*)\]|([{}])", re.DOTALL)


def python_pattern(pattern: str) -> str:
    r"""A regular expression of BOINC's wrapper as Python writes it.

    The wrapper's library (Henry Spencer's) finds a match anywhere in a name, so the pattern for
    ``out`` packs ``routes.txt`` too; ``^`` and ``$`` bind it. ``{`` and ``\d`` mean themselves.
    """

    def piece(match: re.Match[str]) -> str:
        escaped, negated, letters, brace = match.groups()
        if escaped is not None:
            return re.escape(escaped)
        if brace is not None:
            return "\\" + brace
        return f"[{negated}{re.sub(r'([^A-Za-z0-9-])', _escape, letters)}]"

    return _PIECE.sub(piece, pattern)


def _escape(match: re.Match[str]) -> str:
    return re.escape(match[1])
