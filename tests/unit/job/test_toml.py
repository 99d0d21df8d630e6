"""Job files in TOML: what they mean, what is said of a wrong one; written and read, one job."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.job.strategies import HERE, jobs
from vmjob.errors import UsageError
from vmjob.job.files import Folder, Input, Output
from vmjob.job.model import Forward, Hardware, Job, Network, OnFlood, Task, Triggers
from vmjob.job.reading import Finding, Level, Surroundings
from vmjob.job.toml import dump, read
from vmjob.job.toml.keys import FOLDER, FORWARD, HARDWARE, JOB, TASK, TRIGGERS, Table
from vmjob.job.toml.lines import KeyPath, lines_of
from vmjob.job.toml.schema import schema
from vmjob.job.toml.values import MAX_FINDINGS

ROOT = Path(__file__).parents[3]
SCHEMA = ROOT / "docs" / "reference" / "job.schema.json"
PAGE = ROOT / "docs" / "reference" / "job-toml.md"
WHERE = Surroundings(HERE)

EVERYTHING = """\
image = "science"
memory_mb = 1024
cpus = 2
disk_gb = 20
network = "nat"
cpu = "baseline"
time_limit = "2 h"
duration = "1.5 h"
checkpoint_every = "10 min"
output_limit = "2 GiB"
stream_limit = 1000
on_flood = "stop"
inputs = ["data.csv", "src:dst/", { source = "a:b", destination = "/etc/c" }]
outputs = ["result", "sub/out:kept/", { source = "x:y" }]
packages = ["tool.deb"]

[triggers]
completion = "done"
heartbeat = "beat"
heartbeat_interval = 60
trickles = ["t"]

[hardware]
disk = "own.qcow2"
mailbox = "hello"

[[folder]]
name = "shared"
source = "shared"
live = false
texts = { note = "from outside" }

[[forward]]
guest_port = 80
web = true

[[task]]
run = "first 'one word' two"
env = { THREADS = 2, NAME = "x" }
weight = 0

[[task]]
run = ["second", 5]
name = "the second"
cwd = "sub"
user = "root"
stdin = "in"
stdout = "out"
stderr = "err"
fraction_file = "fraction"
checkpoint_file = "state"
time_limit = 1.5
may_fail = true
cpu_seconds = 9
memory_bytes = "256 MiB"
file_bytes = 10
processes = 3

