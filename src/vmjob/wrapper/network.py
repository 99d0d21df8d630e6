"""How much a job may send and receive, on average, by the volunteer's preferences.

QEMU's user-mode network has no limits of its own, VirtualBox's one way only, and one inside the
guest would be the guest's to lift. So what passes is counted outside, and the cable is pulled while
the job is ahead of its allowance: TCP waits and sends again, as over any bad line. In short the
line is as fast as ever; on average it is as slow as it has to be.
"""

from __future__ import annotations

from vmjob.grid.boinc.initdata import GlobalPreferences

__all__ = ["PERIOD", "Allowance", "Gate"]

#: Seconds between two looks. At 50 MB/s, which is about what TCG can do, 2.5 MB pass meanwhile.
PERIOD = 0.05
#: Seconds of the allowance that may be used in advance: less would pull the cable for each page.
BURST = 2.0


class Allowance:
    """Bytes one way; ``rate`` in bytes per second, 0 for no limit."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._ahead = 0.0
        self._seen: tuple[int, float] | None = None
        self._open = True

    def allows(self, total: int, now: float) -> bool:
        """Whether more may pass, after ``total`` bytes at the time ``now`` (seconds).

        Once too much has passed, nothing may until all of it is made up for.
        """
        if self._seen is not None and self.rate > 0:
            before, then = self._seen
            # A machine that was started anew counts from 0.
            passed = total - before if total >= before else total
            self._ahead = max(0.0, self._ahead - self.rate * max(0.0, now - then)) + passed
            self._open = self._ahead <= (self.rate * BURST if self._open else 0.0)
        self._seen = (total, now)
        return self._open or self.rate <= 0


class Gate:
    """Both ways of one job's cable."""

    def __init__(self, preferences: GlobalPreferences | None) -> None:
        self._up = Allowance(preferences.max_bytes_sec_up if preferences else 0.0)
        self._down = Allowance(preferences.max_bytes_sec_down if preferences else 0.0)

    @property
    def limited(self) -> bool:
        """Whether there is anything to watch."""
        return self._up.rate > 0 or self._down.rate > 0

    def allows(self, sent: int, received: int, now: float) -> bool:
        """Whether the cable may be plugged in."""
        up, down = self._up.allows(sent, now), self._down.allows(received, now)
        return up and down
