"""Reads the ``job.xml`` of BOINC's generic wrapper (release 26018), as that reads it.

The wrapper runs its tasks in the slot; here the slot's files go into the machine before the first
task, where they are the job's directory, and what changed comes back after the last. Where a thing
is done otherwise, a finding says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from vmjob.job import values
from vmjob.job.files import Folder
from vmjob.job.job_desc import (
    JOB,
    add,
    given_once,
    is_program_of_windows,
    job_folder,
    memory,
    path_in_machine,
    project_of,
    root_of,
    shell_words,
    unknown,
    words,
)
from vmjob.job.logical import is_there
from vmjob.job.markup import Element, parse, shown
from vmjob.job.model import Job, Task
from vmjob.job.reading import Finding, Level, Reading, Surroundings
from vmjob.job.wrapper_scripts import LIST, LOCAL_FIRST, UNZIP, ZIP, python_pattern

__all__ = ["ELEMENTS", "PROJECT", "read"]

LANGUAGE = "wrapper"
#: Where the project's directory is in the machine. Not /root/project, as in a vbox job: the tasks
#: here run as a user who may not look into /root.
PROJECT = "/project"
GRAPHICS, UNZIP_INPUT, ZIP_OUTPUT = "enable_graphics_support", "unzip_input", "zip_output"
ELEMENTS = frozenset({
    "application", "command_line", "append_cmdline_args", "exec_dir", "setenv", "stdin_filename",
    "stdout_filename", "stderr_filename", "checkpoint_filename", "fraction_done_filename", "weight",
    "daemon", "multi_process", "forward_slashes", "time_limit", "priority"})
#: Longer ones BOINC's wrapper cuts off.
COMMAND_LINE = 4095
MOST_SECONDS = 1e9

_RESOLVE = re.compile(r"boinc_resolve\(([^)]*)\)")
#: What has no effect here -> why.
_WITHOUT_EFFECT = {
    "priority": "the machine is this job's alone; all of it runs at low priority",
    "multi_process": "all processes of a task always belong to it",
    "forward_slashes": "paths in a Linux machine have no others",
}


@dataclass
class _Plan:
    """What the file asks for beside its tasks."""

    where: Surroundings
    findings: list[Finding]
    tasks: list[Task] = field(default_factory=list)
    daemons: list[Task] = field(default_factory=list)
    unzip: list[str] = field(default_factory=list)
    zip_name: str | None = None
    patterns: list[str] = field(default_factory=list)
    uses_project: bool = False
    appends: bool = False
    said: set[tuple[str, str]] = field(default_factory=set)

    def say_once(self, level: Level, line: int, code: str, about: str, what: str) -> None:
        """Of things that most tasks of a file share."""
        if (code, about) not in self.said:
            self.said.add((code, about))
            self.say(level, line, code, what)

    def say(self, level: Level, line: int, code: str, what: str, instead: str = "") -> None:
        add(self.findings, level, line, code, what, instead)


def read(data: bytes, where: Surroundings) -> Reading:
    """Read a ``job.xml``; never raises.

    Looks at files of ``where`` for whether a program is one of the job's or of the machine, and of
    which kind it is.
    """
    document = parse(data)
    findings = list(document.findings)
    root = root_of(document, findings)
    job = None
    if root is not None:
        plan = _Plan(where, findings)
        _blocks(root, plan)
        job = _job(root, plan)
    if any(each.level is Level.ERROR for each in findings):
        job = None
    findings.sort(key=lambda each: each.line)
    return Reading(LANGUAGE, tuple(findings), job)


def _blocks(root: Element, plan: _Plan) -> None:
    # First: whether there is a zip decides what a program's name may mean.
    for block in root.children:
        if block.name == UNZIP_INPUT:
            plan.unzip += _zip_names(block, plan, {"zipfilename"})
        elif block.name == ZIP_OUTPUT:
            names = _zip_names(block, plan, {"zipfilename", "filename"})
            plan.zip_name = names[-1] if names else plan.zip_name
            _patterns(block, plan)
    for block in root.children:
        if block.name == "task":
            _task(block, plan)
        elif block.name == GRAPHICS:
            if values.boolean(block, plan.findings):
                plan.say(Level.NOTE, block.line, "not-needed",
                         f"<{GRAPHICS}>: no program in the machine can show anything")
        elif block.name not in {UNZIP_INPUT, ZIP_OUTPUT}:
            unknown(block, {"task", GRAPHICS, UNZIP_INPUT, ZIP_OUTPUT}, plan.findings)


# -- a task ----------------------------------------------------------------------------------


def _task(block: Element, plan: _Plan) -> None:
    given = given_once(block, ELEMENTS, {"setenv"}, plan.findings)

    def last(name: str) -> Element | None:
        return given[name][-1] if name in given else None

    def file(name: str) -> str | None:
        element = last(name)
        return path_in_machine(element, plan.findings) if element is not None else None

    def flag(name: str) -> bool:
        element = last(name)
        return element is not None and values.boolean(element, plan.findings)

    for name, why in _WITHOUT_EFFECT.items():
        if (element := last(name)) is not None:
            plan.say(Level.NOTE, element.line, "not-needed", f"<{name}> has no effect: {why}")
    cwd = None
    if (element := last("exec_dir")) is not None and element.text:
        cwd = _macros(values.text(element, plan.findings), element, plan)
    arguments = _arguments(block, last("command_line"), plan, append=flag("append_cmdline_args"))
    application = last("application")
    program = _program(block, application, plan, elsewhere=cwd is not None)
    task = Task(
        (*program, *arguments), env=_environment(given.get("setenv", []), plan), cwd=cwd,
        name=application.text.rpartition("/")[2] if len(program) > 1 and application else "",
        stdin=file("stdin_filename"), stdout=file("stdout_filename"),
        stderr=file("stderr_filename"),
        weight=_number(last("weight"), plan, 1.0, 1e15),
        fraction_file=file("fraction_done_filename"), checkpoint_file=file("checkpoint_filename"),
        time_limit=_number(last("time_limit"), plan, 0.0, MOST_SECONDS) or None,
        daemon=flag("daemon"))
    (plan.daemons if task.daemon else plan.tasks).append(task)


def _number(element: Element | None, plan: _Plan, default: float, most: float) -> float:
    if element is None:
        return default
    return values.number(element, plan.findings, default=default, least=0, most=most)


def _program(block: Element, element: Element | None, plan: _Plan, *,
             elsewhere: bool) -> tuple[str, ...]:
    """The program as the machine finds it; ``elsewhere``: it does not start in the slot."""
    name = values.text(element, plan.findings) if element is not None else ""
    line = element.line if element is not None else block.line
    if not name:
        plan.say(Level.ERROR, line, "incomplete", "a <task> without <application>",
                 "<application>NAME</application>")
        return ("",)
    if is_program_of_windows(name, plan.where):
        plan.say(Level.ERROR, line, "windows-program",
                 f"{shown(name)} is a program of Windows, which cannot run in a Linux machine",
                 "the name of a Linux program")
        return ("",)
    if "$PROJECT_DIR" in name:
        return (_project(line, plan) + name.partition("$PROJECT_DIR")[2],)
    if name.startswith("/"):
        plan.say_once(
            Level.NOTE, line, "machines-program", name,
            f"{shown(name)} is that of the machine's image, not of this computer")
        return (name,)
    if "/" in name or is_there(name, plan.where):
        if elsewhere:
            return (f"{JOB}/{name.removeprefix('./')}",)
        return (name if "/" in name else f"./{name}",)
    if plan.tasks or plan.unzip:
        plan.say_once(
            Level.NOTE, line, "machines-program", name,
            f"{shown(name)} is not there so far: it is the job's if a zip or an earlier task "
            "brings it, else a program of the machine")
        return ("/bin/sh", "-c", LOCAL_FIRST, name)
    plan.say_once(
        Level.NOTE, line, "machines-program", name,
        f"{shown(name)} is not in the job's directory: it is a program of the machine")
    return (name,)


def _arguments(block: Element, element: Element | None, plan: _Plan, *,
               append: bool) -> list[str]:
    line = ""
    if element is not None:
        line = _macros(values.text(element, plan.findings), element, plan)
    if append:
        plan.appends = True
        line = " ".join([line, *plan.where.arguments])
    element = element or block
    if len(line.encode("utf-8", "replace")) > COMMAND_LINE:
        plan.say(Level.WARNING, element.line, "long-command",
                 f"more than {COMMAND_LINE} bytes, where BOINC's wrapper cuts it off; here it is "
                 "whole")
    line = _RESOLVE.sub(lambda match: f"{JOB}/{match[1]}", line)
    if "boinc_resolve(" in line:
        plan.say(Level.ERROR, element.line, "incomplete", "boinc_resolve( without its end", ")")
    found = words(line)
    shell_words(found, element, plan.findings)
    return found


def _environment(elements: list[Element], plan: _Plan) -> dict[str, str]:
    env = {}
    for element in elements:
        name, equals, value = _macros(values.text(element, plan.findings), element,
                                      plan).partition("=")
        if name and equals:
            env[name] = value
        else:
            plan.say(Level.WARNING, element.line, "no-effect",
                     f"<setenv> {shown(element.text)} sets nothing", "NAME=VALUE")
    if env:
        plan.say_once(
            Level.NOTE, elements[0].line, "environment-kept", "",
            "BOINC's wrapper gives such a task these variables alone; here they are added to the "
            "machine's own few (PATH, HOME ...)")
    return env


def _macros(text: str, element: Element, plan: _Plan) -> str:
    if "$PROJECT_DIR" in text:
        text = text.replace("$PROJECT_DIR", _project(element.line, plan))
    if "$GPU_DEVICE_NUM" in text:
        plan.say(Level.WARNING, element.line, "no-gpu",
                 "$GPU_DEVICE_NUM: a machine has no GPU, so nothing is put there")
        text = text.replace("$GPU_DEVICE_NUM", "")
    return text.replace("$NTHREADS", str(plan.where.cpus or 1)).replace("$PWD", JOB)


def _project(line: int, plan: _Plan) -> str:
    """What $PROJECT_DIR means in the machine; without a project the job's directory, as there."""
    if project_of(plan.where) is None:
        plan.say_once(
            Level.WARNING, line, "no-project", "",
            "$PROJECT_DIR: there is no project here, so it means the job's directory")
        return JOB
    plan.uses_project = True
    return PROJECT


