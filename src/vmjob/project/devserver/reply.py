"""Writing what the scheduler answers: from records to the text that clients read.

Clients read parts of this line by line, so each tag stands on a line of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from vmjob.project.devserver.records import Job, Offer, ServedFile, Trickle
from vmjob.project.devserver.request import HeldVersion
from vmjob.project.tags import block, flag, tag
from vmjob.project.version import VersionFile

__all__ = ["Assignment", "Message", "Reply", "master_page", "project_config", "reply_text"]

#: A version of BOINC's scheduler that knows all that is sent here.
SCHEDULER_VERSION = 713
#: The speed that is promised for an app version; with it the client makes the limit of elapsed
#: time, ``fpops_bound / flops``, the same on every computer.
FLOPS = 1e9


@dataclass(frozen=True)
class Message:
    """For the volunteer. ``priority``: ``low`` is the client's log, ``notice`` the Manager's."""

    text: str
    priority: str = "low"


@dataclass(frozen=True)
class Assignment:
    """A job and what it is to run with: an offer, or what the client brought itself."""

    job: Job
    offer: Offer | None
    held: HeldVersion | None = None


@dataclass
class Reply:
    """All that one reply may hold. Delays are seconds; None: not mentioned."""

    url: str
    project: str
    request_delay: float
    next_rpc_delay: float | None = None
    host_id: int | None = None
    key_text: str | None = None
    preferences: str = ""
    messages: list[Message] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    acknowledge_trickles: bool = False
    trickles: list[Trickle] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)


def master_page(url: str) -> str:
    """What a client reads first, for the scheduler's address."""
    return (f'<html><head>\n<link rel="boinc_scheduler" href="{url}cgi">\n</head>\n<body>\n'
            "<p>A development server of vmjob: not a project for volunteers.</p>\n"
            f"<!--\n<scheduler>{url}cgi</scheduler>\n-->\n</body></html>\n")


def project_config(url: str, project: str, platforms: Iterable[str]) -> str:
    """What the Manager asks for before it attaches."""
    names = [block("platform", [tag("platform_name", each)]) for each in platforms]
    return block("project_config", [tag("name", project), tag("master_url", url),
                                    tag("web_rpc_url_base", url), tag("min_passwd_length", 6),
                                    block("platforms", names)])


def reply_text(reply: Reply) -> str:
    """The whole reply."""
    parts = [tag("scheduler_version", SCHEDULER_VERSION), flag("dont_use_dcf", True),
             tag("master_url", reply.url), tag("request_delay", reply.request_delay),
             tag("project_name", reply.project), tag("userid", 1), tag("user_name", "volunteer")]
    if reply.next_rpc_delay is not None:
        parts.append(tag("next_rpc_delay", reply.next_rpc_delay))
    if reply.preferences:
        # Only what is in <project_specific> reaches the app.
        parts.append(block("project_preferences", [
            tag("resource_share", 100), block("project_specific", [f"{reply.preferences}\n"])]))
    if reply.host_id is not None:
        parts.append(tag("hostid", reply.host_id))
    if reply.key_text is not None:
        parts.append(block("code_sign_key", [reply.key_text]))
    for message in reply.messages:
        line = tag("message", " ".join(message.text.split()))
        parts.append(line.replace("<message>", f'<message priority="{message.priority}">', 1))
    parts += [block("result_ack", [tag("name", each)]) for each in reply.acknowledged]
    parts.append(flag("message_ack", reply.acknowledge_trickles))
    parts += [block("trickle_down", [tag("result_name", each.result), tag("time", each.time),
                                     f"{each.text}\n"]) for each in reply.trickles]
    parts += [block("result_abort", [tag("name", each)]) for each in reply.aborts]
    return block("scheduler_reply", [*parts, *_work(reply.assignments, reply.url)])


def _work(assignments: list[Assignment], url: str) -> list[str]:
    """Apps, their files and versions once each, then the jobs."""
    parts: dict[str, None] = {}
    for each in assignments:
        parts[block("app", [tag("name", each.job.app),
                            tag("user_friendly_name", each.job.app)])] = None
    for each in assignments:
        if each.offer is not None:  # a client with an app_info.xml refuses versions of the server
            for file in each.offer.version.files:
                parts[_app_file(file, each.offer, url)] = None
            parts[_app_version(each.offer)] = None
    for each in assignments:
        parts[_job(each, url)] = None
    return list(parts)


def _file(file: ServedFile, url: str, *more: str) -> str:
    return block("file_info", [tag("name", file.name), tag("url", f"{url}download/{file.name}"),
                               *more, tag("nbytes", file.nbytes), tag("md5_cksum", file.md5)])


def _app_file(file: VersionFile, offer: Offer, url: str) -> str:
    return _file(offer.files[file.physical_name], url, flag("executable", file.executable),
                 block("file_signature", [offer.signatures[file.physical_name]]))


def _app_version(offer: Offer) -> str:
    version = offer.version
    references = [block("file_ref", [
        tag("file_name", each.physical_name),
        tag("open_name", each.logical_name) if each.logical_name else "",
        flag("main_program", each.main_program), flag("copy_file", each.copy_file)])
        for each in version.files]
    return block("app_version", [
        tag("app_name", version.app), tag("version_num", version.version_num),
        tag("platform", version.platform), tag("plan_class", version.plan_class),
        tag("api_version", version.api_version), tag("avg_ncpus", 1.0), tag("flops", FLOPS),
        tag("is_wrapper", 1) if version.is_wrapper else "",
        flag("needs_network", version.needs_network),
        tag("file_prefix", version.file_prefix) if version.file_prefix else "", *references])


def _job(assignment: Assignment, url: str) -> str:
    job = assignment.job
    files = [_file(each.file, url) for each in job.inputs]
    references = [block("file_ref", [tag("file_name", each.file.name),
                                     tag("open_name", each.open_name),
                                     flag("copy_file", each.copy)]) for each in job.inputs]
    workunit = block("workunit", [
        tag("name", job.workunit), tag("app_name", job.app),
        tag("rsc_fpops_est", job.fpops_est), tag("rsc_fpops_bound", job.fpops_bound),
        tag("rsc_memory_bound", job.memory_bound), tag("rsc_disk_bound", job.disk_bound),
        tag("command_line", f"\n{job.command_line}\n"), *references])
    outputs, output_references = [], []
    for number, logical in enumerate(job.outputs):
        name = job.output_name(number)
        outputs.append(block("file_info", [
            tag("name", name), flag("generated_locally", True), flag("upload_when_present", True),
            tag("max_nbytes", job.max_nbytes), tag("url", f"{url}file_upload_handler"),
            block("xml_signature", [".\n"])]))
        output_references.append(block("file_ref", [
            tag("file_name", name), tag("open_name", logical),
            flag("copy_file", logical in job.copy_outputs)]))
    what = assignment.offer.version if assignment.offer is not None else assignment.held
    assert what is not None
    result = block("result", [
        tag("name", job.name), tag("wu_name", job.workunit), tag("platform", what.platform),
        tag("version_num", what.version_num), tag("plan_class", what.plan_class),
        tag("report_deadline", time.time() + job.delay_bound), flag("report_immediately", True),
        *output_references])
    return "".join([*files, workunit, *outputs, result])
