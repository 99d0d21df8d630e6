"""Processes that die with their owner, however it dies."""

from __future__ import annotations

__all__ = ["guarded"]

#: The parent's death is signalled only from now on; if it has died already, our parent is another.
_GUARD = '[ "$PPID" = "$0" ] && exec "$@"'


def guarded(argv: list[str], owner: int, *, drop_capabilities: bool) -> list[str]:
    """A command that is killed when the thread of its owner (a process id) that starts it ends.

    It becomes the program without a process in between. Linux only (setpriv of util-linux). With
    ``drop_capabilities`` (for root) it has none of root's rights but the ownership of files.
    """
    dropped = ["--bounding-set=-all", "--inh-caps=-all"] if drop_capabilities else []
    return ["setpriv", "--pdeathsig", "KILL", "--no-new-privs", *dropped, "--",
            "/bin/sh", "-c", _GUARD, str(owner), *argv]
