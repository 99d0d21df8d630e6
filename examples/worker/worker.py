#!/usr/bin/env python3
"""A worker: uses the given number of CPU seconds, and says how far it is.

It reads stdin and the file ``in``, writes stdout and the file ``out``.
"""

import os
import sys
import time


def report(fraction):
    """Tell whoever runs this job how much of it is done."""
    path = os.environ.get("VMJOB_TO_HOST")
    if path:
        with open(path, "w") as host:
            host.write(f"fraction_done {fraction:.3f}\n")


def main():
    seconds = float(sys.argv[1])
    text = sys.stdin.read()
    with open("in") as file:
        data = file.read()
    print(f"worker: {len(text)} bytes on stdin, {len(data)} bytes in the file", flush=True)

    state, rounds, told = 1, 0, -1
    while (used := time.process_time()) < seconds:
        for _ in range(20000):
            state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        rounds += 1
        if int(used * 4) > told:
            told = int(used * 4)
            report(used / seconds)
    report(1.0)

    with open("out", "w") as file:
        file.write(data.upper())
        file.write(text.upper())
    print(f"worker: used {seconds:g} CPU seconds", flush=True)


main()
