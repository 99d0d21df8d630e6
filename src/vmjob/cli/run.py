"""``vmjob run``: one command in a throw-away virtual machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from vmjob.cli.main import print_json, report
from vmjob.errors import UsageError, VmjobError
from vmjob.job.model import (
    DEFAULT_STREAM_LIMIT,
    Job,
    Network,
    OnFlood,
    Task,
    parse_input,
    parse_output,
)

if TYPE_CHECKING:
    from vmjob.engine.record import Record

__all__ = ["run"]

MIB = 1 << 20


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
@click.option("--accel", type=click.Choice(["auto", "kvm", "hvf", "whpx", "tcg"]),
              default="auto", show_default=True,
              help="auto: the fastest that a guest boot has proved to work.")
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
@click.option("--keep-on-failure", is_flag=True,
              help="Keep the machine's logs below ./vmjob-failed/ when the job fails.")
@click.option("--json", "as_json", is_flag=True,
              help="Print one record at the end (the job's output goes to stderr).")
@click.option("--quiet", "-q", is_flag=True, help="No progress, no warnings.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED,
                metavar="-- CMD [ARG]...")
def run(image: str, inputs: tuple[str, ...], outputs: tuple[str, ...],
        environment: tuple[str, ...], cpus: int, memory: int, disk: int,
        time_limit: float | None, network: str, accel: str, cpu: str, user: str | None, stdin: str,
        output_limit: int | None, stream_limit: int, on_flood: str, cold: bool,
        keep_on_failure: bool, as_json: bool, quiet: bool, command: tuple[str, ...]) -> NoReturn:
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
    """
    job = Job(
        tasks=(Task(tuple(command), env=_environment(environment), user=user),),
        image=image, inputs=tuple(map(parse_input, inputs)),
        outputs=tuple(map(parse_output, outputs)), memory_mb=memory, cpus=cpus, disk_gb=disk,
        network=Network(network), time_limit=time_limit,
        output_limit=None if output_limit is None else output_limit * MIB,
        stream_limit=stream_limit * MIB, on_flood=OnFlood(on_flood))
    job.check()
    code = asyncio.run(_run(job, accel=accel, cpu=cpu, cold=cold, stdin=stdin, keep=keep_on_failure,
                            as_json=as_json, quiet=quiet))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # Not sys.exit: a thread that waits for a terminal nobody types on would keep us here.
    os._exit(code)


def _environment(given: tuple[str, ...]) -> dict[str, str]:
    environment = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--env wants K=V, not {text!r}")
        environment[name] = value
    return environment


async def _run(job: Job, *, accel: str, cpu: str, cold: bool, stdin: str, keep: bool,
               as_json: bool, quiet: bool) -> int:
    """Run the job; SIGINT and SIGTERM end it, and its machine, at once."""
    from vmjob.engine.record import Record
    from vmjob.engine.run import Request, run_job
    from vmjob.grid.terminal import OutputClosed, Terminal
    from vmjob.home import Home
    from vmjob.machine.qemu.driver import QemuDriver
    from vmjob.shape import doubt, machine_shape

    task = asyncio.current_task()
    assert task is not None
    caught: list[int] = []

    def interrupt(number: int) -> None:
        if not caught:
            caught.append(number)
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupt, number)
    home = Home()
    with Terminal(stdin, output_to_stderr=as_json, quiet=quiet) as terminal:
        try:
            terminal.phase("image")
            shape, image, why = await machine_shape(
                home, job.image, accel, memory_mb=job.memory_mb, cpus=job.cpus,
                disk_gb=job.disk_gb, network=job.network, cpu=cpu, progress=terminal.building)
            facts = {"name": image.name, "digest": image.manifest.parts["root"].sha256,
                     "kernel": image.manifest.kernel_version}
            request = Request(job, QemuDriver(), shape, facts, hashes=as_json, cold=cold,
                              keep=Path("vmjob-failed").absolute() if keep else None)
            record = await run_job(home, request, terminal)
            record.machine["accelerator_why"] = why
            doubt(home, shape, record.error)
        except asyncio.CancelledError:
            return 128 + (caught[0] if caught else signal.SIGINT)
        except OutputClosed:
            return 128 + signal.SIGPIPE
        except VmjobError as error:
            record = Record(exit_code=error.exit_code, error=error.as_dict())
    _show(record, as_json)
    return record.exit_code


def _show(record: Record, as_json: bool) -> None:
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(record))
    elif record.error is not None:
        report(record.error)
    elif record.kept:
        click.echo(f"vmjob: the machine's logs are in {record.kept}", err=True)
