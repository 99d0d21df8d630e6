"""``vmjob wrapper``: what the BOINC client starts, in a slot directory."""

from __future__ import annotations

import math
from typing import NoReturn

import click

from vmjob.cli.carrying import leave

__all__ = ["wrapper"]

#: Options of BOINC's programs that mean nothing here and are not the job's business either.
IGNORED = {"--use_tstp": 0, "--device": 1, "--verbose": 0}
#: What BOINC's generic wrapper puts before the arguments of its tasks.
PASSTHROUGH = "--passthrough_child"


class _Wrapper(click.Command):
    """Leaves to the job what is the job's: all after `PASSTHROUGH`, and a --help among its words.

    Help that is printed ends a process with 0, and the client would start it a hundred times.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args != ["--help"]:
            ctx.help_option_names = []
        at = args.index(PASSTHROUGH) if PASSTHROUGH in args else len(args)
        rest = super().parse_args(ctx, args[:at])
        ctx.params["arguments"] = (*ctx.params["arguments"], *args[at:])
        return rest


@click.command(cls=_Wrapper, context_settings={
    "ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": True})
@click.option("--nthreads", type=float, metavar="N", help="Virtual processors of the machine.")
@click.option("--memory_size_mb", type=float, metavar="MB", help="Memory of the machine, MiB.")
@click.option("--vmimage", type=int, metavar="N", help="Use vm_image_N.vdi as the job's disk.")
@click.option("--trickle", type=click.FloatRange(min=1), metavar="S",
              help="Send a trickle with the run time every S seconds.")
@click.option("--sporadic", is_flag=True, help="Tell the job that it may compute now: shared/ca.")
@click.option("--register_only", is_flag=True,
              help="Make everything ready for the job's machine, and do not run it.")
@click.option("--allow-emulation", is_flag=True,
              help="Emulate the processor where there is no hardware support (slow).")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARG...]")
def wrapper(nthreads: float | None, memory_size_mb: float | None, vmimage: int | None,
            trickle: float | None, sporadic: bool, register_only: bool, allow_emulation: bool,
            arguments: tuple[str, ...]) -> NoReturn:
    """Carry the job of a BOINC slot: the current directory.

    The BOINC client starts this. The slot has vbox_job.xml, job.xml or vmjob.toml; every other
    ARG goes to the job. Without a client (no init_data.xml) the job runs alone, which is how to
    try an application by hand:

    \b
    Example:
      cd my-slot && vmjob wrapper --allow-emulation
    """
    from vmjob.wrapper.options import Options
    from vmjob.wrapper.start import wrap

    leave(wrap(Options(
        arguments=for_the_job(arguments), cpus=_count(nthreads), memory_mb=_size(memory_size_mb),
        image_number=vmimage, trickle_every=trickle, sporadic=sporadic,
        prepare_only=register_only, emulation=allow_emulation)))


def for_the_job(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """What of the command line the job gets to see."""
    found: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == PASSTHROUGH:
            return (*found, *words)
        if word in IGNORED:
            for _ in range(IGNORED[word]):
                next(words, None)
        elif word != "--" or found:
            found.append(word)
    return tuple(found)


def _count(given: float | None) -> int | None:
    """The client says 1.000000; anything above a whole number needs one more."""
    return None if given is None or not 0 < given < 1e6 else math.ceil(given)


def _size(given: float | None) -> float | None:
    return None if given is None or not 0 < given < math.inf else given
