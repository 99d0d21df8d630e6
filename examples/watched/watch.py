"""Appends seconds and free memory (kB) to a file, twice a second, until it is ended."""

import sys
import time


def available():
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1])
    return 0


begin = time.monotonic()
with open(sys.argv[1], "w", buffering=1) as out:
    print("seconds,available", file=out)
    while True:
        print(f"{time.monotonic() - begin:.1f},{available()}", file=out)
        time.sleep(0.5)
