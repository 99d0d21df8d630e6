"""A job as long as one likes, whose every line hangs on all that it had in memory and on disk."""

# ruff: noqa: T201, PTH123 - it is a job's, not ours
import hashlib
import sys

HASHES = 20_000
HELD = 4 << 20

held = bytearray(HELD)
state = b"begin"
with open("chain", "w+b") as chain:
    for number in range(int(sys.argv[1])):
        for _ in range(HASHES):
            state = hashlib.sha256(state).digest()
        at = int.from_bytes(state[:4], "big") % (HELD - len(state))
        state = hashlib.sha256(state + held[at:at + 1000]).digest()
        held[at:at + len(state)] = state
        chain.write(state)
        chain.seek(int.from_bytes(state[4:8], "big") % (number + 1) * len(state))
        state = hashlib.sha256(state + chain.read(len(state))).digest()
        chain.seek(0, 2)
        print(number, state.hex(), flush=True)
