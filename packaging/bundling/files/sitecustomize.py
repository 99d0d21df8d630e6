"""Runs at the start of every process of the bundle: says that this version is in use.

The lock ends with the process; nobody removes the version before (settle.py).
"""

import contextlib
import fcntl
import os
import sys

with contextlib.suppress(OSError):  # while it is being unpacked there is no such file
    fcntl.flock(os.open(f"{sys.prefix}/whole", os.O_RDONLY | os.O_CLOEXEC),
                fcntl.LOCK_SH | fcntl.LOCK_NB)
