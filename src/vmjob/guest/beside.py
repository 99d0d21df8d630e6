"""The agent as a process of this computer, for directories that a guest mounts by itself.

A machine that boots its user's disk has no agent in it. Where it can mount directories of this
computer (`Capabilities.folders`), an agent looks at these from our side. So they are no part of the
job's own folders: what comes from the guest is taken when it is whole, within the limits and
following no link, and what the guest sees is what it may see, as with any machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio

from vmjob.errors import HostError
from vmjob.guest.agent.wire import LANES
from vmjob.guest.client import AgentClient
from vmjob.host.guard import guarded

__all__ = ["agent_beside"]

#: Seconds for it to greet us, and to end when its lanes are closed.
START_DEADLINE = 30.0
END_DEADLINE = 10.0


@contextlib.asynccontextmanager
async def agent_beside(directory: Path, run: Path) -> AsyncIterator[AgentClient]:
    """An agent that works in ``directory``; its own files are in ``run``, which is made.

    It ends with the block, and with this process. Raises `HostError` when it does not start, and
    what `AgentClient` raises.
    """
    ours, theirs = {}, {}
    for name in LANES:
        ours[name], theirs[name] = socket.socketpair()
    descriptors = [theirs[name].fileno() for name in LANES]
    command = [sys.executable, "-P", "-m", "vmjob.guest.agent", str(directory), str(run),
               *map(str, descriptors)]
    client = AgentClient(ours)
    try:
        process = await asyncio.create_subprocess_exec(
            *guarded(command, os.getpid(), drop_capabilities=False), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    except OSError as error:
        client.close()
        raise HostError(f"a process for the job's folders cannot be started: "
                        f"{error.strerror}") from error
    except BaseException:
        client.close()
        raise
    finally:
        for each in theirs.values():
            each.close()
    try:
        await client.hello(START_DEADLINE)
        yield client
    finally:
        client.close()
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(END_DEADLINE):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
