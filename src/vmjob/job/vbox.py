"""Reads ``vbox_job.xml``, the job file of BOINC's vboxwrapper (release 26212), as that reads it.

Where a job has a disk image of its own, its guest does what it does under VirtualBox. Where it has
none, it runs in vmjob's image by the contract of BOINC's stock image: the folder ``shared`` is
/root/shared, and ``boinc_app`` in it is the program.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vmjob.errors import BadPath
from vmjob.job import values
from vmjob.job.files import INIT_DATA, Folder
from vmjob.job.links import exists, read_bounded, resolved
from vmjob.job.logical import resolve
from vmjob.job.mailbox import mailbox
from vmjob.job.markup import MAX_BYTES, Element, parse, shown
from vmjob.job.model import LEAST_MEMORY_MB as LEAST_OF_ANY_MB
from vmjob.job.model import (
    MAILBOX_HALF,
    MOST_MEMORY_MB,
    Forward,
    Hardware,
    Job,
    Network,
    Task,
    Triggers,
)
from vmjob.job.reading import Finding, Level, Reading, Surroundings
from vmjob.job.secrets import redacted
from vmjob.job.vbox_elements import (
    CONTROLLER_MODELS,
    CONTROLLER_TYPES,
    FLAGS,
    FORWARD,
    KNOWN,
    LISTS,
    NAMES,
    NOT_NEEDED,
    NUMBERS,
    PORTS,
    outdated,
)

__all__ = ["LEAST_MEMORY_MB", "NOT_SHARED", "read"]

LANGUAGE = ROOT = "vbox_job"

#: vboxwrapper raises what is less.
LEAST_MEMORY_MB = 512
MOST_PORT = 65_535
#: Ports of this computer that one job may want.
MOST_FORWARDS = 1024
#: A checkpoint less often than this is a slip, or meant as `disable_automatic_checkpoints`.
RARE = 86_400.0

WITHOUT_DISK = "without a disk image of its own the job runs boinc_app in vmjob's"

#: What a slot that is shared as a whole keeps to itself: the client's files, vboxwrapper's, ours.
#: Names at its top, ``*`` for any characters. Not `boinc_*`: boinc_app is the job. This file too: a
#: guest that rewrites it would grant itself a network when the job is continued.
NOT_SHARED = (
    "vbox_job.xml",
    "boinc_mmap_file", "boinc_lockfile", "boinc_setup_complete", "boinc_finish_called",
    "boinc_temporary_exit", "boinc_task_state.xml", "boinc_ufr_*", "boinc_ufs_*", "lockfile",
    "stderr.txt", "graphics_status.xml", "trickle_up.xml", "vmjob",
    "vmjob_*",
    "vbox_checkpoint.*", "vbox_webapi.xml", "vbox_remote_desktop.xml", "vbox_trace.txt",
    "vbox_replay.txt", "vbox_screenshot.png", "vm_image*.vdi", "vm_cache.vdi",
    "vm_isocontext.iso", "vm_floppy*.img")

#: The name that vboxwrapper gives to the file at the end of a duration.
OUTPUT = "output"
#: The name that vboxwrapper gives to the picture.
SCREENSHOT = "vbox_screenshot.png"
#: The mode of a program is lost where a file went through a project's server; /bin/sh also runs a
#: script that lacks its first line.
BOINC_APP = ("/bin/sh", "-c", "chmod +x ./boinc_app; exec ./boinc_app")


@dataclass
class _Given:
    """What a file says, by the names of its elements."""

    flags: dict[str, bool] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    forwards: list[Forward] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)

    def on(self, name: str) -> bool:
        return self.flags.get(name, False)

    def number(self, name: str) -> float:
        return self.numbers.get(name, NUMBERS[name])

    def all(self, name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.lists.get(name, ())))


def read(data: bytes, where: Surroundings) -> Reading:
    """Read a ``vbox_job.xml``; never raises.

    Looks at files of ``where`` only for whether the disks that the file speaks of are there, and
    for ``init_data.xml`` where the machine is to have it.
    """
    document = parse(data)
    findings = list(document.findings)
    root = _root(document.roots, findings)
    job = None
    if root is not None:
        given = _elements(root, findings)
        _combinations(given, findings)
        job = _job(given, where, findings)
    if any(each.level is Level.ERROR for each in findings):
        job = None
    findings.sort(key=lambda each: each.line)
    return Reading(LANGUAGE, tuple(findings), job)


# -- what is written -------------------------------------------------------------------------


def _root(roots: tuple[Element, ...], findings: list[Finding]) -> Element | None:
    found = [root for root in roots if root.name == ROOT]
    if not found:
        if not any(each.level is Level.ERROR for each in findings):
            names = ", ".join(f"<{shown(root.name)}>" for root in roots[:3]) or "nothing"
            _add(findings, Level.ERROR, roots[0].line if roots else 1, "no-root",
                 f"there is no <{ROOT}> but {names}", f"<{ROOT}>...</{ROOT}>")
        return None
    for root in roots:
        if root is not found[0]:
            _add(findings, Level.WARNING, root.line, "second-root",
                 f"<{shown(root.name)}> besides the <{ROOT}> of line {found[0].line} is not read")
    return found[0]


def _elements(root: Element, findings: list[Finding]) -> _Given:
    given = _Given()
    for element in root.children:
        name = element.name
        if name not in KNOWN:
            _unknown(element, findings)
            continue
        if name in LISTS or name == "port_forward":
            given.lines.setdefault(name, element.line)
        else:
            if name in given.lines:
                _add(findings, Level.WARNING, element.line, "twice",
                     f"<{name}> was there in line {given.lines[name]} already; this one counts")
            given.lines[name] = element.line
        _one(element, given, findings)
    return given


def _one(element: Element, given: _Given, findings: list[Finding]) -> None:
    name = element.name
    if name in FLAGS:
        given.flags[name] = values.boolean(element, findings)
    elif name in NUMBERS:
        most = MOST_MEMORY_MB if name == "memory_size_mb" else 1e15
        given.numbers[name] = values.number(element, findings, default=NUMBERS[name], least=0,
                                            most=most)
    elif name in PORTS:
        given.ports[name] = values.integer(element, findings, least=0, most=MOST_PORT)
    elif name in NAMES or name in LISTS:
        if (value := values.name(element, findings)) is None:
            return
        if name in NAMES:
            given.names[name] = value
        else:
            given.lists.setdefault(name, []).append(value)
    elif name == "port_forward":
        given.forwards += _forwards(element, findings)
    else:
        given.texts[name] = values.text(element, findings)
        _controller(element, findings)
    if name in NOT_NEEDED and given.flags.get(name, True):
        _add(findings, Level.NOTE, element.line, "not-needed",
             f"<{name}> is not needed: {NOT_NEEDED[name]}")


def _unknown(element: Element, findings: list[Finding], among: frozenset[str] = KNOWN) -> None:
    name = element.name
    instead = outdated(name)
    if instead is not None:
        _add(findings, Level.WARNING, element.line, "outdated",
             f"<{name}> is of an older release; vboxwrapper 26212 does not know it, nor does vmjob",
             instead)
        return
    near = difflib.get_close_matches(name[:80], sorted(among), 1, 0.6)
    _add(findings, Level.WARNING, element.line, "unknown-element",
         f"<{shown(name)}> is not known, so it sets nothing", f"<{near[0]}>" if near else "")


def _controller(element: Element, findings: list[Finding]) -> None:
    known = {"vm_disk_controller_type": CONTROLLER_TYPES,
             "vm_disk_controller_model": CONTROLLER_MODELS}.get(element.name)
    if known is None or not element.text:
        return
    if element.text.lower() not in (each.lower() for each in known):
        near = difflib.get_close_matches(element.text[:40], known, 1, 0.5)
        _add(findings, Level.WARNING, element.line, "unknown-value",
             f"<{element.name}> {shown(element.text)} is none that VirtualBox knows",
             near[0] if near else "one of " + ", ".join(known))


def _forwards(block: Element, findings: list[Finding]) -> list[Forward]:
    """The ports of one <port_forward>; none where it lacks one of the two."""
    ports: dict[str, int] = {"nports": 1}
    remote = False
    before = sum(each.level is Level.ERROR for each in findings)
    for element in block.children:
        if element.name == "is_remote":
            remote = values.boolean(element, findings)
        elif element.name in FORWARD:
            ports[element.name] = values.integer(element, findings, least=1, most=MOST_PORT)
        else:
            _unknown(element, findings, FORWARD)
    for name in ("host_port", "guest_port"):
        if name not in ports:
            _add(findings, Level.ERROR, block.line, "incomplete",
                 f"<port_forward> has no <{name}>", "both host_port and guest_port")
    if sum(each.level is Level.ERROR for each in findings) > before:
        return []
    count, host, guest = ports["nports"], ports["host_port"], ports["guest_port"]
    if count > MOST_FORWARDS or max(host, guest) + count - 1 > MOST_PORT:
        _add(findings, Level.ERROR, block.line, "out-of-range",
             f"<port_forward> with {count} ports from {host} to {guest}: at most {MOST_FORWARDS}, "
             f"and none above {MOST_PORT}")
        return []
    if remote:
        _add(findings, Level.WARNING, block.line, "remote-port",
             f"port {host} is for other computers as well; only if this one's user allows it")
    return [Forward(guest + i, host + i, remote=remote) for i in range(count)]


# -- what does not go together ---------------------------------------------------------------


def _combinations(given: _Given, findings: list[Finding]) -> None:
    for first, second in (("share_slot_dir", "enable_shared_directory"),
                          ("share_slot_dir", "copy_to_shared"),
                          ("share_project_dir", "enable_scratch_directory")):
        if given.on(first) and (given.on(second) or given.lists.get(second)):
            line = max(given.lines[first], given.lines[second])
            _add(findings, Level.ERROR, line, "contradiction",
                 f"<{first}> and <{second}> exclude each other; vboxwrapper ends with 206",
                 "one of the two")
    shared = given.on("enable_shared_directory")
    if given.lists.get("copy_to_shared") and not shared and not given.on("share_slot_dir"):
        _add(findings, Level.ERROR, given.lines["copy_to_shared"], "needs-shared",
             "<copy_to_shared> without <enable_shared_directory>; vboxwrapper ends with 206",
             "<enable_shared_directory/> as well")
    if not shared and not given.on("share_slot_dir"):
        for name in ("completion_trigger_file", "temporary_exit_trigger_file", "heartbeat_filename",
                     "fraction_done_filename", "trickle_trigger_file", "intermediate_upload_file"):
            if given.names.get(name) or given.lists.get(name):
                _add(findings, Level.WARNING, given.lines[name], "needs-shared",
                     f"<{name}> names a file of a shared folder, and there is none",
                     "<enable_shared_directory/> as well")
    for name, needed in (("copy_cmdline_to_shared", "enable_shared_directory"),
                         ("network_bridged_mode", "enable_network"),
                         ("enable_cern_dataformat", "enable_floppyio"),
                         ("enable_cache_disk", "enable_isocontextualization")):
        if given.on(name) and not given.on(needed):
            _no_effect(given, findings, name, f"without <{needed}>", f"<{needed}/> as well")
    if "minimum_heartbeat_interval" in given.lines and "heartbeat_filename" not in given.lines:
        _no_effect(given, findings, "minimum_heartbeat_interval", "without <heartbeat_filename>")
    if "fraction_done_filename" in given.names and given.number("job_duration"):
        _no_effect(given, findings, "fraction_done_filename",
                   "with <job_duration>, which decides the fraction done")
    _ports(given, findings)
    _ways(given, findings)


def _ports(given: _Given, findings: list[Finding]) -> None:
    guest, host = given.ports.get("pf_guest_port", 0), given.ports.get("pf_host_port", 0)
    if host and not guest:
        _no_effect(given, findings, "pf_host_port", "without <pf_guest_port>")
    elif guest:
        given.forwards.insert(0, Forward(guest, host, web=True))
        if host:
            _add(findings, Level.NOTE, given.lines["pf_host_port"], "port-taken",
                 f"when port {host} is taken, another free one is used and announced",
                 "0, for any that is free")
    if len(given.forwards) > MOST_FORWARDS:
        _add(findings, Level.ERROR, given.lines["port_forward"], "out-of-range",
             f"{len(given.forwards)} ports are forwarded; at most {MOST_FORWARDS}")
    wanted = Counter(each.host_port for each in given.forwards if each.host_port)
    for port, times in sorted(wanted.items()):
        if times > 1:
            _add(findings, Level.WARNING, given.lines.get("port_forward", 0), "port-twice",
                 f"port {port} of this computer is to lead to {times} ports of the machine; "
                 "the first has it")
    if given.forwards and not given.on("enable_network"):
        name = "port_forward" if "port_forward" in given.lines else "pf_guest_port"
        _no_effect(given, findings, name, "without <enable_network>", "<enable_network/> as well")


def _ways(given: _Given, findings: list[Finding]) -> None:
    """What is done in another way here than under VirtualBox."""
    if given.on("network_bridged_mode") and given.on("enable_network"):
        _add(findings, Level.NOTE, given.lines["network_bridged_mode"], "bridged",
             "bridged mode needs privileges on this computer; NAT is used")
    if given.on("enable_remotedesktop"):
        _add(findings, Level.NOTE, given.lines["enable_remotedesktop"], "remote-desktop",
             "the screen is shown by VNC, to this computer only and with a password, not by RDP")
    if given.on("enable_graphics_support"):
        _add(findings, Level.NOTE, given.lines["enable_graphics_support"], "no-status-file",
             "graphics_status.xml is written where the BOINC client runs the job and the "
             "application has a graphics_app; `vmjob job run --events` tells the same")
    interval = given.number("minimum_checkpoint_interval")
    if interval > RARE and not given.on("disable_automatic_checkpoints"):
        _add(findings, Level.NOTE, given.lines["minimum_checkpoint_interval"], "rare-checkpoints",
             f"a checkpoint every {interval / 86400:.1f} days: a crash costs as much",
             "less, or <disable_automatic_checkpoints/>")


# -- what it becomes -------------------------------------------------------------------------


def _job(given: _Given, where: Surroundings, findings: list[Finding]) -> Job:
    network = given.on("enable_network")
    hardware = _hardware(given, where, findings)
    own = hardware.disk is not None or hardware.iso is not None
    shared = given.on("enable_shared_directory") or given.on("share_slot_dir")
    if not own and not shared:
        _add(findings, Level.WARNING, given.lines.get("enable_shared_directory", 0), "needs-shared",
             "no folder is shared: without a disk image of its own the job has no boinc_app",
             "<enable_shared_directory/>")
    triggers = _triggers(given)
    if triggers != Triggers() and not shared:
        _add(findings, Level.WARNING, 0, "needs-shared",
             "trigger files are looked for in the shared folder, and no folder is shared",
             "<enable_shared_directory/>")
        triggers = Triggers()
    task = Task(BOINC_APP, cwd="/root/shared", user="root", name="boinc_app")
    interval: float | None = given.number("minimum_checkpoint_interval") or None
    return Job(
        tasks=() if own else (task,),
        memory_mb=_memory(given, where, findings),
        cpus=where.cpus or 1,
        network=Network.NAT if network else Network.NONE,
        cpu="baseline",
        folders=_folders(given, where, findings),
        triggers=triggers,
        duration=given.number("job_duration") or None,
        duration_file=_duration_file(given, where, findings),
        checkpoint_every=0.0 if given.on("disable_automatic_checkpoints") else interval,
        forwards=tuple(given.forwards) if network else (),
        announce=(where.directory if hardware.display or any(
            forward.web for forward in given.forwards) else None),
        hardware=hardware)


def _duration_file(given: _Given, where: Surroundings, findings: list[Finding]) -> Path | None:
    """CERN's projects wait for a file `output` of the slot, or what its link names."""
    if not given.on("enable_cern_dataformat") or not given.number("job_duration"):
        return None
    try:
        return resolve(OUTPUT, where)
    except BadPath as error:
        _add(findings, Level.ERROR, given.lines["enable_cern_dataformat"], "bad-link",
             error.message)
        return None


