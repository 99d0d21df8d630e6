"""What of BOINC's ``init_data.xml`` a machine may see: all but what opens the volunteer's account.

The file holds the account's key and the proxy's user and password. Guests read it line by line
(LHC@home's with ``grep '^<user_name>'``), so every tag begins a line.
"""

from __future__ import annotations

import re

__all__ = ["redacted", "redacted_bytes"]


#: Tags whose content is a secret: BOINC's own, and names that cannot mean anything else.
_SECRET = re.compile(
    r"<\s*(/?)\s*(authenticator|weak_auth|account_key|gui_rpc_\w*|opaque|socks5_user_name|"
    r"http_user_name|[\w-]{0,32}passw(?:or)?d[\w-]{0,32})(?:\s[^<>]*)?>", re.IGNORECASE)
_TAGS_ON_ONE_LINE = re.compile(r"(</[^<>]*>|<[^<>]*/>)[ \t]*(?=<[^!?<>])")
#: Shorter values are words that may stand elsewhere for another reason.
_LONG_ENOUGH = 6
#: A real file has at most five; a bound on the work for one that is not.
_MOST_VALUES = 100


def redacted(init_data: str) -> str:
    """``init_data`` without authenticator and passwords, each tag at the beginning of its line.

    The tags stay, empty. A value that is taken out is taken out wherever else it stands. Where a
    tag has no end, all of its line is taken out. A second call changes nothing.
    """
    kept, values = _without_secrets(init_data)
    if values:
        # Not in the names of tags: a password may be called like one.
        known = "|".join(map(re.escape, sorted(values, key=len, reverse=True)[:_MOST_VALUES]))
        kept = re.sub(rf"(<\s*/?\s*[^\s<>]*)|{known}", lambda match: match[1] or "", kept)
    return _TAGS_ON_ONE_LINE.sub(r"\1\n", kept)


def redacted_bytes(content: bytes) -> bytes:
    """The same for a file's content."""
    return redacted(content.decode("utf-8", "replace")).encode()


def _without_secrets(text: str) -> tuple[str, set[str]]:
    """What is left, and the values that were taken out."""
    last_end = {match[2].lower(): match.start() for match in _SECRET.finditer(text) if match[1]}
    kept: list[str] = []
    values: set[str] = set()
    position = 0
    inside: re.Match[str] | None = None  # the tag whose content is being left out
    for match in _SECRET.finditer(text):
        name = match[2].lower()
        if inside is not None:
            if not match[1] or name != inside[2].lower():
                continue
            value = text[inside.end():match.start()].strip()
            value = value.removeprefix("<![CDATA[").removesuffix("]]>")
            if len(value) >= _LONG_ENOUGH and not set("<>") & set(value):
                values.add(value)
            position, inside = match.start(), None
        elif not match[1] and match.start() >= position:
            kept.append(text[position:match.end()])
            position = match.end()
            if last_end.get(name, -1) >= match.end():
                inside = match
            else:
                newline = text.find("\n", match.end())
                position = len(text) if newline < 0 else newline
    kept.append(text[position:])
    return "".join(kept), values