[[task]]
run = "helper"
daemon = true
"""


def reading(text: str) -> tuple[Job | None, list[Finding]]:
    found = read(text.encode(), WHERE)
    assert found.language == "toml"
    assert (found.job is None) == any(one.level is Level.ERROR for one in found.findings)
    return found.job, list(found.findings)


def job(text: str) -> Job:
    found, findings = reading(text)
    assert found is not None, findings
    return found


def only(text: str) -> Finding:
    _, (finding,) = reading(text)
    return finding


def test_every_field_of_a_job_can_be_written() -> None:
    assert job(EVERYTHING) == Job(
        tasks=(Task(("first", "one word", "two"), env={"THREADS": "2", "NAME": "x"}, weight=0),
               Task(("second", "5"), name="the second", cwd="sub", user="root", stdin="in",
                    stdout="out", stderr="err", fraction_file="fraction", checkpoint_file="state",
                    time_limit=1.5, may_fail=True, cpu_seconds=9, memory_bytes=256 << 20,
                    file_bytes=10, processes=3),
               Task(("helper",), daemon=True)),
        image="science", memory_mb=1024, cpus=2, disk_gb=20, network=Network.NAT, cpu="baseline",
        time_limit=7200, duration=5400, checkpoint_every=600, output_limit=2 << 30,
        stream_limit=1000, on_flood=OnFlood.STOP,
        inputs=(Input(HERE / "data.csv", "data.csv"), Input(HERE / "src", "dst/src"),
                Input(HERE / "a:b", "/etc/c")),
        outputs=(Output("result", HERE / "result"), Output("sub/out", HERE / "kept/out"),
                 Output("x:y", HERE / "x:y")),
        packages=(HERE / "tool.deb",),
        triggers=Triggers(completion="done", heartbeat="beat", heartbeat_interval=60,
                          trickles=("t",)),
        hardware=Hardware(disk=HERE / "own.qcow2", mailbox=b"hello"),
        folders=(Folder("shared", HERE / "shared", "shared", live=False,
                        texts={"note": "from outside"}),),
        forwards=(Forward(80, web=True),))


def test_one_command_needs_no_table() -> None:
    assert job('run = "true"') == Job(tasks=(Task(("true",)),))
    own = job('[hardware]\ndisk = "x"')
    assert own == Job(tasks=(), hardware=Hardware(disk=HERE / "x"))
    assert job(dump(own, WHERE)) == own
    assert only('run = "true"\n[[task]]\nrun = "false"').code == "two-commands"


@pytest.mark.parametrize("table", [JOB, TASK, FOLDER, TRIGGERS, FORWARD, HARDWARE],
                         ids=lambda table: table.title or "job")
def test_every_field_has_a_key(table: Table) -> None:
    targets = {key.target for key in table.keys} - {"run", "mailbox_base64"}
    assert targets == {each.name for each in dataclasses.fields(table.record)}


@given(jobs)
def test_a_job_that_was_written_reads_as_the_same_job(one: Job) -> None:
    text = dump(one, WHERE)
    found = read(text.encode(), WHERE)
    assert found.job == one, (text, found.findings)


@pytest.mark.parametrize("text", ['\n"', '\n""', '"""\n""""', '\\\n\\', "\r\n", "\x7f\n\0",
                                  "é\u2028\n", "", "\n", ' \n\t"\\"', "a\n" + 3 * "'"])
def test_no_text_is_too_odd_to_be_written(text: str) -> None:
    one = Job(tasks=(Task(("a", text.replace("\0", ""))),),
              folders=(Folder("f", HERE, "f", texts={text: text}),))
    assert read(dump(one, WHERE).encode(), WHERE).job == one


def test_what_was_written_is_pleasant_to_read() -> None:
    shown = dump(dataclasses.replace(job(EVERYTHING), hardware=Hardware()), WHERE)
    assert shown.startswith('image = "science"\nmemory_mb = 1024\n')
    assert 'inputs = ["data.csv", "src:dst/src", { source = "a:b", destination = ' in shown
    assert 'outputs = ["result", "sub/out:kept/out", { source = "x:y", ' in shown
    assert '[[folder]]\nname = "shared"\nsource = "shared"\nlive = false\n' in shown
    assert 'run = ["second", "5"]' in shown
    assert 'output_limit = "2 GiB"' in shown
    assert dump(Job(tasks=(Task(("true",)),)), WHERE) == 'run = ["true"]\n'
    lines = Folder("f", HERE, "f", texts={"a": 'one\n"two"\n'})
    assert 'texts = { a = """\none\n"two"\n""" }' in dump(
        Job(tasks=(Task(("true",)),), folders=(lines,)), WHERE)


def test_a_name_that_is_not_unicode_is_refused_when_it_is_to_be_written() -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        dump(Job(tasks=(Task(("a\udcff",)),)), WHERE)


@pytest.mark.parametrize(("text", "line", "code", "words"), [
    ("", 0, "no-task", "no command"),
    ("run = ", 1, "syntax", "Invalid value"),
    ("# a\n\nrun = 'a'\nrun = 'b'\n", 4, "syntax", "overwrite"),
    ("a = [\n1,\n2", 3, "syntax", "Unclosed array"),
    ("run = 'a'\nmemory = 5\n", 2, "unknown-key", "memory_mb"),
    ("run = 'a'\n[triggers]\ncpus = 1\n", 3, "unknown-key", "above the first"),
    ("[[task]]\nrun = 'a'\n\n[[task]]\nrun = 'b'\ntime_limits = 5\n", 6, "unknown-key",
     "`time_limit`"),
    ("[[task]]\nweight = 1\n", 1, "missing-key", "`run`"),
    ("[[task]]\nrun = 'a'\n[task.env]\nA = 'x'\nB = 1.5\n", 5, "wrong-value", "task[1].env.B"),
    ("run = 'a'\ninputs = [\n  'x',\n  'b:/..',\n]\n", 4, "wrong-value", "inputs[2]"),
    ("run = 'a'\nmemory_mb = 12\n", 2, "wrong-value", "not between 128 and"),
    ("run = 'a'\ncpus = true\n", 2, "wrong-value", "not a whole number"),
    ("run = 'a'\ntime_limit = 0\n", 2, "wrong-value", "not more than 0"),
    ("run = 'a'\ntime_limit = '5 weeks'\n", 2, "wrong-value", "min"),
    ("run = 'a'\ntime_limit = inf\n", 2, "wrong-value", "finite"),
    ("run = 'a'\nnetwork = 'all'\n", 2, "wrong-value", "'none' or 'nat'"),
    ("run = \"a 'b\"", 1, "wrong-value", "no closing quotation"),
    ("run = []", 1, "wrong-value", "no program"),
    ("run = 1979-05-27", 1, "wrong-value", "a date or time"),
    ("run = 'a'\noutputs = ['a:x', 'b:x']", 2, "two-outputs", "two outputs"),
    ("run = 'a'\noutputs = ['/var/x']", 2, "wrong-value", "where"),
    ("run = 'a'\n[hardware]\nmailbox = 'a'\nmailbox_base64 = 'YQ=='", 4, "two-mailboxes", ""),
    ("run = 'a'\n[hardware]\nmailbox_base64 = '?'", 3, "wrong-value", "base64"),
    ("[[task]]\nrun = 'a'\ndaemon = true", 1, "only-daemons", "daemons"),
    ("run = 'a'\n[[folder]]\nname = '../up'\nsource = '.'\ndestination = 'x'", 3, "wrong-value",
     "no name of a folder"),
    ("[task]\nrun = 'a'", 1, "wrong-value", "two brackets"),
    ("run = 'a'\nfolder = [1]", 2, "wrong-value", "two brackets"),
    ("run = 'a'\ntriggers = 1", 2, "wrong-value", "[triggers]"),
    ("run = 'a'\nenv = {}", 2, "unknown-key", ""),
    ("run = 'a'\n[[folder]]\nname = '..'\nsource = 'x'", 3, "wrong-value", "destination"),
    ("run = 'a'\n\"x\\ny\" = 1", 2, "unknown-key", "x\ufffdy"),
    ("x = " + "[" * 5000, 0, "syntax", "cannot be read"),
    ("run = 'a'\n" + ".".join("a" * 400) + " = 1", 2, "too-large", "dots"),
    ("x = " + "9" * 5000, 0, "syntax", "cannot be read"),
])
def test_a_wrong_file_is_told_with_line_and_what_to_write(text: str, line: int, code: str,
                                                          words: str) -> None:
    found, findings = reading(text)
    assert found is None
    errors = [one for one in findings if one.level is Level.ERROR]
    assert [(one.line, one.code) for one in errors][:1] == [(line, code)]
    assert words in errors[0].what + errors[0].instead


def test_all_that_is_wrong_is_told_at_once_in_the_order_of_the_file() -> None:
    _, findings = reading("cpus = 0\nrun = 'a'\nmemory_mb = 'x'\nimagine = 1\n")
    assert [(one.line, one.code) for one in findings] == [
        (1, "wrong-value"), (3, "wrong-value"), (4, "unknown-key")]


def test_what_is_odd_and_no_error_is_a_warning() -> None:
    for text, code in [("run = 'a | b'", "no-shell"),
                       (f"run = 'a'\ninputs = ['{'x' * 5000}']", "input-missing"),
                       ("run = 'a'\ninputs = ['x']", "input-missing"),
                       ("run = 'a'\n[triggers]\ncompletion = 'x'", "needs-shared")]:
        finding = only(text)
        assert (finding.level, finding.code) == (Level.WARNING, code)
    found = read(b"run = 'a'", Surroundings(HERE, arguments=("--x",)))
    assert [one.code for one in found.findings] == ["arguments-unused"]


def test_what_the_wrapper_is_told_replaces_what_the_file_says() -> None:
    found = read(b"run = 'a'\ncpus = 1\n", Surroundings(HERE, cpus=4, memory_mb=1000.5))
    assert found.job is not None
    assert (found.job.cpus, found.job.memory_mb) == (4, 1001)


def test_a_file_of_a_windows_editor_reads_the_same() -> None:
    data = b"\xef\xbb\xbf" + EVERYTHING.replace("\n", "\r\n").encode()
    assert read(data, WHERE).job == job(EVERYTHING)
    assert read("run = 'ä'\nx = 1".encode("latin-1"), WHERE).findings[0].code == "encoding"
    assert read(b"#" * (256 << 10) + b"#", WHERE).findings[0].code == "too-large"


def test_a_file_full_of_mistakes_is_told_in_time_and_in_bounds() -> None:
    for many in ("".join(f"k{number} = 1\n" for number in range(20_000)), "[[task]]\n" * 20_000,
                 "run = 'a'\noutputs = [" + "'a', " * 20_000 + "]",
                 "run = 'a'\ninputs = [" + "'a', " * 20_000 + "]"):
        _, findings = reading(many)
        assert len(findings) <= MAX_FINDINGS + 1
        assert "too-many" in {one.code for one in findings}


WORDS = ["run", "task", "[[", "]]", "[", "]", "{", "}", "=", ".", ",", "\n", '"', "'", '"""', "'''",
         "#", "1", "nan", "true", "inputs", "outputs", "folder", "triggers", "env", "\\", " "]


