"""The channels in a file by the client's own functions: ``["put", CHANNEL, TEXT]`` or ``["get",
CHANNEL]`` on a line of stdin, the answer on one of stdout, in JSON.

A process of its own, because the library is compiled with -ffast-math: as soon as it is loaded, the
whole process computes differently.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from pathlib import Path

LENGTH, SIZE = 8192, 1024

with Path(sys.argv[1]).open("r+b") as file:
    memory = mmap.mmap(file.fileno(), LENGTH)
start = ctypes.addressof((ctypes.c_char * LENGTH).from_buffer(memory))
library = ctypes.CDLL("libboinc.so.7")
take, leave = library._ZN11MSG_CHANNEL7get_msgEPc, library._ZN11MSG_CHANNEL8send_msgEPKc
for call in (take, leave):
    call.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    call.restype = ctypes.c_bool

for line in sys.stdin:
    what, channel, *text = json.loads(line)
    place = start + channel * SIZE
    if what == "put":
        answer: object = leave(place, text[0].encode())
    else:
        found = ctypes.create_string_buffer(SIZE)
        answer = found.value.decode() if take(place, found) else None
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