# -- zips ------------------------------------------------------------------------------------


def _zip_names(block: Element, plan: _Plan, known: set[str]) -> list[str]:
    given = given_once(block, known, known, plan.findings)
    names = [values.name(element, plan.findings) for element in given.get("zipfilename", [])]
    if not names:
        plan.say(Level.WARNING, block.line, "incomplete", f"<{block.name}> names no zip",
                 "<zipfilename>")
    return [name for name in names if name is not None]


def _patterns(block: Element, plan: _Plan) -> None:
    for element in block.children:
        if element.name != "filename":
            continue
        pattern = python_pattern(values.text(element, plan.findings))
        try:
            log = re.search(pattern, "stderr.txt")
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            plan.say(Level.ERROR, element.line, "bad-pattern",
                     f"{shown(element.text)} is not a regular expression: {shown(str(error))}")
            continue
        if log and pattern not in {".*", ".", ""}:
            plan.say(Level.NOTE, element.line, "log-not-zipped",
                     "stderr.txt is the wrapper's log, on this side of the machine: it is not in "
                     "the zip")
        plan.patterns.append(pattern)


# -- what it becomes -------------------------------------------------------------------------


def _job(root: Element, plan: _Plan) -> Job:
    where = plan.where
    if not plan.tasks:
        plan.say(Level.ERROR, root.line, "no-task", "there is no <task> whose end is the job's",
                 "<task>")
    elif not any(task.weight for task in plan.tasks):
        plan.say(Level.WARNING, root.line, "weights-zero",
                 "all weights are 0, and BOINC's wrapper divides by their sum; here each counts "
                 "the same")
        plan.tasks = [replace(task, weight=1.0) for task in plan.tasks]
    if where.arguments and not plan.appends:
        plan.say(Level.WARNING, root.line, "arguments-unused",
                 f"the arguments {shown(' '.join(where.arguments))} reach no task",
                 "<append_cmdline_args/>")
    before = [Task(("python3", "-c", UNZIP, name), name=f"unzip {name}", weight=0)
              for name in plan.unzip]
    after = []
    if plan.zip_name is not None:
        before.append(Task(("python3", "-c", LIST), name="list of files", weight=0))
        after.append(Task(("python3", "-c", ZIP, plan.zip_name, *plan.patterns),
                          name=f"zip {plan.zip_name}", weight=0))
    folders = [job_folder(where)]
    project = project_of(where)
    if plan.uses_project and project is not None:
        folders.append(Folder("project", project, PROJECT, live=False, writable=False))
    return Job(tasks=(*before, *plan.daemons, *plan.tasks, *after), folders=tuple(folders),
               cpus=where.cpus or 1, memory_mb=memory(where), cpu="baseline")
