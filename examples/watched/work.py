"""Takes memory, a MiB at a time, and gives it back."""

import sys
import time

taken = []
for _ in range(int(sys.argv[1])):
    taken.append(bytearray(1 << 20))
    time.sleep(0.02)
print(f"had {len(taken)} MiB")
