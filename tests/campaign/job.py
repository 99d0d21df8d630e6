"""The job of the kills: a chain of hashes that hangs on all that it had in memory and on its disk.

Every round reads a line of input, changes a page of memory and a page of a file, and prints a line
that depends on what it found there. A page, a byte of input or a line that is lost or comes twice
changes every line after it.
"""

# ruff: noqa: T201, PTH123 - it is a job's, not ours
import hashlib
import sys

ROUNDS = 40
HASHES = int(sys.argv[1])
PAGE = 4096
PAGES = 256

memory = bytearray(PAGE * PAGES)
state = b"begin"
with open("chain", "w+b") as chain:
    chain.truncate(PAGE * PAGES)
    for number in range(ROUNDS):
        state = hashlib.sha256(state + sys.stdin.buffer.readline()).digest()
        for _ in range(HASHES):
            state = hashlib.sha256(state).digest()
        at = int.from_bytes(state[:2], "big") % PAGES * PAGE
        other = int.from_bytes(state[2:4], "big") % PAGES * PAGE
        memory[at:at + PAGE] = state * (PAGE // len(state))
        chain.seek(at)
        chain.write(bytes(memory[other:other + PAGE]))
        chain.seek(other)
        state = hashlib.sha256(state + chain.read(PAGE) + memory[other:other + PAGE]).digest()
        print(number, state.hex(), flush=True)
    print("half-way is over", file=sys.stderr, flush=True)
    chain.seek(0)
    with open("result", "wb") as result:
        result.write(hashlib.sha256(memory).digest() + chain.read() + sys.stdin.buffer.read())
