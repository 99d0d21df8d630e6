"""``vmjob run``: one command in a throw-away virtual machine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click

from vmjob.cli.carrying import How, carry, leave
from vmjob.cli.hypervisors import hypervisor_options
from vmjob.errors import UsageError
from vmjob.job.files import parse_input, parse_output
from vmjob.job.model import DEFAULT_STREAM_LIMIT, Job, Network, OnFlood, Task
from vmjob.machine.contract import Priority

__all__ = ["environment_of", "run"]

MIB = 1 << 20
#: Seconds between the checkpoints of a job in a slot, unless told otherwise: what a crash costs at
#: most, while a checkpoint takes half a second of another core.
CHECKPOINT_EVERY = 300.0


@click.command(context_settings={"ignore_unknown_options": False,
                                 "allow_interspersed_args": False})
@click.option("--image", default="default", show_default=True, metavar="NAME",
              help="Image to boot; the default one is built when it is missing.")
@click.option("--in", "inputs", multiple=True, metavar="SRC[:DST]",
              help="Copy a file or directory in; DST is relative to the job's directory.")
@click.option("--out", "outputs", multiple=True, metavar="GUEST[:HOST]",
              help="Copy a file or directory out when the job has ended.")
@click.option("--env", "environment", multiple=True, metavar="K=V",
              help="Set an environment variable of the job.")
@click.option("--cpus", default=1, show_default=True, metavar="N", help="Virtual processors.")
@click.option("--memory", default=512, show_default=True, metavar="MB",
              help="Memory of the machine, MiB.")
@click.option("--disk", default=10, show_default=True, metavar="GB",
              help="The most that the machine may write to its disk, GiB.")
@click.option("--time-limit", type=float, metavar="S",
              help="End the job after S seconds (the boot does not count).")
@click.option("--network", type=click.Choice([n.value for n in Network]), default="none",
              show_default=True, help="What the job can reach.")
@hypervisor_options
@click.option("--cpu", default="host", show_default=True, metavar="host|baseline|MODEL",
              help="host: the fastest. baseline: the same answers on every computer.")
@click.option("--user", metavar="NAME", help="User in the machine; default: job. root is possible.")
@click.option("--stdin", "stdin", default="auto", metavar="auto|none|FILE",
              help="auto: this command's input unless it is a terminal.")
@click.option("--output-limit", type=int, metavar="MB",
              help="Largest size of one output, MiB; default: the size of the disk.")
@click.option("--stream-limit", type=int, default=DEFAULT_STREAM_LIMIT // MIB, show_default=True,
              metavar="MB", help="Largest size of stdout, and of stderr, MiB.")
@click.option("--on-flood", type=click.Choice([o.value for o in OnFlood]), default="discard",
              show_default=True, help="What happens to a job that writes more than that.")
@click.option("--cold", is_flag=True,
              help="Boot the machine instead of starting it as a copy of a frozen one.")
@click.option("--slot", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Keep everything of the job in DIR, so that --resume DIR can continue it.")
@click.option("--resume", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Continue the job of a slot; it needs no CMD.")
@click.option("--checkpoint-every", type=click.FloatRange(min=1), metavar="S",
              help=f"With --slot: seconds between checkpoints; default: {CHECKPOINT_EVERY:g}.")
@click.option("--slot-limit", type=click.IntRange(min=1), metavar="MB",
              help="The most that the slot may take on the disk, MiB; default: what there is.")
@click.option("--stop-deadline", type=click.FloatRange(min=0), default=60, show_default=True,
              metavar="S", help="With a slot: seconds for a last checkpoint after SIGTERM.")
@click.option("--priority", type=click.Choice([p.value for p in Priority]), default="low",
              show_default=True, help="low: the job gets only what no other program wants.")
@click.option("--keep-on-failure", is_flag=True,
              help="Keep the machine's logs below ./vmjob-failed/ when the job fails.")
@click.option("--json", "as_json", is_flag=True,
              help="Print one record at the end (the job's output goes to stderr).")
@click.option("--quiet", "-q", is_flag=True, help="No progress, no warnings.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED,
                metavar="-- CMD [ARG]...")
def run(image: str, inputs: tuple[str, ...], outputs: tuple[str, ...],
        environment: tuple[str, ...], cpus: int, memory: int, disk: int,
        time_limit: float | None, network: str, hypervisor: str, accel: str, cpu: str,
        user: str | None, stdin: str, output_limit: int | None, stream_limit: int, on_flood: str,
        cold: bool, slot: Path | None, resume: Path | None, checkpoint_every: float | None,
        slot_limit: int | None, stop_deadline: float, priority: str, keep_on_failure: bool,
        as_json: bool, quiet: bool, command: tuple[str, ...]) -> NoReturn:
    """Run a command in a throw-away virtual machine.

    The command starts in an empty directory, as an unprivileged user, without network. Its
    stdout and stderr come through as they are written, and vmjob leaves with its exit code:

    \b
      0..255  the command's own        125  vmjob itself failed
      128+N   it was ended by signal N  126  the command cannot be executed
                                        127  the command was not found

    \b
    Examples:
      vmjob run -- uname -a
      vmjob run --in data.csv --in fit.py --out result.json -- python3 fit.py data.csv
      vmjob run --image science --memory 2048 --time-limit 3600 -- primecount 1e15
      echo 'scale=50; 4*a(1)' | vmjob run --image science -- bc -lq
      vmjob run --slot job1 --checkpoint-every 60 -- python3 long.py   # and after a power cut:
      vmjob run --resume job1
    """
    how = How(accel=accel, cpu=cpu, cold=cold, stdin=stdin, slot=slot or resume, every=None,
               slot_limit=slot_limit, stop_deadline=stop_deadline, priority=Priority(priority),
               keep=keep_on_failure, as_json=as_json, quiet=quiet, hypervisor=hypervisor)
    if resume is not None:
        if command or slot or checkpoint_every:
            raise UsageError("--resume continues the job as it was asked for: no CMD, --slot or "
                             "--checkpoint-every")
        leave(asyncio.run(carry(None, how)))
    if not command:
        raise UsageError("there is no command to run")
    if checkpoint_every is not None and slot is None:
        raise UsageError("--checkpoint-every needs --slot: somewhere to keep the checkpoints")
    job = Job(
        tasks=(Task(tuple(command), env=environment_of(environment), user=user),),
        image=image, inputs=tuple(map(parse_input, inputs)),
        outputs=tuple(map(parse_output, outputs)), memory_mb=memory, cpus=cpus, disk_gb=disk,
        network=Network(network), time_limit=time_limit,
        output_limit=None if output_limit is None else output_limit * MIB,
        stream_limit=stream_limit * MIB, on_flood=OnFlood(on_flood))
    job.check()
    if slot is not None:
        how = replace(how, every=checkpoint_every or CHECKPOINT_EVERY)
    leave(asyncio.run(carry(job, how)))


def environment_of(given: tuple[str, ...]) -> dict[str, str]:
    """What ``--env K=V`` options set; raises `UsageError`."""
    environment = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--env wants K=V, not {text!r}")
        environment[name] = value
    return environment
