"""``vmjob machine``: machines that stay between commands."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import click

from vmjob.cli.carrying import leave
from vmjob.cli.executing import attached, counts_of, executed
from vmjob.cli.hypervisors import hypervisor_options
from vmjob.cli.main import fail, print_json
from vmjob.cli.run import environment_of
from vmjob.errors import UsageError, VmjobError
from vmjob.home import Home
from vmjob.job.model import Network
from vmjob.keeper import client, slots
from vmjob.keeper.log import clean, parse
from vmjob.machine.contract import Priority

__all__ = ["machine"]

#: Seconds after which a command that is still waiting says what for.
PATIENCE = 1.0

F = TypeVar("F", bound=Callable[..., None])
T = TypeVar("T")

name_argument = click.argument("name")


def answering(command: F) -> F:
    """Give a command ``--json``, also for its errors."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
    @functools.wraps(command)
    def carried(*args: Any, as_json: bool, **more: Any) -> None:
        try:
            command(*args, as_json=as_json, **more)
        except VmjobError as error:
            fail(error, as_json=as_json)

    return carried  # type: ignore[return-value]


@click.group()
def machine() -> None:
    """Make machines that stay between commands: start, use, suspend, keep and remove them.

    \b
    Examples:
      vmjob machine create lab --memory 1024
      vmjob machine start lab
      vmjob machine put lab data.csv
      vmjob machine exec lab -- wc -l data.csv
      vmjob machine exec lab --detach -- sh -c 'long-program > out'
      vmjob machine suspend lab --to-disk      # its memory is free; after a reboot:
      vmjob machine resume lab
      vmjob machine get lab out
      vmjob machine destroy lab

    A machine that runs has a process of its own, its keeper; when that one ends, however it does,
    the machine's process ends as well, and the machine is as its last checkpoint has it.
    """


# -- from its making to its end ----------------------------------------------------------------


@machine.command()
@name_argument
@click.option("--image", default="default", show_default=True, metavar="IMAGE",
              help="Image to boot; the default one is built when it is missing.")
@click.option("--memory", default=512, show_default=True, metavar="MB", help="Memory, MiB.")
@click.option("--cpus", default=1, show_default=True, metavar="N", help="Virtual processors.")
@click.option("--disk", default=10, show_default=True, metavar="GB",
              help="The most that the machine may write to its disk, GiB.")
@click.option("--network", type=click.Choice([n.value for n in Network]), default="none",
              show_default=True, help="What the machine can reach.")
@hypervisor_options
@click.option("--cpu", default="host", show_default=True, metavar="host|baseline|MODEL",
              help="host: the fastest. baseline: checkpoints that any computer can continue.")
@click.option("--priority", type=click.Choice([p.value for p in Priority]), default="low",
              show_default=True, help="low: it gets only what no other program wants.")
@answering
def create(name: str, image: str, memory: int, cpus: int, disk: int, network: str,
           hypervisor: str, accel: str, cpu: str, priority: str, as_json: bool) -> None:
    """Make a machine and print its name; nothing starts.

    With the name `auto`, one is found: m1, m2 and so on.
    """
    from vmjob.engine.slot import AskedMachine
    from vmjob.image.recipe import DEFAULT_NAME
    from vmjob.image.store import ImageStore

    home = Home()
    if image != DEFAULT_NAME:
        ImageStore(home).get(image)
    made = slots.create(home, name, AskedMachine(image, memory, cpus, disk, network, accel, cpu,
                                                 priority, hypervisor))
    _say(as_json, made, {"name": made, "state": "created"})


@machine.command()
@name_argument
@click.option("--anew", is_flag=True, help="Forget the checkpoints of a machine that has some.")
@answering
def start(name: str, anew: bool, as_json: bool) -> None:
    """Start a machine anew; returns when it can be used."""
    _started(name, client.start(Home(), name, anew=anew), as_json)


@machine.command()
@name_argument
@click.option("--to-disk", is_flag=True,
              help="Make a checkpoint and end the machine's process: its memory is free.")
@answering
def suspend(name: str, to_disk: bool, as_json: bool) -> None:
    """Let a machine stand still, in memory or on the disk."""
    home = Home()
    if not to_disk:
        asyncio.run(client.ask(home, name, "suspend"))
        _say(as_json, "", {"name": name, "state": "suspended"})
        return
    made = _run(client.suspend_to_disk(home, name), f"making a checkpoint of {name}")
    _say(as_json, _made(made),
         {"name": name, "state": "kept", "checkpoint": made})


