"""Reading what the client sends to the scheduler.

Tags are found one after another, as BOINC's own server finds them; the request is bounded, and what
is inside CDATA (a job's own output) is never taken for a tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmjob.project.devserver.records import Reported, Trickle

__all__ = ["MAX_BYTES", "HeldVersion", "Request", "parse"]

#: A request has 30 KB and at most 64 KB of stderr for each result.
MAX_BYTES = 16 << 20
#: Results, or trickles, of one request.
MAX_ITEMS = 1000
MAX_VALUE = 4096
MAX_TRICKLE = 64 << 10
_CDATA, _CDATA_END = "<![CDATA[", "]]>"


@dataclass(frozen=True)
class HeldVersion:
    """An app version that an anonymous platform has."""

    app: str
    version_num: int
    platform: str
    plan_class: str


@dataclass(frozen=True)
class Request:
    """``wanted``: seconds of work that the client asks for. ``held``: names of results it has."""

    authenticator: str
    host_id: int
    sequence: int
    wanted: float
    platforms: tuple[str, ...]
    has_key: bool
    held: frozenset[str]
    results: tuple[Reported, ...]
    trickles: tuple[Trickle, ...]
    versions: tuple[HeldVersion, ...]
    client: str

    @property
    def anonymous(self) -> bool:
        """Whether the client brings its own app versions and takes none."""
        return "anonymous" in self.platforms


class _Text:
    """A part of the request: ``marks`` has blanks where ``whole`` has CDATA."""

    def __init__(self, whole: str, marks: str) -> None:
        self.whole, self.marks = whole, marks

    def inside(self, name: str) -> Iterator[_Text]:
        """What stands between each ``<name>`` and the ``</name>`` after it."""
        begin, end = f"<{name}>", f"</{name}>"
        at = 0
        for _ in range(MAX_ITEMS):
            start = self.marks.find(begin, at)
            if start < 0:
                return
            start += len(begin)
            at = self.marks.find(end, start)
            if at < 0:
                return
            yield _Text(self.whole[start:at], self.marks[start:at])

    def value(self, name: str) -> str:
        """The first element of this name; '' where there is none."""
        found = next(self.inside(name), None)
        return found.whole.strip()[:MAX_VALUE] if found else ""

    def number(self, name: str) -> float:
        try:
            found = float(self.value(name))
        except ValueError:
            return 0.0
        return found if abs(found) < 1e30 else 0.0

    def after(self, head: _Text) -> _Text:
        """What follows a part that this begins with."""
        at = len(head.whole)
        return _Text(self.whole[at:], self.marks[at:])

    def before(self, name: str) -> _Text:
        at = self.marks.find(f"<{name}>")
        return self if at < 0 else _Text(self.whole[:at], self.marks[:at])


def parse(data: bytes) -> Request:
    """Read a request; what is missing is empty, and nothing is refused."""
    whole = data[:MAX_BYTES].decode("utf-8", "replace")
    text = _Text(whole, _without_cdata(whole))
    # Results stand first, then trickles, then what the client has. A trickle is a job's own words,
    # without CDATA: nothing of it may be taken for a result, or hide what comes after it.
    head = text.before("app_versions").before("msg_from_host")
    tail = _Text(after := whole[whole.rfind("</msg_from_host>") + 1:], after)
    others = frozenset(each.value("name") for each in tail.inside("other_result"))
    versions = tuple(
        HeldVersion(each.value("app_name"), int(each.number("version_num")),
                    each.value("platform"), each.value("plan_class"))
        for block in tail.inside("app_versions") for each in block.inside("app_version"))
    client = ".".join(str(int(text.number(f"core_client_{part}")))
                      for part in ("major_version", "minor_version", "release"))
    return Request(
        authenticator=head.value("authenticator"), host_id=int(head.number("hostid")),
        sequence=int(head.number("rpc_seqno")), wanted=head.number("work_req_seconds"),
        platforms=(head.value("platform_name"),
                   *(each.value("name") for each in head.inside("alt_platform"))),
        has_key=bool(head.value("code_sign_key")), held=others,
        results=tuple(map(_reported, head.inside("result"))),
        trickles=tuple(map(_trickle, _Text(whole, whole).after(head).inside("msg_from_host"))),
        versions=versions, client=client)


def _reported(text: _Text) -> Reported:
    stderr = next(text.inside("stderr_out"), _Text("", "")).whole.replace(_CDATA, "", 1)
    at = stderr.rfind(_CDATA_END)
    stderr = stderr[:at] if at >= 0 else stderr
    start, end = stderr.find("<stderr_txt>\n"), stderr.rfind("</stderr_txt>")
    # What the client says stands around the job's own words: before them how it ended, after them
    # which files are missing.
    around, written = [stderr], ""
    if start >= 0:
        last = end if end > start else len(stderr)
        written = stderr[start + len("<stderr_txt>\n"):last]
        around = [stderr[:start], stderr[last:]]
    said = [found.whole.strip() for each in around for found in _Text(each, each).inside("message")]
    message = "\n".join(said)
    if start < 0 and not said:
        written = stderr
    return Reported(
        text.value("name"), int(text.number("state")), int(text.number("exit_status")),
        text.number("final_cpu_time"), text.number("final_elapsed_time"), written.strip("\n"),
        message, int(text.number("version_num")), text.value("plan_class"),
        text.number("final_peak_working_set_size"), text.number("final_peak_disk_usage"))


def _trickle(text: _Text) -> Trickle:
    at = text.whole.find("</time>")
    body = text.whole[at + len("</time>"):].strip() if at >= 0 else ""
    variety = next(_Text(body, body).inside("variety"), None)
    rest = body.partition("</variety>")[2].strip() if variety else body
    return Trickle(text.value("result_name"), int(text.number("time")),
                   variety.whole.strip() if variety else "", rest[:MAX_TRICKLE])


def _without_cdata(text: str) -> str:
    parts, at = [], 0
    while (start := text.find(_CDATA, at)) >= 0:
        end = text.find(_CDATA_END, start)
        end = len(text) if end < 0 else end + len(_CDATA_END)
        parts += [text[at:start], " " * (end - start)]
        at = end
    return "".join([*parts, text[at:]])
