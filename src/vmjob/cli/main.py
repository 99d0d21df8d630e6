"""The command ``vmjob``: finds the subcommand, runs it, prints errors as users need them."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn

import click

from vmjob import __version__
from vmjob.errors import EXIT_VMJOB_FAILED, VmjobError

__all__ = ["cli", "fail", "main"]

#: Command -> what `vmjob --help` says of it. The module of the same name holds it.
COMMANDS = {
    "run": "Run a command in a throw-away virtual machine.",
    "wrapper": "Carry the job of a BOINC slot; the BOINC client starts this.",
    "machine": "Make machines that stay between commands; start, use, keep and remove them.",
    "job": "Run, check, show and convert job files of any kind.",
    "image": "Build, list, check and remove the images that machines boot from.",
    "project": "The BOINC project's side: packages, keys, templates, a server to try them on.",
    "doctor": "Say what this computer can do, what is wrong, and what to do about it.",
    "clean": "Remove what killed processes left behind.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are needed, not to print their names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"vmjob.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context,
                        args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message.rstrip('.')}. The commands are: "
                                   f"{', '.join(COMMANDS)}.", ctx) from None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]},
             epilog="First time? Try:  vmjob run -- uname -a")
@click.version_option(__version__, "--version", prog_name="vmjob")
def cli() -> None:
    """Run a Linux job in a throw-away virtual machine.

    The job gets a fresh Linux, without network, in a machine of its own; you get its
    output, its files and its exit code; nothing else remains.
    """


def main() -> NoReturn:
    """Entry point: `VmjobError` becomes two lines and an exit code, never a traceback."""
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = EXIT_VMJOB_FAILED
    except VmjobError as error:
        fail(error)
    except (KeyboardInterrupt, click.Abort):
        code = 130
    except BrokenPipeError:
        code = 141
    except Exception as error:
        if os.environ.get("VMJOB_DEBUG"):
            raise
        fail(VmjobError(f"unexpected: {type(error).__name__}: {error}",
                        advice="This is a bug. Set VMJOB_DEBUG=1 to see where, and report it."))
    sys.exit(code if isinstance(code, int) else 0)


def fail(error: VmjobError, *, as_json: bool = False) -> NoReturn:
    """Print an error and leave with its exit code."""
    if as_json:
        print_json({"error": error.as_dict()})
    else:
        report(error.as_dict())
    sys.exit(error.exit_code)


def report(error: dict[str, Any]) -> None:
    """An error (`VmjobError.as_dict`) on stderr: what happened, what to do, what may help."""
    lines = [f"vmjob: {error['message']} [{error['code']}]", f"       {error['advice']}"]
    if error["retryable"]:
        lines.append("       Trying again may help.")
    context = error["context"]
    if kept := context.get("kept"):
        lines.append(f"       The machine's logs are in {kept}")
    if console := str(context.get("console", "")).strip():
        lines.append("       The end of the machine's console:")
        lines += [f"       | {line}" for line in console.splitlines()[-12:]]
    click.echo(plain("\n".join(lines)), err=True)


def plain(text: str) -> str:
    """Words that may be a guest's or a file's, without what would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
                   for c in text)


def print_json(content: dict[str, Any]) -> None:
    """Machine-readable output: one JSON document on stdout."""
    import json  # most calls print none

    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a file's name that is no UTF-8
        text = json.dumps(content, indent=2)
    click.echo(text)
