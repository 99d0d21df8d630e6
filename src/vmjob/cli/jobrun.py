"""``vmjob job run``: a job file of any language, from its first task to its last file."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click

from vmjob.cli.carrying import How, carry, leave
from vmjob.cli.hypervisors import hypervisor_options
from vmjob.cli.run import CHECKPOINT_EVERY
from vmjob.errors import JobFileInvalid, UsageError
from vmjob.job.model import Job
from vmjob.job.packages import with_packages
from vmjob.job.reading import Level, Reading, Surroundings
from vmjob.job.sporadic import sporadic as told_to_compute
from vmjob.machine.contract import Priority

__all__ = ["apart", "run", "wanted"]


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--directory", type=click.Path(path_type=Path, exists=True, file_okay=False),
              metavar="DIR", help="Where the files are that FILE names; default: beside FILE.")
@click.option("--project", type=click.Path(path_type=Path, exists=True, file_okay=False),
              metavar="DIR", help="The project's directory, for files that name one.")
@click.option("--image", metavar="NAME", help="Another image than FILE says.")
@click.option("--cpus", "--nthreads", type=int, metavar="N",
              help="Virtual processors, whatever FILE says.")
@click.option("--memory", "--memory_size_mb", type=float, metavar="MB",
              help="Memory of the machine, MiB, whatever FILE says.")
@click.option("--vmimage", type=int, metavar="N", help="Use vm_image_N.vdi as the job's disk.")
@click.option("--trickle", type=click.FloatRange(min=1), metavar="S",
              help="Send a trickle with the run time every S seconds.")
@click.option("--sporadic", is_flag=True, help="Tell the job that it may compute now: shared/ca.")
@click.option("--register_only", is_flag=True,
              help="Make everything ready for the job's machine, and do not run it.")
@hypervisor_options
@click.option("--cpu", metavar="host|baseline|MODEL",
              help="Default: what FILE says, else baseline: the same answers everywhere.")
@click.option("--stdin", default="none", metavar="auto|none|FILE", show_default=True,
              help="Input of the first task.")
@click.option("--cold", is_flag=True, help="Boot the machine instead of copying a frozen one.")
@click.option("--allow-remote-ports", is_flag=True,
              help="Let other computers reach the ports that FILE opens for them.")
@click.option("--slot", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Keep everything of the job in DIR, so that `vmjob run --resume DIR` goes on.")
@click.option("--checkpoint-every", type=click.FloatRange(min=1), metavar="S",
              help="With --slot: seconds between checkpoints, whatever FILE says.")
@click.option("--slot-limit", type=click.IntRange(min=1), metavar="MB",
              help="The most that the slot may take on the disk, MiB; default: what there is.")
@click.option("--stop-deadline", type=click.FloatRange(min=0), default=60, show_default=True,
              metavar="S", help="With a slot: seconds for a last checkpoint after SIGTERM.")
@click.option("--priority", type=click.Choice([p.value for p in Priority]), default="low",
              show_default=True, help="low: the job gets only what no other program wants.")
@click.option("--keep-on-failure", is_flag=True,
              help="Keep the machine's logs below ./vmjob-failed/ when the job fails.")
@click.option("--events", metavar="FILE|-",
              help="Write what happens as JSON lines; with -, nothing else goes to stdout.")
@click.option("--json", "as_json", is_flag=True,
              help="Print one record at the end (the job's output goes to stderr).")
@click.option("--quiet", "-q", is_flag=True, help="No progress, no warnings.")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARG...]")
def run(file: Path, directory: Path | None, project: Path | None, image: str | None,
        cpus: int | None, memory: float | None, vmimage: int | None, trickle: float | None,
        sporadic: bool, register_only: bool, hypervisor: str, accel: str, cpu: str | None,
        stdin: str, cold: bool,
        allow_remote_ports: bool, slot: Path | None, checkpoint_every: float | None,
        slot_limit: int | None, stop_deadline: float, priority: str, keep_on_failure: bool,
        events: str | None, as_json: bool, quiet: bool, arguments: tuple[str, ...]) -> NoReturn:
    """Run a job file: vbox_job.xml, job.xml of either kind, or TOML.

    The exit code is the job's own; 75 when the job asks to be continued later, 125 when vmjob
    itself failed. ARGs go to the tasks that want the wrapper's arguments.

    \b
    Examples:
      vmjob job run job.toml
      vmjob job run --slot slot1 --events events.jsonl job.xml
      vmjob job run --nthreads 2 --memory_size_mb 1024 vbox_job.xml
    """
    from vmjob.job.languages import read_file

    if memory is not None and not 0 < memory < math.inf:
        raise UsageError(f"{memory} is no size of a memory")
    if arguments[:1] == ("--",):  # it ends vmjob's options; it is none of the job's words
        arguments = arguments[1:]
    where = Surroundings((directory or file.parent).absolute(),
                         project.absolute() if project else None, arguments, cpus, memory, vmimage)
    reading = read_file(file, where)
    job = wanted(reading, file, quiet=quiet)
    job = replace(job, image=image or job.image, cpus=cpus or job.cpus,
                  memory_mb=round(memory) if memory else job.memory_mb,
                  trickle_every=trickle or job.trickle_every)
    if sporadic:
        job = told_to_compute(job)
    job = apart(with_packages(job), slot, None if events in (None, "-") else Path(events))
    how = How(accel=accel, cpu=cpu or job.cpu or "baseline", cold=cold, stdin=stdin, slot=slot,
              every=_every(job, checkpoint_every) if slot else None, slot_limit=slot_limit,
              stop_deadline=stop_deadline, priority=Priority(priority), keep=keep_on_failure,
              as_json=as_json, quiet=quiet, events=events, prepare_only=register_only,
              remote_ports=allow_remote_ports, hypervisor=hypervisor)
    leave(asyncio.run(carry(job, how)))


def wanted(reading: Reading, file: Path, *, quiet: bool) -> Job:
    """The job that was read; warnings are printed. Raises `JobFileInvalid` when there is none."""
    found = [f"{file}:{each.line}: {each.what}" for each in reading.findings
             if each.level is Level.WARNING]
    if not quiet:
        for each in found:
            click.echo(f"vmjob: warning: {each}", err=True)
    if reading.job is None:
        errors = [each for each in reading.findings if each.level is Level.ERROR]
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise JobFileInvalid(f"{file}:{first.line}: {first.what}{more}",
                             advice=first.instead or None)
    return reading.job


def apart(job: Job, *ours: Path | None) -> Job:
    """The same job with what is ours left out of its folders.

    A guest that writes into its slot decides what is run, and with which folders of this computer,
    when it is continued. Raises `UsageError` where more than that would have to be left out.
    """
    folders = []
    for folder in job.folders:
        source = folder.source.resolve()
        for path in filter(None, ours):
            there = path.resolve()
            if not there.is_relative_to(source):
                continue
            parts = there.relative_to(source).parts
            if len(parts) != 1:
                raise UsageError(f"{str(path)!r} is inside the job's folder {folder.name!r}",
                                 advice=f"Put it beside {str(folder.source)!r}.")
            folder = replace(folder, without=(*folder.without, *parts))
        folders.append(folder)
    return replace(job, folders=tuple(folders))


def _every(job: Job, asked: float | None) -> float | None:
    """Seconds between checkpoints; None: only a last one."""
    if asked is not None:
        return asked
    if job.checkpoint_every is None:
        return CHECKPOINT_EVERY
    return job.checkpoint_every or None
