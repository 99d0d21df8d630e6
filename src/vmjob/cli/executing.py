"""``vmjob machine exec``: a command in a machine, its streams, signals and end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from vmjob.cli.main import print_json
from vmjob.errors import KeeperLost, MachineKept, UsageError
from vmjob.home import Home
from vmjob.keeper import client
from vmjob.keeper.wire import packed, unpacked

if TYPE_CHECKING:
    from vmjob.grid.terminal import Terminal
    from vmjob.keeper.client import Talk

__all__ = ["attached", "counts_of", "executed"]

STREAMS = ("stdout", "stderr")


async def executed(home: Home, name: str, asked: dict[str, Any], stdin: str, as_json: bool) -> int:
    """A command's streams through, signals in, its exit code out."""
    return await _carried(home, name, "exec", asked, [0, 0], stdin, as_json)


async def attached(home: Home, name: str, task: int, after: list[int], as_json: bool) -> int:
    """The same for the rest of a command that the machine had when it was kept on the disk."""
    asked = {"task": task, "stdout": after[0], "stderr": after[1]}
    return await _carried(home, name, "attach", asked, after, "none", as_json)


def counts_of(after: str) -> list[int]:
    """What ``--after OUT,ERR`` says; raises `UsageError`."""
    counts = after.split(",")
    if len(counts) != 2 or not all(each.isdecimal() for each in counts):
        raise UsageError(f"--after wants OUT,ERR, not {after!r}")
    return [int(each) for each in counts]


async def _carried(home: Home, name: str, do: str, asked: dict[str, Any], printed: list[int],
                   stdin: str, as_json: bool) -> int:
    """``printed``: bytes of stdout and stderr so far."""
    from vmjob.grid.terminal import OutputClosed, Terminal

    caught: list[int] = []
    try:
        with Terminal(stdin, output=2 if as_json else 1, quiet=True) as terminal:
            async with client.talk(home, name) as talk, _passing_signals(talk, caught):
                await talk.request(do, asked if do == "attach" else {
                    **asked, "stdin": terminal.has_input})
                done = await _follow(name, talk, terminal, printed)
    except OutputClosed:
        return 128 + signal.SIGPIPE
    except asyncio.CancelledError:
        return 128 + (caught[-1] if caught else signal.SIGINT)
    if as_json:
        print_json({"name": name, **done})
    return int(done["exit_code"])


async def _follow(name: str, talk: Talk, terminal: Terminal, printed: list[int]) -> dict[str, Any]:
    """How a command ended; meanwhile its output goes to the terminal, whose input goes to it."""
    feeding: set[asyncio.Task[None]] = set()
    task = 0

    async def feed() -> None:
        with contextlib.suppress(KeeperLost):  # who hears the command's output is told
            await talk.say({"stdin": packed(await terminal.input())})

    try:
        while "done" not in (said := await talk.hear()):
            if "want" in said:
                feeding.add(asyncio.create_task(feed()))
            elif said.get("out") in STREAMS:
                data = unpacked(said["data"])
                await terminal.output(said["out"], data)
                printed[STREAMS.index(said["out"])] += len(data)
            elif "task" in said:
                task = int(said["task"])
            feeding = {each for each in feeding if not each.done()}
    except MachineKept as error:
        raise MachineKept(
            f"the machine {name} was kept on the disk while the command ran, which goes on when "
            "the machine does", task=task, stdout=printed[0], stderr=printed[1],
            advice=f"`vmjob machine resume {name}`, then for the rest of its output and its end: "
                   f"vmjob machine exec {name} --attach {task} --after "
                   f"{printed[0]},{printed[1]}") from error
    finally:
        for each in feeding:
            each.cancel()
    done: dict[str, Any] = said["done"]
    return done


@contextlib.asynccontextmanager
async def _passing_signals(talk: Talk, caught: list[int]) -> AsyncIterator[None]:
    """Signals that are ours go to the command; the second one ends us, and so the command."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    saying: set[asyncio.Task[None]] = set()

    async def pass_on(number: int) -> None:
        with contextlib.suppress(KeeperLost):
            await talk.say({"signal": number})

    def hear(number: int) -> None:
        caught.append(number)
        if len(caught) > 1:
            task.cancel()
        else:
            saying.add(asyncio.create_task(pass_on(number)))

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for each in numbers:
        loop.add_signal_handler(each, hear, each)
    try:
        yield
    finally:
        for each in numbers:
            loop.remove_signal_handler(each)