def _memory(given: _Given, where: Surroundings, findings: list[Finding]) -> int:
    if where.memory_mb is not None:
        return max(LEAST_OF_ANY_MB, math.ceil(where.memory_mb))
    wanted = given.number("memory_size_mb")
    if "memory_size_mb" not in given.lines:
        _add(findings, Level.WARNING, 0, "memory-missing",
             f"there is no <memory_size_mb>; {LEAST_MEMORY_MB} MiB are used", "<memory_size_mb>")
    elif wanted < LEAST_MEMORY_MB:
        _add(findings, Level.NOTE, given.lines["memory_size_mb"], "memory-raised",
             f"{wanted:g} MiB of memory are raised to {LEAST_MEMORY_MB}, as vboxwrapper does")
    return max(LEAST_MEMORY_MB, math.ceil(wanted))


def _folders(given: _Given, where: Surroundings, findings: list[Finding]) -> tuple[Folder, ...]:
    project = _project(where)
    folders = []
    if given.on("share_slot_dir"):
        folders.append(Folder("shared", where.directory, "/root/shared", links=True,
                              without=NOT_SHARED))
    elif given.on("enable_shared_directory"):
        texts = {}
        copies = [name for name in given.all("copy_to_shared") if name != INIT_DATA]
        if INIT_DATA in given.all("copy_to_shared"):
            _add(findings, Level.NOTE, given.lines["copy_to_shared"], "redacted",
                 f"{INIT_DATA} goes in without the account's key and the proxy's password")
            if (init_data := _init_data(where)) is not None:
                texts[INIT_DATA] = redacted(init_data)
        if given.on("copy_cmdline_to_shared"):
            texts["cmdline"] = " ".join(where.arguments)
        folders.append(Folder("shared", where.directory / "shared", "/root/shared",
                              copies=tuple(where.directory / name for name in copies), texts=texts))
    if given.on("share_project_dir"):
        folders.append(Folder("project", project, "/root/project", writable=False))
    elif given.on("enable_scratch_directory"):
        folders.append(Folder("scratch", project / "scratch", "/root/scratch"))
    return tuple(folders)


