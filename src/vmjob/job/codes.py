"""Every word that a finding can have for its ``code``, and what it means.

Stable: scripts may compare them. The table in ``docs/reference/job-check.md`` is made from this.
"""

from __future__ import annotations

__all__ = ["CODES"]

CODES = {
    # how a file is written
    "too-large": "The file is larger than 1 MiB.",
    "too-many": "More elements, or more that is odd, than any job file has.",
    "too-deep": "Elements in elements, more than 32 deep.",
    "not-text": "The file holds a zero byte.",
    "not-utf8": "The file is not UTF-8; it was read as ISO 8859-1.",
    "cut-off": "The file ends within a tag or a comment.",
    "document-type": "A document type or an entity is declared; these are not read.",
    "name-too-long": "A tag's name is longer than any that is known.",
    "end-missing": "An element has no end; of the outermost one, this is an error.",
    "slash-missing": "A tag that seems to be an end lacks its slash.",
    "end-without-begin": "An end tag ends nothing.",
    "stray-text": "Text stands between tags, where nobody reads it.",
    "bare-angle": "A '<' begins no tag.",
    "blank-in-tag": "Blanks stand before a tag's name; BOINC's programs would not know it.",
    "attribute": "A tag has attributes, which are not read.",
    "unknown-entity": "None of the five of XML, nor the number of a character.",
    "no-job": "The file is none of the kinds that can be read.",
    "no-root": "The outermost element of this kind of file is missing.",
    "second-root": "More than one outermost element; the first that fits counts.",
    # what an element holds
    "not-a-flag": "A flag holds neither nothing nor a whole number, so it is not set.",
    "not-a-number": "A number has something before or after it, or is none.",
    "not-a-text": "An element holds others where a text is wanted.",
    "out-of-range": "A number is too small or too large.",
    "empty": "An element is empty where a value is wanted.",
    "placeholder": "A template's placeholder, which nobody filled in.",
    "bad-path": "A name leads out of its folder, is absolute, or has control characters.",
    "unknown-element": "No element of this name is known; it sets nothing.",
    "unknown-value": "None of the words that are known here.",
    "outdated": "An element of older releases, which is no longer read.",
    "twice": "An element that counts once is there more than once; the last one counts.",
    "incomplete": "A block lacks an element that it needs.",
    # what does not go together
    "contradiction": "Two elements exclude each other.",
    "needs-shared": "A file of a shared folder is named, or needed, and none is shared.",
    "no-effect": "An element does nothing without, or beside, another.",
    "port-twice": "Two forwards want one port of this computer.",
    # what is done in another way, or worth a thought
    "remote-port": "A port is for other computers as well: only if this one's user allows it.",
    "port-taken": "A port of this computer is wished for; when it is taken, another one is used.",
    "bridged": "NAT is used in place of bridged networking.",
    "remote-desktop": "The screen is shown by VNC, on this computer, with a password.",
    "cern-output": "The file `output` is not written when the duration is over.",
    "rare-checkpoints": "Checkpoints more than a day apart.",
    "memory-missing": "The file does not say how much memory the job needs.",
    "memory-raised": "Less memory than the least of this kind of job.",
    "memory-here": "More memory than this computer has.",
    "not-needed": "An element that has no meaning on QEMU.",
    "no-disk-image": "A disk image that the file speaks of is not there.",
    "redacted": "The account's key and the proxy's password are kept from the machine.",
    "mailbox-full": "The floppy disk's buffer is too small for all of init_data.xml.",
}