@machine.command()
@name_argument
@answering
def resume(name: str, as_json: bool) -> None:
    """Let a machine go on that was suspended, in memory or on the disk."""
    _started(name, client.resume(Home(), name), as_json)


@machine.command()
@name_argument
@answering
def checkpoint(name: str, as_json: bool) -> None:
    """Keep a machine as it is now, and let it go on; prints the checkpoint's number.

    The newest two are kept. The machine stands still for some hundredths of a second only.
    """
    made = _run(client.checkpoint_now(Home(), name), f"making a checkpoint of {name}")
    _say(as_json, _made(made),
         {"name": name, "checkpoint": made})


@machine.command()
@name_argument
@answering
def restore(name: str, as_json: bool) -> None:
    """Go on from the newest good checkpoint; what has happened since then is thrown away."""
    _started(name, client.restore(Home(), name), as_json)


@machine.command()
@name_argument
@click.option("--checkpoint", "keep", is_flag=True, help="Make a checkpoint first.")
@click.option("--deadline", type=click.FloatRange(min=0), default=60, show_default=True,
              metavar="S", help="Seconds that the checkpoint may take.")
@answering
def stop(name: str, keep: bool, deadline: float, as_json: bool) -> None:
    """End a machine's process; what was not kept is lost.

    With --checkpoint and no checkpoint in time, the machine is stopped all the same, and the exit
    code is 125.
    """
    made = _run(client.stop(Home(), name, checkpoint=keep, deadline=deadline), f"stopping {name}")
    text = _made(made) if made else ""
    _say(as_json, text, {"name": name, "state": "kept" if made else "stopped",
                         "checkpoint": made})


@machine.command()
@name_argument
@answering
def destroy(name: str, as_json: bool) -> None:
    """End a machine and remove all of it, its checkpoints too."""
    _run(client.destroy(Home(), name), f"removing {name}")
    _say(as_json, "", {"name": name, "state": "destroyed"})


@machine.command()
@name_argument
@click.argument("priority", type=click.Choice([p.value for p in Priority]))
@answering
def priority(name: str, priority: str, as_json: bool) -> None:
    """Change how much of a busy computer a running machine may take, now and whenever it runs."""
    asyncio.run(client.ask(Home(), name, "priority", {"priority": priority}))
    _say(as_json, "", {"name": name, "priority": priority})


# -- what there is -------------------------------------------------------------------------------


@machine.command()
@name_argument
@answering
def status(name: str, as_json: bool) -> None:
    """Say where a machine is in its life.

    \b
      created    never started             suspended  stands still, in memory
      starting   until it can be used      kept       on the disk, can be resumed
      running    can be used               stopped    not running, nothing was kept
      ending     is being ended            unknown    its keeper does not answer
    """
    found = asyncio.run(client.look(Home(), name))
    facts = {**found.as_dict(), "age_seconds": _age(found), "memory_used_bytes": _used(found.pid)}
    if as_json:
        print_json(facts)
        return
    asked = found.asked
    click.echo(f"{name}: {found.state}, {_duration(_age(found))}"
               + (f", process {found.pid}, {_size(facts['memory_used_bytes'])} of memory used"
                  if found.pid else ""))
    click.echo(f"  image {asked.image}, {asked.memory_mb} MiB memory, {asked.cpus} CPU, "
               f"{asked.disk_gb} GiB disk, network {asked.network}, accel {asked.accel}, "
               f"cpu {asked.cpu}, priority {asked.priority}")
    for each in found.checkpoints:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["created"]))
        click.echo(f"  checkpoint {each['number']}: {made}, {_size(each['bytes'])}")


@machine.command("list")
@answering
def list_(as_json: bool) -> None:
    """List all machines."""
    found, broken = asyncio.run(client.look_at_all(Home()))
    if as_json:
        print_json({"machines": [{**each.as_dict(), "age_seconds": _age(each)} for each in found],
                    "damaged": [each.as_dict() for each in broken]})
        return
    if found:
        click.echo(f"{'NAME':16} {'STATE':10} {'AGE':>8} {'MEMORY':>9} {'PROCESS':>8} CHECKPOINT")
    for each in found:
        newest = each.checkpoints[0] if each.checkpoints else None
        kept = f"{newest['number']} ({_size(newest['bytes'])})" if newest else "-"
        click.echo(f"{each.name:16} {each.state:10} {_duration(_age(each)):>8} "
                   f"{each.asked.memory_mb:>5} MiB {each.pid or '-':>8} {kept}")
    for error in broken:
        click.echo(f"vmjob: {error.message}", err=True)
    if not found and not broken:
        click.echo("There are no machines. Make one with:  vmjob machine create NAME")


