"""The host's client: fair among its callers, and not to be fooled by what the guest says."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from vmjob.engine.session import open_session
from vmjob.errors import AgentLost, AgentProtocol
from vmjob.guest import client as client_module
from vmjob.guest.agent import wire
from vmjob.guest.client import AgentClient, TaskEnd
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver

pytestmark = pytest.mark.anyio

#: An answer: the body of a 200.
Reply = Callable[[str, dict[str, Any]], bytes]
END = {"exit_code": 0, "signal": None, "wall_seconds": 1.0, "rusage": {}, "ended_by": None,
       "cpu_seconds": None, "memory_peak_bytes": None, "oom_kills": 0}


async def serve(sock: socket.socket, reply: Reply) -> None:
    """Keep to the protocol on one lane; what is answered is for ``reply`` to say."""
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        while True:
            line = (await reader.readline()).strip()
            if line.startswith(wire.SYNC):
                writer.write(wire.SYNC_ACK + line[len(wire.SYNC):] + b"\n")
            elif line:
                rest = await reader.readuntil(b"\r\n\r\n")
                fields = wire.parse_fields(rest.strip().split(b"\r\n"))
                body = await reader.readexactly(int(fields["content-length"]))
                said = reply(line.split(b" ")[1].decode(),
                             json.loads(body) if body.startswith(b"{") else {})
                writer.write(wire.response_head(200, {"content-length": str(len(said))}) + said)
            elif reader.at_eof():
                return
    finally:
        writer.close()


@asynccontextmanager
async def scripted(reply: Reply) -> AsyncIterator[AgentClient]:
    """A client whose every lane is answered by ``reply(target, body)``."""
    pairs = {name: socket.socketpair() for name in wire.LANES}
    servers = [asyncio.ensure_future(serve(theirs, reply)) for name, (_, theirs) in pairs.items()
               if name != "data"]
    client = AgentClient({name: pair[0] for name, pair in pairs.items()})
    try:
        yield client
    finally:
        client.close()
        pairs["data"][1].close()
        with anyio.fail_after(10):
            await asyncio.gather(*servers, return_exceptions=True)


def output(head: object, data: bytes = b"") -> Reply:
    def reply(target: str, asked: dict[str, Any]) -> bytes:
        if target == "/v1/tasks":
            return b'{"id": 1, "epoch": 1}\n'
        return json.dumps(head).encode() + b"\n" + data
    return reply


NONE_NEW = {"newest_message": 0}


def news(task: str = "1", *, out: tuple[int, int] = (0, 0), err: tuple[int, int] = (0, 0),
         end: object = None, messages: object = ()) -> dict[str, object]:
    streams = {name: {"offset": offset, "length": length}
               for name, (offset, length) in (("stdout", out), ("stderr", err))}
    return {"tasks": {task: {**streams, "end": end}}, "messages": messages,
            "newest_message": 0, "epoch": 1}


async def followed(reply: Reply) -> tuple[TaskEnd, bytes]:
    got = b""

    async def take(stream: str, data: bytes) -> None:
        nonlocal got
        got += data

    async with scripted(reply) as client:
        with anyio.fail_after(10):
            return await client.follow(await client.start(["x"]), take), got


async def test_the_scripted_guest_can_tell_the_truth() -> None:
    end, got = await followed(output(news(out=(0, 3), end=END), b"abc"))
    assert (end.exit_code, got) == (0, b"abc")


@pytest.mark.parametrize(("said", "data"), [
    ([], b""), ("x", b""), ({}, b""), ({"epoch": 1, "messages": [], **NONE_NEW}, b""),
    ({"epoch": "1", "tasks": {}, "messages": [], **NONE_NEW}, b""),
    ({"epoch": 1 << 70, "tasks": {}, "messages": [], **NONE_NEW}, b""),
    (news(out=(5, 3)), b"abc"),
    (news(out=(0, 3)), b"ab"),
    (news(err=(7, 0), end=END), b""),
    (news(out=(0, -1)), b""),
    (news(out=(0, 1 << 40)), b"abc"),
    (news("2", out=(0, 1)), b"x"),
    (news("x", out=(0, 1)), b"x"),
    ({"epoch": 1, "tasks": {"1": 5}, "messages": [], **NONE_NEW}, b""),
    ({"epoch": 1, "tasks": {"1": {}}, "messages": [], **NONE_NEW}, b""),
    (news(end=5), b""),
    (news(end={**END, "exit_code": 300}), b""),
    (news(end={**END, "exit_code": True}), b""),
    (news(end={**END, "signal": 9}), b""),
    (news(end={**END, "exit_code": None}), b""),
    (news(end={**END, "exit_code": None, "signal": 65}), b""),
    (news(end={**END, "rusage": {"ru_utime": "x"}}), b""),
    (news(end={**END, "wall_seconds": float("nan")}), b""),
    (news(end={**END, "wall_seconds": float("inf")}), b""),
    (news(end={**END, "oom_kills": None}), b""),
    (news(end={}), b""),
    (news(messages=5), b""), (news(messages=[[1]]), b""), (news(messages=[["1", "x"]]), b""),
    (news(messages=[[1, 5]]), b""),
])
async def test_output_that_cannot_be_is_refused(said: object, data: bytes) -> None:
    with pytest.raises(AgentProtocol):
        await followed(output(said, data))


@pytest.mark.parametrize("answer", [b"", b"\n", b"[]", b"{}", b'{"id": -1, "epoch": 1}',
                                    b'{"id": 1.5, "epoch": 1}', b'{"id": true, "epoch": 1}',
                                    b'{"id": 1}', b"[" * 100_000, b"9" * 100_000])
async def test_a_start_that_answers_nonsense_is_refused(answer: bytes) -> None:
    with pytest.raises(AgentProtocol):
        await followed(lambda target, asked: answer)


@pytest.mark.parametrize("wrong", [
    {"unknown": True}, {"stdout": {"offset": 9, "length": 2}, "stderr": {"offset": 0, "length": 0},
                        "end": END}])
async def test_what_is_wrong_with_one_command_does_not_reach_another(wrong: object) -> None:
    numbers = iter([1, 2])
    asked_for: list[set[str]] = []

    def reply(target: str, asked: dict[str, Any]) -> bytes:
        if target == "/v1/tasks":
            return b'{"id": %d, "epoch": 1}\n' % next(numbers)
        asked_for.append(set(asked["tasks"]))
        both = len(asked_for) == 2  # the first question may come before the second follower
        out = {"offset": 3 if len(asked_for) > 2 else 0, "length": 3 if both else 0}
        told = {"1": {"stdout": out, "stderr": {"offset": 0, "length": 0},
                      "end": END if len(asked_for) == 3 else None}}
        if "2" in asked["tasks"]:
            told["2"] = wrong
        data = (b"abc" if both else b"")
        if "2" in asked["tasks"] and "stdout" in wrong:
            data += b"no"
        return json.dumps({**NONE_NEW, "tasks": {key: told[key] for key in asked["tasks"]},
                           "messages": [], "epoch": 1}).encode() + b"\n" + data

    got = bytearray()

    async def take(stream: str, data: bytes) -> None:
        got.extend(data)

    async with scripted(reply) as client:
        good, bad = await client.start(["x"]), await client.start(["y"])
        with anyio.fail_after(10):
            ends = await asyncio.gather(client.follow(good, take), client.follow(bad, take),
                                        return_exceptions=True)
    assert isinstance(ends[0], TaskEnd)
    assert isinstance(ends[1], AgentLost | AgentProtocol)
    assert got == b"abc"
    assert sum("2" in each for each in asked_for) == 1


async def test_who_asks_for_output_that_never_was_fails_alone(
        client: AgentClient) -> None:
    async def ignore(stream: str, data: bytes) -> None: ...

    endless = ["sh", "-c", "while :; do echo on; sleep 0.01; done"]
    other, bad = await client.start(endless), await client.start(endless)
    following = asyncio.ensure_future(client.follow(other, ignore))
    with anyio.fail_after(10), pytest.raises(AgentProtocol, match="gap"):
        await client.follow(bad, ignore, {"stdout": 1 << 40})
    await client.signal(other, 9)
    with anyio.fail_after(10):
        assert (await following).signal == 9


async def test_a_command_that_the_agent_forgot_is_lost() -> None:
    with pytest.raises(AgentLost, match="no longer knows command 1"):
        await followed(output({"epoch": 1, "tasks": {"1": {"unknown": True}}, "messages": [],
                               **NONE_NEW}))


@pytest.mark.parametrize("taken", [-1, 4, 1 << 40, "3", None])
async def test_an_agent_that_takes_input_it_was_not_given_is_refused(taken: object) -> None:
    async def source() -> bytes:
        return b"abc"

    async with scripted(lambda target, asked: json.dumps({"taken": taken, "open": True}).encode()
                        ) as client:
        with anyio.fail_after(10), pytest.raises(AgentProtocol):
            await client.feed(1, source)


async def test_a_message_is_heard_once_and_in_order() -> None:
    said = iter([[[1, "one"], [2, "two"]], [[2, "two"], [1, "one"], [3, "x" * 5000]], []])
    heard: list[str] = []

    def reply(target: str, asked: dict[str, Any]) -> bytes:
        head = {"epoch": 1, "tasks": {}, "messages": next(said), **NONE_NEW}
        return json.dumps(head).encode() + b"\n"

    async with scripted(reply) as client:
        client.on_message(heard.append)
        for _ in range(3):
            await client.poll_messages()
    assert heard == ["one", "two", "x" * wire.MAX_MESSAGE]


@pytest.mark.parametrize("said", [
    {}, {"protocol": "1"}, {"protocol": 1, "oldest": 1, "generation": 5},
    {"protocol": 1, "oldest": 1, "generation": "a", "kernel": "6", "processor": "p",
     "processor_flags": [], "cpus": "many",
     "memory_bytes": 1, "workdir": "/job"}])
async def test_an_introduction_that_does_not_fit_is_refused(said: object) -> None:
    async with scripted(lambda target, asked: json.dumps(said).encode()) as client:
        with pytest.raises(AgentProtocol):
            await client.hello(10)


async def test_another_agent_than_the_one_that_said_hello_is_noticed() -> None:
    names = iter("ab")
    hello = {"protocol": 1, "oldest": 1, "kernel": "6", "processor": "p",
             "processor_flags": [], "cpus": 1, "memory_bytes": 1,
             "workdir": "/job"}
    async with scripted(lambda target, asked: json.dumps(
            {**hello, "generation": next(names)}).encode()) as client:
        await client.hello(10)
        with pytest.raises(AgentLost, match="replaced"):
            await client.ping()


# -- with the real agent -------------------------------------------------------------------------


@pytest.fixture
async def client(home: Home, fake_shape: MachineSpec) -> AsyncIterator[AgentClient]:
    async with open_session(home, FakeDriver(), fake_shape) as session:
        yield session.client


async def test_a_slow_reader_does_not_wait_for_news_of_other_commands(
        client: AgentClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held for it is full, so the others are polled without it: until it has room."""
    monkeypatch.setattr(client_module, "HELD_OUTPUT", 100_000)
    go_on = anyio.Event()
    polled_without = anyio.Event()
    real = client._output.request

    async def request(method: str, target: str, body: Any, **more: Any) -> Any:
        if str(slow) not in body["tasks"]:
            polled_without.set()
        return await real(method, target, body, **more)

    monkeypatch.setattr(client._output, "request", request)
    got = 0

    async def take(stream: str, data: bytes) -> None:
        nonlocal got
        got += len(data)
        await go_on.wait()

    async def ignore(stream: str, data: bytes) -> None: ...

    slow = await client.start(["head", "-c", "5000000", "/dev/zero"])
    other = await client.start(["sleep", "1000"])
    async with anyio.create_task_group() as group:
        group.start_soon(client.follow, other, ignore)
        with anyio.fail_after(15):
            async with anyio.create_task_group() as inner:
                inner.start_soon(client.follow, slow, take)
                await polled_without.wait()
                go_on.set()
        group.cancel_scope.cancel()
    assert got == 5_000_000


