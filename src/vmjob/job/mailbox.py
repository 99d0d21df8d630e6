"""What a floppy disk tells a guest: BOINC's ``init_data.xml``, or six lines of it for CERN's."""

from __future__ import annotations

import math

from vmjob.job.markup import parse
from vmjob.job.model import MAILBOX_HALF
from vmjob.job.secrets import redacted

__all__ = ["mailbox"]

_CONTAINERS = frozenset({"host_info", "proxy_info", "global_preferences", "project_preferences"})
#: Key of CERN's guests -> element of init_data.xml, and whether it is a number with a point.
_CERN = (("BOINC_USERNAME", "user_name", False), ("BOINC_AUTHENTICATOR", "", False),
         ("BOINC_USERID", "userid", False), ("BOINC_HOSTID", "hostid", False),
         ("BOINC_USER_TOTAL_CREDIT", "user_total_credit", True),
         ("BOINC_HOST_TOTAL_CREDIT", "host_total_credit", True))


def mailbox(init_data: str, *, cern: bool = False) -> bytes:
    """What the host's half of the disk holds, at most `MAILBOX_HALF` - 1 bytes, without the zero.

    ``cern``: six lines KEY=value. The authenticator is left empty in either form: a job that gives
    it to a machine gives the volunteer's account away.
    """
    text = _cern(init_data) if cern else redacted(init_data)
    return text.encode("utf-8", "replace")[:MAILBOX_HALF - 1]


def _cern(init_data: str) -> str:
    roots = parse(init_data.encode("utf-8", "replace"), _CONTAINERS).roots
    known = {child.name: child.text for root in roots for child in root.children}
    lines = []
    for key, name, is_real in _CERN:
        value = known.get(name, "")
        value = _real(value) if is_real else "".join(c for c in value if c.isprintable())
        lines.append(f"{key}={value}\n")
    return "".join(lines)


def _real(text: str) -> str:
    """As C's ``%.17g`` prints it; what is no number is 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    return f"{value if math.isfinite(value) else 0.0:.17g}"
