"""The job of the throttle: tells every tenth of a second what its clocks and timers say.

A line: its number, a hash that hangs on all before, seconds since the start (monotonic), seconds
that a sleep of a tenth took, alarms so far, the time of day. Messages to the host are numbered.
"""

# ruff: noqa: T201, PTH123 - it is a job's, not ours
import hashlib
import itertools
import os
import signal
import time

SLEEP = 0.1
ALARM = 0.25
HASHES = 200
EACH = 20


def following(state):
    """The hash after a hash."""
    for _ in range(HASHES):
        state = hashlib.sha256(state).digest()
    return state


def main():
    alarms = 0

    def alarm(number, frame):
        nonlocal alarms
        alarms += 1

    signal.signal(signal.SIGALRM, alarm)
    began, state = time.monotonic(), b"begin"
    signal.setitimer(signal.ITIMER_REAL, ALARM, ALARM)
    for number in itertools.count():
        before = time.monotonic()
        time.sleep(SLEEP)
        slept = time.monotonic() - before
        state = following(state)
        print(number, state.hex(), f"{time.monotonic() - began:.4f} {slept:.4f}", alarms,
              f"{time.time():.4f}", flush=True)
        if number % EACH == 0:
            with open(os.environ["VMJOB_TO_HOST"], "a") as host:
                host.write(f"tick {number}\n")


if __name__ == "__main__":
    main()