@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode(
    "utf-8", "surrogatepass")), st.lists(st.sampled_from(WORDS), max_size=40).map(
        lambda words: "".join(words).encode())))
def test_no_file_crashes_the_reader(data: bytes) -> None:
    found = read(data, WHERE)
    assert (found.job is None) == any(one.level is Level.ERROR for one in found.findings)
    assert len(found.findings) <= MAX_FINDINGS + 1
    for one in found.findings:
        assert (one.what + one.instead).isprintable()
        assert 0 <= one.line <= data.count(b"\n") + data.count(b"\r") + 1


values = st.recursive(
    st.one_of(st.none().map(lambda _: 1), st.booleans(), st.integers(), st.floats(),
              st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3),
                            st.dictionaries(st.sampled_from(["source", "destination", "run", "A"]),
                                            inner, max_size=3)), max_leaves=6)


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {inline(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=True)
        return text if "\\ud" not in text and "\x7f" not in text else '"x"'
    return str(value).lower() if isinstance(value, bool | float) else str(value)


@given(st.data())
def test_no_value_of_any_key_crashes_the_reader(data: st.DataObject) -> None:
    table = data.draw(st.sampled_from([JOB, TASK, FOLDER, TRIGGERS, FORWARD, HARDWARE]))
    key = data.draw(st.sampled_from(table.keys))
    text = f"{table.title}\n{key.name} = {inline(data.draw(values))}\n"
    tomllib.loads(text)
    reading(text)


# -- lines ------------------------------------------------------------------------------------

ODD = '''\
# a comment = with "signs" [x]
a.b . "c d" = """ # no comment
[x]
"""
 'li.t' = \'\'\'
x = 1\'\'\'\'
[ t . u ] # comment
list = [ # comment ]
  1, [ 2,
  3 ], { k = "}", l = [
   4 ] }, 1979-05-27 07:32:00, "a\\"]",
]
[[p]]
x = 1
[p.q]
y = 2
[[p.r]]
[[p]]
[p.q]
y = 3
z = """a"""""
'''


def places(value: Any, path: KeyPath = ()) -> set[KeyPath]:
    below: list[tuple[str | int, Any]] = (
        list(value.items()) if isinstance(value, dict)
        else list(enumerate(value)) if isinstance(value, list) else [])
    return {(*path, name) for name, _ in below}.union(
        *(places(each, (*path, name)) for name, each in below))


@pytest.mark.parametrize("text", [ODD, EVERYTHING], ids=["odd", "everything"])
def test_everything_in_a_file_has_a_line(text: str) -> None:
    assert set(lines_of(text)) == places(tomllib.loads(text))


def test_the_line_is_the_one_where_it_is_written() -> None:
    lines = lines_of(ODD)
    assert lines["a", "b", "c d"] == 2
    assert lines["li.t",] == 5
    assert lines["t", "u", "list", 1, 1] == 10
    assert lines["t", "u", "list", 2, "l", 0] == 11
    assert lines["p", 0, "q", "y"] == 16
    assert lines["p", 1, "q", "y"] == 20
    assert lines["p", 1, "q", "z"] == 21


@given(jobs)
def test_everything_in_a_written_job_has_a_line(one: Job) -> None:
    text = dump(one, WHERE)
    assert set(lines_of(text)) == places(tomllib.loads(text))


@given(st.lists(st.sampled_from(WORDS), max_size=30).map("".join))
def test_the_search_for_lines_ends_in_any_text(text: str) -> None:
    assert all(1 <= line <= text.count("\n") + 1 for line in lines_of(text).values())


# -- the description --------------------------------------------------------------------------


def test_the_schema_is_that_of_the_description() -> None:
    """After a change of the keys: VMJOB_WRITE_DOCS=1 script/test tests/unit/job/test_toml.py"""
    text = json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("VMJOB_WRITE_DOCS"):
        SCHEMA.write_text(text)
    assert SCHEMA.read_text() == text


def test_the_page_has_every_key_as_the_description_says_it() -> None:
    """After a change of the keys: see above."""
    head, _, _ = PAGE.read_text().partition("## Keys\n")
    text = f"{head}## Keys\n" + "".join(
        f"\n### {table.title or 'The job'}\n\n| key | value | default | what |\n"
        "| --- | --- | --- | --- |\n" + "".join(
            f"| `{key.name}` | {', '.join(f'`{one}`' for one in key.choices) or key.kind.value} "
            f"| {shown_default(table, key.name)} | {key.what.replace('|', chr(92) + '|')} |\n"
            for key in table.keys)
        for table in (JOB, TASK, FOLDER, TRIGGERS, FORWARD, HARDWARE))
    if os.environ.get("VMJOB_WRITE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text


def shown_default(table: Table, name: str) -> str:
    key = table[name]
    value = table.default(key)
    if key.required:
        return "must be there"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return f"`{value}`" if value != "" else ""
    return ""
