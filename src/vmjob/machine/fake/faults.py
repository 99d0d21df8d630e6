"""What can go wrong in a fake machine, as data (`impostor` does it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Faults"]


@dataclass(frozen=True)
class Faults:
    """What is to go wrong in a fake machine.

    ``start``, ``freeze``: these calls fail with this text. ``version``: of the hypervisor.
    ``says``: instead of the agent, something that says
    these bytes (at most 64 KiB, the socket's buffer takes them), unasked, and then is silent; with
    b"" the agent never answers. ``answers``: something that resynchronises properly and then
    answers each request with these bytes. ``endless_head``: the same, with a header that has no
    end. ``protocol``: the agent speaks this version of the protocol and no other. ``dies_after``:
    the agent ends when it is asked on the control lane once more than so often. ``result``:
    replaces parts of each command's result (`TaskEnd`), as a guest does that lies. ``endless``: no
    command ever ends by the agent's word. ``console``: the console's text.
    """

    start: str | None = None
    freeze: str | None = None
    version: str | None = None
    says: bytes | None = None
    answers: bytes | None = None
    endless_head: bool = False
    protocol: int | None = None
    dies_after: int | None = None
    result: Mapping[str, Any] | None = None
    endless: bool = False
    console: str = ""

    @property
    def needs_impostor(self) -> bool:
        """Whether the machine's agent is not simply the real one."""
        return self != Faults(start=self.start, freeze=self.freeze, version=self.version,
                              console=self.console)

    def encoded(self) -> str:
        """The form in which the impostor takes it, on its command line."""
        data = {key: value.hex() if isinstance(value, bytes) else value
                for key, value in asdict(self).items()}
        return json.dumps(data)

    @classmethod
    def decoded(cls, text: str) -> Faults:
        """The reverse of `encoded`."""
        data = json.loads(text)
        for key in ("says", "answers"):
            data[key] = None if data[key] is None else bytes.fromhex(data[key])
        return cls(**data)
