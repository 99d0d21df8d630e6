"""What the owner of a computer forbids stays forbidden."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.errors import AcceleratorUnusable, PolicyForbids, PolicyInvalid
from vmjob.grid.boinc.files import MAX_LINE
from vmjob.grid.boinc.messages import one_line
from vmjob.job.model import Job, Network, Task
from vmjob.wrapper.policy import ACCELERATORS, Policy, read

JOB = Job(tasks=(Task(("true",)),), memory_mb=512)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_where_nobody_says_anything_all_but_emulation_is_allowed(tmp_path: Path) -> None:
    policy = read([tmp_path / "none"])
    policy.check(JOB)
    assert policy.allowed(emulation=False) == {"kvm", "hvf", "whpx", "hm"}
    assert policy.allowed(emulation=True) == ACCELERATORS


@pytest.mark.parametrize(("text", "job"), [
    ("allow = false", JOB), ("machines = 0", JOB), ("memory_mb = 511", JOB),
    ("network = false", Job(tasks=JOB.tasks, network=Network.NAT))])
def test_what_is_forbidden_is_refused_and_the_file_is_named(tmp_path: Path, text: str,
                                                            job: Job) -> None:
    path = written(tmp_path / "p.toml", text)
    with pytest.raises(PolicyForbids, match=str(path)):
        read([path]).check(job)


def test_a_job_that_has_begun_with_more_processors_than_are_allowed_now_waits() -> None:
    Policy(cpus=2).check_begun(replace(JOB, cpus=2))
    with pytest.raises(PolicyForbids, match="begun with 2 processors"):
        Policy(cpus=1).check_begun(replace(JOB, cpus=2))
    with pytest.raises(PolicyForbids, match="not allowed"):
        Policy(allow=False).check_begun(JOB)


def test_accelerators_of_the_policy_are_all_that_may_be_used(tmp_path: Path) -> None:
    policy = read([written(tmp_path / "p.toml", 'accelerators = ["tcg"]')])
    assert policy.allowed(emulation=False) == {"tcg"}
    policy = read([written(tmp_path / "p.toml", 'accelerators = ["kvm"]')])
    assert policy.allowed(emulation=True) == {"kvm"}


def test_who_was_not_asked_about_emulation_is_told_how_to_allow_it() -> None:
    because = "no accelerator works here (kvm: " + "x" * 300 + ")"
    found = Policy().asking_for_emulation(AcceleratorUnusable(because), frozenset({"kvm"}))
    shown = one_line(f"{found.message}. {found.advice}", MAX_LINE)  # what the client is told
    assert 'accelerators = ["kvm", "tcg"] into vmjob_policy.toml' in shown
    assert found.context["why"] == because
    mend = "Add the user that runs this (boinc) to the group kvm, and restart what started it."
    found = Policy().asking_for_emulation(AcceleratorUnusable(because, advice=mend), frozenset())
    said = f"{found.message}. {found.advice}"
    assert said.startswith(f"hardware virtualization does not work here. {mend} For emulation")
    assert one_line(said, MAX_LINE) == said


def test_who_has_spoken_of_emulation_is_not_told_of_it() -> None:
    error = AcceleratorUnusable("no accelerator works here")
    assert Policy().asking_for_emulation(error, ACCELERATORS) is error
    spoken = Policy(accelerators=frozenset({"kvm"}))
    assert spoken.asking_for_emulation(error, spoken.allowed(emulation=True)) is error


def test_of_two_files_the_stricter_word_counts(tmp_path: Path) -> None:
    one = written(tmp_path / "1", 'machines = 3\ncpus = 1\naccelerators = ["kvm", "tcg"]')
    other = written(tmp_path / "2", 'machines = 2\nnetwork = false\naccelerators = ["tcg"]')
    for order in ([one, other], [other, one]):
        policy = read(order)
        assert (policy.machines, policy.cpus, policy.network) == (2, 1, False)
        assert policy.allowed(emulation=False) == {"tcg"}


@pytest.mark.parametrize("text", [
    "alow = true", "allow = 1", "machines = -1", "memory_mb = 0", 'accelerators = ["xen"]',
    'path = "/"', "allow = ", "\0", "x" * 70_000])
def test_nothing_runs_under_a_policy_that_nobody_understands(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "p.toml", text)
    with pytest.raises(PolicyInvalid, match=str(path)):
        read([path])


def test_a_policy_that_cannot_be_read_forbids(tmp_path: Path) -> None:
    with pytest.raises(PolicyInvalid):
        read([tmp_path])


@given(st.binary(max_size=200))
def test_any_bytes_are_a_policy_or_an_error(tmp_path_factory: pytest.TempPathFactory,
                                            data: bytes) -> None:
    path = tmp_path_factory.mktemp("policy") / "p.toml"
    path.write_bytes(data)
    try:
        assert isinstance(read([path]), Policy)
    except PolicyInvalid:
        pass
