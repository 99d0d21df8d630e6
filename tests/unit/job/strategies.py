"""Any job that can be: for promises about all of them."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from vmjob.job.files import FOLDER_NAME, Folder, Input, Output
from vmjob.job.model import (
    LEAST_MEMORY_MB,
    MOST_CPUS,
    MOST_DISK_GB,
    MOST_MEMORY_MB,
    Forward,
    Hardware,
    Job,
    Network,
    OnFlood,
    Task,
    Triggers,
)

HERE = Path("/some where/jobs")

UNICODE = st.characters(exclude_categories=("Cs",))
raw = st.text(UNICODE, max_size=20)
text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
some = st.one_of(text.filter(bool), st.sampled_from(["a", "out.dat", "/dev/null", "[x]", "a = 1"]))
names = st.one_of(
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\0/\x7f"),
            min_size=1, max_size=12).filter(lambda name: name not in {".", ".."}),
    st.sampled_from(["data.csv", "a:b", "x y", '"""', "'"]))
guest = st.lists(names, min_size=1, max_size=3).map("/".join)
paths = st.builds(lambda parts, base: base.joinpath(*parts),
                  st.lists(names, min_size=1, max_size=3),
                  st.sampled_from([HERE, Path("/"), HERE.parent, HERE / "sub"]))
seconds = st.floats(1e-6, 1e12)
sizes = st.one_of(st.integers(1, 1 << 50), st.integers(1, 4096).map(lambda n: n << 20))


def maybe(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.one_of(st.none(), strategy)


tasks = st.builds(
    Task, argv=st.builds(lambda program, rest: (program, *rest), some, st.lists(text, max_size=3)),
    env=st.dictionaries(st.text(UNICODE, min_size=1, max_size=8)
                        .filter(lambda name: not set(name) & {"=", "\0"}), text, max_size=2),
    cwd=maybe(some), user=maybe(some), cpu_seconds=maybe(seconds), memory_bytes=maybe(sizes),
    file_bytes=maybe(st.integers(0, 1 << 50)), processes=maybe(st.integers(1, 1 << 40)), name=text,
    stdin=maybe(some), stdout=maybe(some), stderr=maybe(some), weight=st.floats(0, 1e300),
    fraction_file=maybe(some), checkpoint_file=maybe(some), time_limit=maybe(seconds),
    may_fail=st.booleans(), daemon=st.booleans())
folders = st.builds(
    Folder, name=st.from_regex(FOLDER_NAME, fullmatch=True), source=paths,
    destination=st.one_of(guest, st.just("")),
    live=st.booleans(), writable=st.booleans(), links=st.booleans(),
    links_to=st.lists(paths, max_size=2).map(tuple),
    links_not_to=st.lists(paths, max_size=2).map(tuple),
    without=st.lists(some, max_size=2).map(tuple), copies=st.lists(paths, max_size=2).map(tuple),
    texts=st.dictionaries(raw, raw, max_size=2), max_bytes=sizes,
    max_files=st.integers(1, 1 << 40))
triggers = st.builds(
    Triggers, completion=maybe(some), temporary_exit=maybe(some), fraction_done=maybe(some),
    heartbeat=maybe(some), heartbeat_interval=seconds,
    trickles=st.lists(some, max_size=2).map(tuple),
    uploads=st.lists(some, max_size=2).map(tuple), credit=maybe(some))
forwards = st.builds(Forward, guest_port=st.integers(1, 65535), host_port=st.integers(0, 65535),
                     remote=st.booleans(), web=st.booleans())
hardware = st.builds(
    Hardware, disk=maybe(paths), iso=maybe(paths), iso_first=st.booleans(), cache_disk=maybe(paths),
    mailbox=maybe(st.one_of(st.binary(max_size=20), raw.map(str.encode))),
    display=st.booleans(), screenshot=maybe(paths))
jobs = st.builds(
    Job, tasks=st.lists(tasks, min_size=1, max_size=3).map(tuple).filter(
        lambda all_: not all(task.daemon for task in all_)),
    image=some, inputs=st.lists(st.builds(Input, paths, guest), max_size=3).map(tuple),
    outputs=st.lists(st.builds(Output, guest, paths), max_size=3,
                     unique_by=lambda output: output.destination).map(tuple),
    memory_mb=st.integers(LEAST_MEMORY_MB, MOST_MEMORY_MB), cpus=st.integers(1, MOST_CPUS),
    disk_gb=st.integers(1, MOST_DISK_GB), network=st.sampled_from(Network),
    time_limit=maybe(seconds), output_limit=maybe(st.integers(0, 1 << 50)),
    stream_limit=st.integers(0, 1 << 50), on_flood=st.sampled_from(OnFlood), cpu=maybe(some),
    folders=st.lists(folders, max_size=2).map(tuple), triggers=triggers, duration=maybe(seconds),
    checkpoint_every=maybe(st.one_of(st.just(0.0), seconds)),
    forwards=st.lists(forwards, max_size=2).map(tuple), hardware=hardware,
    packages=st.lists(paths, max_size=2).map(tuple))
