"""Processes that die with their owner, however it dies."""

from __future__ import annotations

__all__ = ["guarded"]

#: The parent's death is signalled only from now on; if it has died already, our parent is another.
_GUARD = '[ "$PPID" = "$0" ] && exec "$@"'


def guarded(argv: list[str], owner: int, *, drop_capabilities: bool,
            may_gain_privileges: bool = False) -> list[str]:
    """A command that is killed when the thread of its owner (a process id) that starts it ends.

    It becomes the program without a process in between. Linux only (setpriv of util-linux). With
    ``drop_capabilities`` (for root) it has none of root's rights but the ownership of files;
    ``may_gain_privileges`` leaves set-user-id programs their power (newuidmap needs it).
    """
    dropped = ["--bounding-set=-all", "--inh-caps=-all"] if drop_capabilities else []
    fixed = [] if may_gain_privileges else ["--no-new-privs"]
    return ["setpriv", "--pdeathsig", "KILL", *fixed, *dropped, "--",
            "/bin/sh", "-c", _GUARD, str(owner), *argv]
