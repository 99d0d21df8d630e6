"""The end of unpacking, by the Python that was just unpacked: so it is known to run here.

    settle.py FILE SKIP SHA256 DRAFT TARGET

Checks FILE behind its first SKIP bytes, makes DRAFT safe from a power cut, and gives it the name
TARGET. Another process may be faster; then its directory is used. Then removes what other versions
left and nobody uses.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time

#: Exit code for a file that is not what was built.
DAMAGED = 3
#: Seconds after which a directory that is being unpacked is left over, whatever process has its
#: number now.
UNPACKING = 3600


def main(file: str, skip: str, sha256: str, draft: str, target: str) -> int:
    with open(file, "rb") as content:
        content.seek(int(skip))
        if hashlib.file_digest(content, "sha256").hexdigest() != sha256:
            return DAMAGED
    for name in (".good", ".said"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(draft, name))
    for directory, _, files in os.walk(draft, topdown=False):
        for name in files:
            sync(os.path.join(directory, name))
        sync(directory)
    with open(os.path.join(draft, "whole"), "x") as marker:
        os.fsync(marker.fileno())
    sync(draft)
    try:
        os.rename(draft, target)
    except OSError:  # it is there, and not empty
        shutil.rmtree(draft, ignore_errors=True)
        return 0 if os.path.exists(os.path.join(target, "whole")) else 1
    below = os.path.dirname(target)
    sync(below)
    sweep(below, os.path.basename(target))
    return 0


def sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(below: str, keep: str) -> None:
    """Remove other versions that no process uses, and drafts of processes that were killed."""
    for name in os.listdir(below):
        path = os.path.join(below, name)
        if name.startswith(".wrapper-") and abandoned(path, name.rpartition(".")[2]):
            shutil.rmtree(path, ignore_errors=True)
        elif name.startswith("wrapper-") and name != keep:
            with contextlib.suppress(OSError), open(os.path.join(path, "whole")) as marker:
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)  # see sitecustomize.py
                gone = os.path.join(below, f".{name}.0")
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)


def abandoned(path: str, owner: str) -> bool:
    try:
        age = time.time() - os.stat(path).st_mtime
    except OSError:
        return False
    return age > UNPACKING or not os.path.exists(f"/proc/{owner}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