# -- its inside ----------------------------------------------------------------------------------


@machine.command("exec")
@name_argument
@click.option("--user", metavar="USER", help="User in the machine; default: job. root is possible.")
@click.option("--cwd", metavar="DIR", help="Directory in the machine; default: the job's.")
@click.option("--env", "environment", multiple=True, metavar="K=V",
              help="Set an environment variable of the command.")
@click.option("--stdin", "stdin", default="auto", metavar="auto|none|FILE",
              help="auto: this command's input unless it is a terminal.")
@click.option("--attach", type=click.IntRange(min=1), metavar="TASK",
              help="Go on with a command that the machine had when it was kept on the disk.")
@click.option("--after", default="0,0", show_default=True, metavar="OUT,ERR",
              help="With --attach: bytes of stdout and of stderr that were printed already.")
@click.option("--detach", "-d", is_flag=True,
              help="Return at once; the command goes on, what it prints goes nowhere.")
@click.option("--json", "as_json", is_flag=True,
              help="Print one record at the end (the command's output goes to stderr).")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[OPTION]... -- CMD [ARG]...")
def exec_(name: str, user: str | None, cwd: str | None, environment: tuple[str, ...], stdin: str,
          attach: int | None, after: str, detach: bool, as_json: bool,
          command: tuple[str, ...]) -> None:
    """Run a command in a machine, and leave with its exit code.

    Its stdout and stderr come through as they are written. Exit codes are those of `vmjob run`.
    Ctrl-C interrupts the command; a second one kills it. When it ends, what it left running in the
    background is ended as well: use --detach for what is to go on, and let it write to a file.
    While the machine is suspended the command stands still. When it is suspended to the disk, this
    ends with [machine-kept] and says how to get the rest, once the machine is resumed.

    \b
    Examples:
      vmjob machine exec lab -- uname -a
      vmjob machine exec lab --user root --cwd /etc -- cat hostname
      vmjob machine exec lab --detach -- sh -c 'long-program > out 2>&1'
    """
    try:
        if attach is not None:
            if command or detach:
                raise UsageError("--attach goes on with a command: no CMD, no --detach")
            leave(asyncio.run(attached(Home(), name, attach, counts_of(after), as_json)))
        if not command:
            raise UsageError("there is no command to run")
        asked = {"argv": list(command), "user": user, "cwd": cwd,
                 "env": environment_of(environment), "detach": detach}
        if detach:
            asyncio.run(client.ask(Home(), name, "exec", asked))
            _say(as_json, "", {"name": name, "detached": True})
            return
        leave(asyncio.run(executed(Home(), name, asked, stdin, as_json)))
    except VmjobError as error:
        fail(error, as_json=as_json)


@machine.command()
@name_argument
@click.argument("source")
@click.argument("destination", required=False)
@answering
def put(name: str, source: str, destination: str | None, as_json: bool) -> None:
    """Copy a file or directory into a machine.

    DESTINATION defaults to the source's name, and is relative to the job's directory.
    """
    path = Path(source).absolute()
    target = destination or path.name
    _run(client.ask(Home(), name, "put", {"source": str(path), "destination": target}, None),
         f"copying {path.name}")
    _say(as_json, "", {"name": name, "source": str(path), "destination": target})


@machine.command()
@name_argument
@click.argument("source")
@click.argument("destination", required=False)
@answering
def get(name: str, source: str, destination: str | None, as_json: bool) -> None:
    """Copy a file or directory out of a machine, to its name here or to DESTINATION.

    It appears there whole or not at all.
    """
    from vmjob.job.files import is_directory

    short = PurePosixPath(source).name
    target = Path(destination or short).absolute()
    if destination and (destination.endswith("/") or is_directory(target)):
        target /= short
    done = _run(client.ask(Home(), name, "get",
                           {"source": source, "destination": str(target)}, None),
                f"copying {short}")
    _say(as_json, "", {"name": name, "source": source, "destination": done["path"]})


