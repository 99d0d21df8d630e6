"""An app on `vmjob.grid.boinc` that does what its stdin says, and tells on stdout what it hears."""

from __future__ import annotations

import os
import sys

from vmjob.grid.boinc import (
    Abort,
    ClientGone,
    Event,
    Memory,
    Network,
    Quit,
    Reread,
    Resume,
    Runtime,
    SlotTaken,
    Status,
    Suspend,
)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def hear(event: Event) -> None:
    match event:
        case Suspend():
            say("suspended")
        case Resume():
            say("resumed")
        case Quit():
            say("quit")
        case Abort():
            say("abort")
        case Reread(init):
            say("reread")
            say(f"period {init.checkpoint_period:g}")
        case Network(available):
            say(f"network {int(available)}")
        case Memory(used, allowed):
            say(f"memory {used} {allowed}")
        case ClientGone():
            say("gone")
        case _:
            say(repr(event))


def main() -> int:
    try:
        runtime = Runtime.open(lock_wait=float(sys.argv[1]))
    except SlotTaken:
        say("taken")
        return 0
    with runtime:
        runtime.listen(hear)
        assert runtime.init is not None
        checkpoint = runtime.init.wu_cpu_time
        say(f"ready {checkpoint:g}")
        for line in sys.stdin:
            order, *words = line.split()
            if order == "report":
                runtime.report(Status(float(words[0]), float(words[2])))
                if float(words[1]) != checkpoint:
                    checkpoint = float(words[1])
                    runtime.checkpointed(checkpoint)
            elif order == "trickle":
                say(f"trickle {int(runtime.trickle_up(words[0], ' '.join(words[1:])))}")
            elif order == "upload":
                runtime.upload(words[0])
            elif order == "web":
                runtime.web_address(words[0])
            elif order == "desktop":
                runtime.remote_desktop(words[0])
            elif order == "status_file":
                runtime.status_file(cpu_seconds=1.5, elapsed_seconds=2.5, fraction_done=0.5)
                say("written")
            elif order == "finish":
                runtime.finish(int(words[0]), " ".join(words[2:]), notice=words[1] == "1")
                return int(words[0])
            elif order == "temporary":
                runtime.temporary_exit(int(words[0]), " ".join(words[2:]), notice=words[1] == "1")
                return 0
            elif order == "exit":
                return int(words[0])
    return 0


sys.exit(main())