async def test_output_goes_on_where_a_cancelled_reader_left_it_for_the_agent(
        client: AgentClient) -> None:
    """Until it is acknowledged the agent keeps it: a new reader gets every byte again."""
    task = await client.start(["sh", "-c", "echo first; read x; echo second"], stdin=True)
    heard = anyio.Event()
    got: list[bytes] = []

    async def take(stream: str, data: bytes) -> None:
        got.append(data)
        heard.set()

    async with anyio.create_task_group() as group:
        group.start_soon(client.follow, task, take)
        await heard.wait()
        group.cancel_scope.cancel()
    got.clear()
    pieces = iter([b"go\n", b""])

    async def source() -> bytes:
        return next(pieces)

    async with anyio.create_task_group() as group:
        group.start_soon(client.feed, task, source)
        await client.follow(task, take)
    assert b"".join(got) == b"first\nsecond\n"


async def test_the_agent_repeats_output_from_any_offset_it_still_holds(
        client: AgentClient) -> None:
    task = await client.start(["printf", "0123456789"])

    async def ask(offset: int) -> tuple[dict[str, Any], bytes]:
        answer = await client._output.request(
            "POST", "/v1/output", {"tasks": {str(task): {"stdout": offset, "stderr": 0}},
                                   "messages_after": 0, "wait_seconds": 5, "epoch": task})
        head, _, data = answer.body.partition(b"\n")
        return json.loads(head)["tasks"][str(task)], data

    with anyio.fail_after(10):
        while (await ask(0))[0]["end"] is None:
            pass
    assert (await ask(0))[1] == b"0123456789"
    assert (await ask(4))[1] == b"456789"
    told, data = await ask(2)
    assert (told["stdout"], data) == ({"offset": 4, "length": 6}, b"456789")  # 4 was acknowledged
    told, data = await ask(99)
    assert (told["stdout"], data) == ({"offset": 10, "length": 0}, b"")


async def test_a_feed_ends_with_the_command_that_did_not_read_it(client: AgentClient) -> None:
    async def source() -> bytes:
        return b"x" * 60_000

    task = await client.start(["sleep", "0.2"], stdin=True)
    with anyio.fail_after(3):  # well before the agent's INPUT_PATIENCE
        await client.feed(task, source)


async def test_what_came_of_a_command_is_known_until_it_is_forgotten(
        home: Home, fake_shape: MachineSpec) -> None:
    """A checkpoint may be made between the end of its output and that of the job's bookkeeping."""
    got = b""

    async def take(stream: str, data: bytes) -> None:
        nonlocal got
        got += data

    async with open_session(home, FakeDriver(), fake_shape) as session:
        client = session.client
        client.continue_command(77, {"stdout": 5, "stderr": 0})
        assert client.received(77) == {"stdout": 5, "stderr": 0}
        task = await client.start(["echo", "abc"])
        await client.follow(task, take)
        assert got == b"abc\n"
        assert client.received(task) == {"stdout": 4, "stderr": 0}
        client.forget(task)
        assert client.received(task) == {"stdout": 0, "stderr": 0}