@machine.command()
@name_argument
@click.argument("path", default="")
@answering
def ls(name: str, path: str, as_json: bool) -> None:
    """List a directory of a machine: the job's, or PATH."""
    entries = asyncio.run(client.ask(Home(), name, "ls", {"path": path}))["entries"]
    if as_json:
        print_json({"name": name, "path": path, "entries": entries})
        return
    for each in entries:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["mtime_ns"] / 1e9))
        click.echo(f"{each['type']:4} {each['mode'] & 0o7777:04o} {each['size']:>12} {when} "
                   f"{clean(each['name'])}")


@machine.command()
@name_argument
@click.argument("path")
@answering
def mkdir(name: str, path: str, as_json: bool) -> None:
    """Make a directory in a machine, and its parents."""
    asyncio.run(client.ask(Home(), name, "mkdir", {"path": path}))
    _say(as_json, "", {"name": name, "path": path})


@machine.command()
@name_argument
@click.argument("path")
@answering
def delete(name: str, path: str, as_json: bool) -> None:
    """Remove a file, a link or a whole directory of a machine."""
    asyncio.run(client.ask(Home(), name, "delete", {"path": path}))
    _say(as_json, "", {"name": name, "path": path})


@machine.command()
@name_argument
@click.argument("text")
@answering
def message(name: str, text: str, as_json: bool) -> None:
    """Append a line to the file that commands find under $VMJOB_FROM_HOST."""
    asyncio.run(client.ask(Home(), name, "message", {"text": text}))
    _say(as_json, "", {"name": name})


@machine.command()
@name_argument
@answering
def console(name: str, as_json: bool) -> None:
    """Print the end of what a running machine's kernel has printed."""
    text = asyncio.run(client.ask(Home(), name, "console"))["text"]
    _say(as_json, "\n".join(clean(line) for line in text.splitlines()),
         {"name": name, "console": text})


@machine.command()
@name_argument
@answering
def logs(name: str, as_json: bool) -> None:
    """Print what a machine's keeper did, and the lines that commands wrote to $VMJOB_TO_HOST."""
    home = Home()
    with contextlib.suppress(VmjobError):  # the log is there also when the machine is not
        asyncio.run(client.ask(home, name, "listen"))
    path = slots.place_of(home, name) / slots.LOG
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if as_json:
        print_json({"name": name, "lines": [parse(line) for line in text.splitlines()]})
    else:
        click.echo(text, nl=False)


# -- inside ------------------------------------------------------------------------------------


def _started(name: str, work: Coroutine[Any, Any, list[str]], as_json: bool) -> None:
    warnings = _run(work, f"starting {name}; the first start of a kind takes some seconds more")
    for text in warnings:
        click.echo(f"vmjob: warning: {clean(text)}", err=True)
    _say(as_json, "", {"name": name, "state": "running", "warnings": warnings})


def _run(work: Coroutine[Any, Any, T], what: str) -> T:
    """Wait for work; say what for, on stderr, when that takes long."""

    async def patiently() -> T:
        async with _telling(what):
            return await work

    return asyncio.run(patiently())


@contextlib.asynccontextmanager
async def _telling(what: str) -> AsyncIterator[None]:
    if os.isatty(2):
        from vmjob.grid.terminal import StatusLine

        line = StatusLine()
        line.show(what)
        try:
            yield
        finally:
            line.close()
        return
    timer = asyncio.get_running_loop().call_later(
        PATIENCE, functools.partial(click.echo, f"vmjob: {what}", err=True))
    try:
        yield
    finally:
        timer.cancel()


def _say(as_json: bool, text: str, content: dict[str, Any]) -> None:
    if as_json:
        print_json(content)
    elif text:
        click.echo(text)


def _age(found: slots.Known) -> float:
    return round(max(0.0, time.time() - found.since), 1)


def _used(pid: int | None) -> int:
    """Bytes of memory that a keeper and its machine use."""
    import psutil

    used = 0
    with contextlib.suppress(psutil.Error):
        if pid:
            keeper = psutil.Process(pid)
            for each in [keeper, *keeper.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    used += each.memory_info().rss
    return used


def _duration(seconds: float) -> str:
    """An age for people: 42 s, 5 min, 3 h, 2 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _made(made: dict[str, Any]) -> str:
    """A checkpoint, in words."""
    return (f"checkpoint {made['number']}, {_size(made['disk_bytes'])} on disk, "
            f"stood still {made['still_seconds'] * 1000:.0f} ms")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
