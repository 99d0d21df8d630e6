"""The job of the e2e tests: a chain of hashes that hangs on all that it had in memory and on disk.

Each round depends on every one before it, and its line stands in `answer` and on stdout. So a round
that is lost, done twice, or done with another's memory or disk changes every line after it. The
length is the only input; a round takes little processor time, so many such jobs fit beside each
other. At the end `clock` tells what the time is in here.
"""

# ruff: noqa: T201, PTH123 - it is a job's, not ours
import hashlib
import os
import time

HASHES = 3000
HELD = 1 << 20
PAUSE = float(os.environ.get("PAUSE", "0.06"))

with open("rounds") as given:
    rounds = int(given.read())
held = bytearray(HELD)
state = b"begin"
with open("chain", "w+b") as chain, open("answer", "w") as answer:
    for number in range(rounds):
        for _ in range(HASHES):
            state = hashlib.sha256(state).digest()
        at = int.from_bytes(state[:4], "big") % (HELD - len(state))
        state = hashlib.sha256(state + held[at:at + 1000]).digest()
        held[at:at + len(state)] = state
        chain.write(state)
        chain.seek(int.from_bytes(state[4:8], "big") % (number + 1) * len(state))
        state = hashlib.sha256(state + chain.read(len(state))).digest()
        chain.seek(0, 2)
        print(number, state.hex(), file=answer, flush=True)
        print(number, state.hex(), flush=True)
        time.sleep(PAUSE)
with open("clock", "w") as clock:
    print(time.time(), file=clock)
