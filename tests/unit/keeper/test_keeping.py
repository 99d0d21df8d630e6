"""Machines that go to the disk: in time, and with the commands that run in them."""

from __future__ import annotations

import asyncio
import sys
import time

import anyio
import pytest

from tests.unit.keeper.test_keeper import keeper, lab, state
from vmjob.engine.generations import Generation, Generations
from vmjob.errors import CheckpointFailed, KeeperLost, MachineKept, WrongState
from vmjob.home import Home
from vmjob.keeper import client, slots, wire
from vmjob.machine.fake.programs import hash_chain

__all__ = ["lab"]

pytestmark = pytest.mark.anyio

STEPS, EVERY = 3000, 10
CHAIN = ["hash-chain", str(STEPS), str(EVERY)]
#: Seconds that this computer may add to a deadline.
BUSY = 5.0


def good(home: Home, name: str) -> list[int]:
    return [each.number for each in
            Generations(slots.place_of(home, name) / "checkpoints").newest_first()
            if isinstance(each, Generation)]


# -- in time -----------------------------------------------------------------------------------


async def test_a_machine_is_stopped_in_time_although_its_checkpoint_does_not_end(
        home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper("stuck-disk"))
    await client.checkpoint_now(home, lab)
    began = time.monotonic()
    with pytest.raises(CheckpointFailed, match=r"within 0\.5 seconds"):
        await client.stop(home, lab, checkpoint=True, deadline=0.5)
    assert time.monotonic() - began < 0.5 + 2 * 5.0 + BUSY  # twice `server.END_DEADLINE`
    assert (slots.place_of(home, lab) / "reached").exists()
    assert await state(home, lab) == "kept"
    assert good(home, lab) == [1]
    await client.resume(home, lab, command=keeper("simulated"))
    assert (await client.checkpoint_now(home, lab))["number"] > 1


async def test_who_no_longer_waits_for_a_machine_to_go_to_the_disk_can_stop_it(
        home: Home, lab: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await client.start(home, lab, command=keeper("stuck-disk"))
    await client.checkpoint_now(home, lab)
    monkeypatch.setattr(client, "CHECKPOINT_DEADLINE", 0.5)
    with pytest.raises(KeeperLost, match=r"within 0\.5 seconds"):
        await client.suspend_to_disk(home, lab)
    assert await state(home, lab) == "suspended"  # it is still being kept
    began = time.monotonic()
    await client.stop(home, lab)
    assert time.monotonic() - began < 2 * 5.0 + BUSY
    assert good(home, lab) == [1]


# -- with their commands -----------------------------------------------------------------------


async def followed(talk: client.Talk, out: bytearray, wanted: int | None = None) -> int:
    """Take a command's output until there is so much of it, or to its end; its number."""
    task = 0
    while True:
        said = await talk.hear()
        if "task" in said:
            task = said["task"]
        elif "out" in said:
            out += wire.unpacked(said["data"])
        if "done" in said:
            assert said["done"]["exit_code"] == 0
            return task
        if wanted is not None and len(out) >= wanted:
            return task


@pytest.mark.parametrize("how", ["suspend", "stop"])
async def test_a_commands_output_is_whole_over_the_disk(home: Home, lab: str, how: str) -> None:
    await client.start(home, lab, command=keeper("simulated"))
    out = bytearray()
    async with client.talk(home, lab) as talk:
        await talk.request("exec", {"argv": CHAIN})
        task = await followed(talk, out, 2000)
        going = asyncio.ensure_future(client.suspend_to_disk(home, lab) if how == "suspend"
                                      else client.stop(home, lab, checkpoint=True))
        with pytest.raises(MachineKept):
            await followed(talk, out)
        await going
    assert len(out) < len(hash_chain(STEPS, EVERY))
    await client.resume(home, lab, command=keeper("simulated"))
    async with client.talk(home, lab) as talk:
        await talk.request("attach", {"task": task, "stdout": len(out)})
        while "task" not in await talk.hear():
            pass
        async with client.talk(home, lab) as second:
            await second.request("attach", {"task": task})
            with pytest.raises(WrongState, match="already"):
                await second.hear()
        await followed(talk, out)
    assert out == hash_chain(STEPS, EVERY)


async def test_a_command_stands_still_with_its_machine_and_goes_on(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper("simulated"))
    out = bytearray()
    async with client.talk(home, lab) as talk:
        await talk.request("exec", {"argv": CHAIN})
        await followed(talk, out, 2000)
        for _ in range(5):
            await client.ask(home, lab, "suspend")
            await client.resume(home, lab)
        await followed(talk, out)
    assert out == hash_chain(STEPS, EVERY)


async def test_a_machine_whose_checkpoint_fails_goes_on_with_its_command(home: Home,
                                                                         lab: str) -> None:
    await client.start(home, lab, command=keeper("no-checkpoint"))
    async with client.talk(home, lab) as talk:
        await talk.request("exec", {"argv": ["sh", "-c", "echo on; read line; echo $line"],
                                    "stdin": True})
        out = bytearray()
        await followed(talk, out, 3)
        with pytest.raises(CheckpointFailed):
            await client.suspend_to_disk(home, lab)
        await talk.say({"stdin": wire.packed(b"further\n")})
        await followed(talk, out, 11)
    assert out == b"on\nfurther\n"


async def test_exec_says_how_to_get_the_rest_and_that_is_how(home: Home, lab: str) -> None:
    await client.start(home, lab, command=keeper("simulated"))
    vmjob = [sys.executable, "-m", "vmjob", "machine", "exec", lab]
    async with await anyio.open_process([*vmjob, "--", *CHAIN]) as process:
        assert process.stdout
        assert process.stderr
        first = await process.stdout.receive()
        await client.suspend_to_disk(home, lab)
        first += b"".join([each async for each in process.stdout])
        said = b"".join([each async for each in process.stderr]).decode()
        assert await process.wait() == 125
    assert "[machine-kept]" in said
    words = said.partition("vmjob machine exec lab ")[2].split()
    assert words[:3] == ["--attach", "1", "--after"]
    await client.resume(home, lab, command=keeper("simulated"))
    done = await anyio.run_process([*vmjob, *words[:4]])
    assert first + done.stdout == hash_chain(STEPS, EVERY)
