"""Reads the ``job.xml`` of VMwrapper.py (CERN, 2009): BOINC's first tasks in virtual machines.

There a virtual machine was there before the job and stayed after it, and two programs of the job
(a message broker and a controller) led to it. Here it is vmjob's: what was for those two is not
started, and what was to run on the volunteer's computer runs in the machine too.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from vmjob.errors import BadPath
from vmjob.job import values
from vmjob.job.files import Input, Output
from vmjob.job.job_desc import (
    add,
    given_once,
    is_program_of_windows,
    job_folder,
    memory,
    path_in_machine,
    root_of,
    shell_words,
    unknown,
    words,
)
from vmjob.job.links import exists
from vmjob.job.logical import is_there, resolve
from vmjob.job.markup import Element, parse, shown
from vmjob.job.model import Job, Task
from vmjob.job.reading import Finding, Level, Reading, Surroundings

__all__ = ["ELEMENTS", "read"]

LANGUAGE = "vmwrapper"
STREAMS = ("stdin", "stdout", "stderr")
ELEMENTS = frozenset({
    "virtualmachine", "image", "app_pathVM", "application", "copy_app_to_VM", "copy_file_to_VM",
    "copy_stdin_to_VM", "stdin_filename", "stdout_filename", "stderr_filename",
    "copy_file_from_VM", "checkpoint_filename", "command_line", "weight"})
SEVERAL = frozenset({"copy_file_to_VM", "copy_file_from_VM"})
#: Seconds that VMwrapper gave each unzip task; its exit code did not count.
UNZIP_SECONDS = 60.0

#: Names of vmjob images.
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
#: For a program that lost its mode on the way.
_MADE_EXECUTABLE = 'chmod +x "$0"; exec "$0" "$@"'


@dataclass
class _Plan:
    where: Surroundings
    findings: list[Finding]
    unpacking: list[Task] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    inputs: dict[str, Input] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    on_host: bool = False  # some task was to run on the volunteer's computer

    def say(self, level: Level, line: int, code: str, what: str, instead: str = "") -> None:
        add(self.findings, level, line, code, what, instead)


def read(data: bytes, where: Surroundings) -> Reading:
    """Read VMwrapper's ``job.xml``; never raises.

    Looks into ``where.directory`` for what its names stand for: links of BOINC's, or files.
    """
    document = parse(data)
    findings = list(document.findings)
    root = root_of(document, findings)
    job = None
    if root is not None:
        plan = _Plan(where, findings, on_host=any(map(_is_for_host, root.children)))
        for block in root.children:
            _block(block, plan)
        job = _job(root, plan)
    if any(each.level is Level.ERROR for each in findings):
        job = None
    findings.sort(key=lambda each: each.line)
    return Reading(LANGUAGE, tuple(findings), job)


def _is_for_host(block: Element) -> bool:
    return block.name == "task" and not any(
        each.name == "virtualmachine" and each.text for each in block.children)


def _block(block: Element, plan: _Plan) -> None:
    if block.name == "VMmanage_task":
        plan.say(Level.NOTE, block.line, "superseded",
                 "<VMmanage_task> is not started: vmjob needs no program of the job's to reach the "
                 "machine")
    elif block.name in {"task", "unzip_task"}:
        _task(block, plan, unzip=block.name == "unzip_task")
    else:
        unknown(block, {"task", "unzip_task", "VMmanage_task"}, plan.findings)


def _task(block: Element, plan: _Plan, *, unzip: bool) -> None:
    given = given_once(block, ELEMENTS, SEVERAL, plan.findings)
    findings = plan.findings

    def last(name: str) -> Element | None:
        # Empty elements are legal here, and mean nothing.
        found = given.get(name, [None])[-1]
        return found if found is not None and (found.text or found.children) else None

    def flag(name: str) -> bool:
        element = last(name)
        return element is not None and values.boolean(element, findings)

    names = {stream: _file(last(f"{stream}_filename"), plan) for stream in STREAMS}
    if plan.on_host:  # then the slot's files are there under the slot's names
        names = {stream: name and _in_slot(name, given[f"{stream}_filename"][-1], plan, names)
                 for stream, name in names.items()}
    for name in SEVERAL:
        for element in given.get(name, []):
            if (file := _file(element, plan)) is not None:
                if name == "copy_file_to_VM":
                    _input(file, element, plan, names)
                else:
                    _output(file, element, plan, names)
    if unzip:
        if not plan.unpacking:
            plan.say(Level.NOTE, block.line, "in-machine",
                     "<unzip_task> runs in the machine, before the others; whether it succeeds "
                     "does not count")
    else:
        _place(block, last("image"), plan)
        _streams(given, flag("copy_stdin_to_VM"), plan, names)
    if "app_pathVM" in given:
        plan.say(Level.NOTE, given["app_pathVM"][-1].line, "not-needed",
                 "<app_pathVM> was never read by VMwrapper; programs run in the job's directory")
    arguments = _arguments(block, last("command_line"), plan, append=not unzip)
    program = _program(block, last("application"), plan, names, copied=flag("copy_app_to_VM"))
    weight = last("weight")
    task = Task(
        (*program, *arguments), stdin=names["stdin"], stdout=names["stdout"],
        stderr=names["stderr"], name=program[-1].rpartition("/")[2] if len(program) > 1 else "",
        checkpoint_file=_file(last("checkpoint_filename"), plan),
        weight=0 if unzip else 1.0 if weight is None else values.number(
            weight, findings, default=1.0, least=0, most=1e15),
        time_limit=UNZIP_SECONDS if unzip else None, may_fail=unzip)
    (plan.unpacking if unzip else plan.tasks).append(task)


def _place(block: Element, image: Element | None, plan: _Plan) -> None:
    """Where the task was to run, and in which image."""
    if _is_for_host(block):
        plan.say(Level.NOTE, block.line, "in-machine",
                 "a <task> without <virtualmachine> was for the volunteer's computer; it runs in "
                 "the machine")
    if image is None:
        return
    name = values.text(image, plan.findings)
    if is_there(name, plan.where) or not _IMAGE.fullmatch(name):
        plan.say(Level.NOTE, image.line, "own-image",
                 f"<image> {shown(name)} is not booted; the machine is one of vmjob's images",
                 "the name of a vmjob image, or nothing")
    else:
        plan.images.append(name)
        if name != plan.images[0]:
            plan.say(Level.WARNING, image.line, "several-images",
                     f"<image> {shown(name)}: all tasks run in one machine, of the image "
                     f"{shown(plan.images[0])}")


# -- files -----------------------------------------------------------------------------------


def _file(element: Element | None, plan: _Plan) -> str | None:
    return None if element is None else path_in_machine(element, plan.findings)


def _streams(given: dict[str, list[Element]], copy_stdin: bool, plan: _Plan,
             names: dict[str, str | None]) -> None:
    stdin = names["stdin"]
    if stdin is not None and stdin not in plan.inputs and not stdin.startswith("/"):
        element = given["stdin_filename"][-1]
        if not copy_stdin and is_there(stdin, plan.where):
            plan.say(Level.NOTE, element.line, "stdin-copied",
                     f"{shown(stdin)} goes into the machine although nothing says so",
                     "<copy_stdin_to_VM>1</copy_stdin_to_VM>")
        if copy_stdin or is_there(stdin, plan.where):
            _input(stdin, element, plan, names)
    for stream in STREAMS[1:]:
        name = names[stream]
        if name is not None and not name.startswith("/"):
            _output(name, given[f"{stream}_filename"][-1], plan, names)


def _input(name: str, element: Element, plan: _Plan, names: dict[str, str | None]) -> None:
    if name in plan.inputs:
        return
    try:
        source = resolve(_in_slot(name, element, plan, names), plan.where)
    except BadPath as error:
        plan.say(Level.ERROR, element.line, "bad-link", error.message)
        return
    plan.inputs[name] = Input(source, name)
    if not exists(source):
        plan.say(Level.NOTE, element.line, "input-missing",
                 f"there is no {shown(str(source))} so far")


def _output(name: str, element: Element, plan: _Plan, names: dict[str, str | None]) -> None:
    if name in plan.outputs:
        return
    try:
        target = resolve(_in_slot(name, element, plan, names), plan.where)
    except BadPath as error:
        plan.say(Level.ERROR, element.line, "bad-link", error.message)
        return
    if any(target == output.destination for output in plan.outputs.values()):
        plan.say(Level.ERROR, element.line, "two-outputs",
                 f"two outputs would go to {shown(str(target))}")
        return
    plan.outputs[name] = Output(name, target)


def _in_slot(name: str, element: Element, plan: _Plan, names: dict[str, str | None]) -> str:
    """The name in the slot: for a stream also the stream's own, as VMwrapper's example has it.

    Its job.xml says ``stdout_worker``, its templates ``stdout``.
    """
    stream = next((each for each in STREAMS if names[each] == name), None)
    if stream is None or is_there(name, plan.where) or not is_there(stream, plan.where):
        return name
    plan.say(Level.WARNING, element.line, "stream-name",
             f"there is no {shown(name)} in the slot, but {stream}, which is used",
             f"{stream}, or {shown(name)} in the template as its open_name")
    return stream


# -- what runs -------------------------------------------------------------------------------


def _program(block: Element, element: Element | None, plan: _Plan, names: dict[str, str | None],
             *, copied: bool) -> tuple[str, ...]:
    name = values.text(element, plan.findings) if element is not None else ""
    if element is None or not name:
        plan.say(Level.ERROR, block.line, "incomplete", f"a <{block.name}> without <application>",
                 "<application>NAME</application>")
        return ("",)
    plain = name.removeprefix("./")
    if is_program_of_windows(plain, plan.where):
        plan.say(Level.ERROR, element.line, "windows-program",
                 f"{shown(name)} is a program of Windows, which cannot run in a Linux machine",
                 "the name of a Linux program")
        return ("",)
    if name.startswith("/") or not (copied or is_there(plain, plan.where)):
        if copied or "/" not in name:
            plan.say(Level.NOTE, element.line, "machines-program",
                     f"{shown(name)} is a program of the machine's image")
        return (name,)
    logical = values.name(Element(element.name, element.line, plain), plan.findings)
    if logical is None:
        return ("",)
    _input(logical, element, plan, names)
    given = plan.inputs.get(logical)
    if given is not None and exists(given.source) and not os.access(given.source, os.X_OK):
        return ("/bin/sh", "-c", _MADE_EXECUTABLE, f"./{logical}")
    return (f"./{logical}",)


def _arguments(block: Element, element: Element | None, plan: _Plan, *, append: bool) -> list[str]:
    line = values.text(element, plan.findings) if element is not None else ""
    if append:
        line = " ".join([line, *plan.where.arguments])
    found = words(line)
    for word in found:
        # A logical name, by VMwrapper's rule; what is not in the slot is the machine's.
        plain = word.removeprefix("./")
        if plain != word and ".." not in plain.split("/") and exists(plan.where.directory / plain):
            _input(plain, element or block, plan, dict.fromkeys(STREAMS))
    shell_words(found, element or block, plan.findings)
    return found


def _job(root: Element, plan: _Plan) -> Job:
    where = plan.where
    if not plan.tasks:
        plan.say(Level.ERROR, root.line, "no-task", "there is no <task>", "<task>")
    # A task for the volunteer's computer sees all of the slot, so then the machine does.
    folders = (job_folder(where),) if plan.on_host else ()
    return Job(tasks=(*plan.unpacking, *plan.tasks), folders=folders,
               inputs=() if folders else tuple(plan.inputs.values()),
               outputs=() if folders else tuple(plan.outputs.values()),
               image=plan.images[0] if plan.images else Job.image,
               cpus=where.cpus or 1, memory_mb=memory(where), cpu="baseline")