def _triggers(given: _Given) -> Triggers:
    fraction = given.names.get("fraction_done_filename")
    return Triggers(
        completion=given.names.get("completion_trigger_file"),
        temporary_exit=given.names.get("temporary_exit_trigger_file"),
        fraction_done=None if given.number("job_duration") else fraction,
        heartbeat=given.names.get("heartbeat_filename"),
        heartbeat_interval=(given.number("minimum_heartbeat_interval")
                            or NUMBERS["minimum_heartbeat_interval"]),
        trickles=given.all("trickle_trigger_file"),
        uploads=given.all("intermediate_upload_file"))


def _hardware(given: _Given, where: Surroundings, findings: list[Finding]) -> Hardware:
    iso = given.on("enable_isocontextualization")
    both = given.on("boot_iso") and not iso
    number = "" if where.image_number is None else f"_{where.image_number}"
    named = given.names.get("multiattach_vdi_file")
    disk = None
    if not iso:
        if named:
            disk = _media(_project(where), named, findings,
                          given.lines["multiattach_vdi_file"])
        else:
            line = None if where.image_number is None else 0
            disk = _media(where.directory, f"vm_image{number}.vdi", findings, line)
    image = None
    if iso or both:
        line = given.lines["enable_isocontextualization" if iso else "boot_iso"]
        image = _media(where.directory, "vm_isocontext.iso", findings, line)
    cache = None
    if iso and given.on("enable_cache_disk"):
        cache = _media(where.directory, "vm_cache.vdi", findings, given.lines["enable_cache_disk"],
                       "without it the machine has one disk less")
    return Hardware(
        disk=disk, iso=image, iso_first=both and image is not None and disk is not None,
        cache_disk=cache, mailbox=_mailbox(given, where, findings),
        display=given.on("enable_remotedesktop"),
        screenshot=(where.directory / SCREENSHOT if given.on("enable_screenshots_on_error")
                    else None))


