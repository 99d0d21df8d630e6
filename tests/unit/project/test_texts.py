"""Plan classes, templates and `boinccmd`'s answers: texts that others read, or wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.errors import UsageError
from vmjob.job.markup import Element, parse
from vmjob.job.model import Job, Task
from vmjob.project import planclass, templates
from vmjob.project.boinccmd import parse_messages, parse_notices, parse_tasks
from vmjob.project.planclass import PlanClass

#: What sched/plan_class_spec.cpp parses and vmjob may use; the first seven stand in BOINC's sample.
KNOWN = {"name", "min_ncpus", "max_threads", "projected_flops_scale", "cpu_feature",
         "min_core_client_version", "avg_ncpus", "project_prefs_tag", "project_prefs_regex",
         "project_prefs_default_true", "nthreads_cmdline", "mem_usage_base_mb",
         "mem_usage_per_cpu_mb"}


def one(text: str, root: str) -> Element:
    document = parse(text.encode(), frozenset({"file_info", "file_ref", "plan_class", "name"}))
    assert [each.name for each in document.roots] == [root]
    return document.roots[0]


def values(element: Element) -> dict[str, str]:
    return {each.name: each.text for each in element.children}


def test_plan_classes_hold_only_what_the_scheduler_parses() -> None:
    root = one(planclass.spec(), "plan_classes")
    classes = {values(each)["name"]: each for each in root.children}
    assert classes.keys() == {"vmjob", "vmjob_mt", "vmjob_vmx", "vmjob_svm"}
    for each in classes.values():
        assert {child.name for child in each.children} <= KNOWN
        assert int(values(each)["min_core_client_version"]) >= 70000


def test_emulation_is_for_volunteers_who_allowed_it() -> None:
    found = {values(each)["name"]: values(each)
             for each in one(planclass.spec(), "plan_classes").children}
    assert found["vmjob"]["project_prefs_tag"] == planclass.PREFERENCE
    assert "project_prefs_default_true" not in found["vmjob"]
    assert found["vmjob_vmx"]["cpu_feature"] == "vmx"
    assert "project_prefs_tag" not in found["vmjob_vmx"]


def test_threads_are_told_to_the_wrapper() -> None:
    found = {values(each)["name"]: values(each)
             for each in one(planclass.spec(), "plan_classes").children}
    assert (found["vmjob_mt"]["max_threads"], found["vmjob_mt"]["nthreads_cmdline"]) == ("16", "1")
    assert "nthreads_cmdline" not in found["vmjob"]


def test_a_class_that_the_scheduler_would_misread_is_refused() -> None:
    with pytest.raises(UsageError):
        _ = PlanClass("vbox64", "").text
    with pytest.raises(UsageError, match="per processor"):
        _ = PlanClass("one", "", memory_per_cpu_mb=100).text
    text = PlanClass("many", "", threads=4, memory_base_mb=100, memory_per_cpu_mb=50).text
    assert values(one(text, "plan_class"))["mem_usage_per_cpu_mb"] == "50"


@given(memory=st.integers(128, 1 << 16), disk=st.integers(1, 1024), cpus=st.integers(1, 64),
       limit=st.none() | st.floats(1, 1e7), outputs=st.integers(0, 20))
def test_bounds_hold_a_machine_and_all_that_belongs_to_it(
        memory: int, disk: int, cpus: int, limit: float | None, outputs: int) -> None:
    job = Job((Task(("x",)),), memory_mb=memory, disk_gb=disk, cpus=cpus, time_limit=limit)
    found = templates.bounds(job, outputs=outputs, image_bytes=10**8)
    assert found.memory > memory << 20
    generations = 2 * (memory << 20)
    assert found.disk > (disk << 30) + generations + outputs * templates.OUTPUT + 10**8
    assert found.fpops_est < found.fpops_bound
    if limit is not None:
        # A fast core under emulation stays inside.
        assert found.fpops_bound / templates.FAST_FLOPS >= 9.99 * limit
        assert found.delay >= limit


def test_templates_name_files_in_the_order_of_their_numbers() -> None:
    limits = templates.bounds(Job((Task(("x",)),)))
    root = one(templates.input_template(["a", "shared/b"], limits, copied=["shared/b"],
                                        command_line="--x < 1"), "input_template")
    assert [values(each)["number"] for each in root.children if each.name == "file_info"] == [
        "0", "1"]
    unit = next(each for each in root.children if each.name == "workunit")
    references = [each for each in unit.children if each.name == "file_ref"]
    assert [(values(each)["file_number"], values(each)["open_name"], "copy_file" in values(each))
            for each in references] == [("0", "a", False), ("1", "shared/b", True)]
    found = values(unit)
    assert found["command_line"] == "--x < 1"
    assert int(found["rsc_disk_bound"]) == limits.disk
    assert int(found["rsc_memory_bound"]) == limits.memory
    assert float(found["rsc_fpops_bound"]) == limits.fpops_bound


def test_an_output_has_boincs_macros_and_a_bound() -> None:
    text = templates.output_template(["out", "log"], max_nbytes=7)
    assert text.count("<name><OUTFILE_0/></name>") == 1
    assert text.count("<file_name><OUTFILE_1/></file_name>") == 1
    assert text.count("<max_nbytes>7</max_nbytes>") == 2
    assert text.count("<url><UPLOAD_URL/></url>") == 2
    with pytest.raises(UsageError):
        templates.output_template(["../x"])


TASKS = """
======== Tasks ========
1) -----------
   name: lab_1_0
   WU name: lab_1
   project URL: http://127.0.0.1:8099/
   received: Sat Nov 21 19:40:00 2026
   ready to report: no
   state: downloaded
   scheduler state: scheduled
   active_task_state: EXECUTING
   suspended via GUI: no
   slot: 0
   PID: 4711
   CPU time at last checkpoint: 1.500000
   current CPU time: 2.250000
   fraction done: 0.500000
   working set size: 270 MB
2) -----------
   name: lab_2_0
   WU name: lab_2
   state: uploaded
   scheduler state: uninitialized
   active_task_state: UNINITIALIZED
   ready to report: yes
"""


def test_tasks_are_read_from_what_boinccmd_prints() -> None:
    first, second = parse_tasks(TASKS)
    assert (first.name, first.state, first.active, first.slot, first.pid) == (
        "lab_1_0", "downloaded", "EXECUTING", 0, 4711)
    assert (first.cpu_time, first.checkpoint_cpu_time, first.fraction_done) == (2.25, 1.5, 0.5)
    assert first.memory == 270 << 20
    assert (second.active, second.ready_to_report, second.slot) == ("", True, None)


def test_messages_and_notices_are_read_from_what_boinccmd_prints() -> None:
    low, high = parse_messages(
        "1: 21-Nov-2026 19:46:44 (low) [] Starting BOINC client\n"
        "2: 21-Nov-2026 19:46:45 (user notification) [lab] Task x postponed\nsecond line\n")
    assert (low.priority, low.project, low.text) == ("low", "", "Starting BOINC client")
    assert (high.number, high.priority, high.project) == (2, "user notification", "lab")
    assert high.text == "Task x postponed\nsecond line"
    assert parse_notices("======== Notices ========\n1: first\n2: second\nmore\n") == [
        "first", "second\nmore"]


@given(st.text())
def test_no_answer_breaks_a_reader(text: str) -> None:
    parse_tasks(text)
    parse_messages(text)
    parse_notices(text)


def test_the_documentation_shows_the_preference_that_the_classes_ask_for() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "project.md"
    assert f"`{planclass.PREFERENCE}`" in page.read_text()
