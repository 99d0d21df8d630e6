"""No secret is left in init_data.xml, and a second redaction changes nothing."""

from __future__ import annotations

import re
import sys

import atheris

with atheris.instrument_imports(include=["vmjob.job"]):
    from vmjob.job.mailbox import mailbox
    from vmjob.job.model import MAILBOX_HALF
    from vmjob.job.secrets import redacted

TOKENS = ["<authenticator>", "</authenticator>", "<http_user_passwd>", "</http_user_passwd>",
          "<authenticator", "</", "<", ">", "/>", "\n", " ", "<a>", "</a>", "<a/>", "SECRET-KEY",
          "<!--", "-->", "<![CDATA[", "]]>", "x", "<user_name>", "</user_name>", "&#10;", "\r", "'"]


def one(data: bytes) -> None:
    text = "".join(TOKENS[byte % len(TOKENS)] for byte in data)
    left = redacted(text)
    assert redacted(left) == left
    for found in re.finditer(r"<(authenticator|http_user_passwd)>([^<\n]*)", left):
        assert not found[2].strip()
    for cern in (False, True):
        assert len(mailbox(text, cern=cern)) < MAILBOX_HALF


atheris.Setup(sys.argv, one)
atheris.Fuzz()