def _media(directory: Path, name: str, findings: list[Finding], line: int | None,
           without: str = WITHOUT_DISK) -> Path | None:
    """The disk image, if it is there; ``line``: that of who asked for it (None: nobody did)."""
    path = resolved(directory / name)
    if exists(path):
        return path
    if line is not None:
        _add(findings, Level.NOTE, line, "no-disk-image",
             f"{shown(name)} is not there now; {without}")
    return None


def _mailbox(given: _Given, where: Surroundings, findings: list[Finding]) -> bytes | None:
    if not given.on("enable_floppyio"):
        return None
    line = given.lines["enable_floppyio"]
    _add(findings, Level.NOTE, line, "redacted",
         f"{INIT_DATA} goes in without the account's key and the proxy's password")
    init_data = _init_data(where)
    if init_data is None:
        return b""
    content = mailbox(init_data, cern=given.on("enable_cern_dataformat"))
    if len(content) == MAILBOX_HALF - 1:
        _add(findings, Level.NOTE, line, "mailbox-full",
             f"{INIT_DATA} is longer than the floppy disk's buffer; its end is cut off")
    return content


def _project(where: Surroundings) -> Path:
    """The project's directory; without a client it is `project`, as BOINC has it."""
    return where.project or where.directory / "project"


def _init_data(where: Surroundings) -> str | None:
    data = read_bounded(where.directory / INIT_DATA, MAX_BYTES)
    return None if data is None else data.decode("utf-8", "replace")


# -- findings --------------------------------------------------------------------------------


def _no_effect(given: _Given, findings: list[Finding], name: str, why: str,
               instead: str = "") -> None:
    _add(findings, Level.WARNING, given.lines[name], "no-effect", f"<{name}> does nothing {why}",
         instead)


def _add(findings: list[Finding], level: Level, line: int, code: str, what: str,
         instead: str = "") -> None:
    findings.append(Finding(level, line, code, what, instead))
