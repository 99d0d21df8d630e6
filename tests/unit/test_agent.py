"""The agent, as a process of this computer, through the host's client."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import psutil
import pytest

from vmjob.engine.session import Session, open_session
from vmjob.errors import (
    AgentProtocol,
    AgentVersion,
    CommandNotExecutable,
    CommandNotFound,
    GuestRefused,
    InputMissing,
    OutputMissing,
    UsageError,
    VmjobError,
)
from vmjob.guest.agent import wire
from vmjob.guest.client import AgentClient, Limits, TaskEnd
from vmjob.home import Home
from vmjob.machine.contract import MachineSpec
from vmjob.machine.fake import FakeDriver

pytestmark = pytest.mark.anyio


@pytest.fixture
async def session(home: Home, fake_shape: MachineSpec) -> AsyncIterator[Session]:
    async with open_session(home, FakeDriver(), fake_shape) as opened:
        yield opened


@pytest.fixture
def client(session: Session) -> AgentClient:
    return session.client


async def nothing(stream: str, data: bytes) -> None: ...


async def run(client: AgentClient, *argv: str, **more: object) -> tuple[TaskEnd, bytes, bytes]:
    caught = {"stdout": b"", "stderr": b""}

    async def take(stream: str, data: bytes) -> None:
        caught[stream] += data

    task = await client.start(list(argv), **more)  # type: ignore[arg-type]
    end = await client.follow(task, take)
    client.forget(task)
    return end, caught["stdout"], caught["stderr"]


async def test_a_command_gives_its_streams_and_exit_code(client: AgentClient) -> None:
    end, out, err = await run(client, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (end.exit_code, end.signal, out, err) == (7, None, b"out\n", b"err\n")
    assert set(end.rusage) >= {"ru_utime", "ru_maxrss", "ru_nivcsw"}
    assert len(end.rusage) == 16


async def test_a_signal_is_told_apart_from_an_exit_code(client: AgentClient) -> None:
    end, _, _ = await run(client, "sh", "-c", "kill -9 $$")
    assert (end.exit_code, end.signal) == (None, 9)


async def test_more_arguments_than_a_machine_takes_are_told_at_once(client: AgentClient) -> None:
    with anyio.fail_after(5), pytest.raises(UsageError, match="arguments"):
        await run(client, "true", "a" * wire.MAX_REQUEST_PIECE)
    end, _, _ = await run(client, "true", "a" * (wire.MAX_REQUEST_PIECE - 1000))
    assert end.exit_code == 0


async def test_what_cannot_be_started_says_why(client: AgentClient, tmp_path: Path) -> None:
    with pytest.raises(CommandNotFound):
        await run(client, "no-such-program")
    with pytest.raises(CommandNotExecutable):
        await run(client, "/etc/passwd")
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(CommandNotExecutable, match="interpreter"):
        await run(client, str(script))
    with pytest.raises(GuestRefused, match="cannot enter"):
        await run(client, "true", cwd="missing")
    with pytest.raises(GuestRefused, match="no user"):
        await run(client, "true", user="nobody-of-that-name")


async def test_environment_and_directory_are_those_asked_for(client: AgentClient) -> None:
    await client.mkdir("deep/er")
    _, out, _ = await run(client, "sh", "-c", 'pwd; echo "$A $LANG"', cwd="deep/er",
                          env={"A": "a b"})
    assert out.decode().splitlines()[0].endswith("/job/deep/er")
    assert out.decode().splitlines()[1] == "a b C.UTF-8"


async def test_output_larger_than_every_buffer_arrives_whole(client: AgentClient) -> None:
    end, out, _ = await run(client, "sh", "-c", "head -c 10000000 /dev/zero | tr '\\0' x")
    assert end.exit_code == 0
    assert out == b"x" * 10_000_000


async def test_a_slow_reader_stops_the_job_and_loses_nothing(client: AgentClient) -> None:
    first = anyio.Event()
    go_on = anyio.Event()
    got = 0

    async def take(stream: str, data: bytes) -> None:
        nonlocal got
        got += len(data)
        first.set()
        await go_on.wait()

    task = await client.start(["sh", "-c", "head -c 20000000 /dev/zero"])
    async with anyio.create_task_group() as group:
        group.start_soon(client.follow, task, take)
        await first.wait()
        await client.ping()
        assert got <= 2 * wire.STREAM_WINDOW
        go_on.set()
    assert got == 20_000_000


async def test_input_arrives_whole_and_ends(client: AgentClient) -> None:
    pieces = iter([b"a" * 300_000, b"b" * 5, b""])

    async def source() -> bytes:
        return next(pieces)

    task = await client.start(["wc", "-c"], stdin=True)
    got = b""

    async def take(stream: str, data: bytes) -> None:
        nonlocal got
        got += data

    async with anyio.create_task_group() as group:
        group.start_soon(client.feed, task, source)
        await client.follow(task, take)
    assert got.strip() == b"300005"


async def test_input_that_nobody_reads_does_not_hold_the_job(client: AgentClient) -> None:
    async def source() -> bytes:
        return b"x" * 100_000

    task = await client.start(["sleep", "0.3"], stdin=True)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(client.feed, task, source)
            assert (await client.follow(task, nothing)).exit_code == 0


async def test_input_is_taken_by_offset_once_and_without_gaps(client: AgentClient) -> None:
    task = await client.start(["cat"], stdin=True)
    for offset, piece in ((0, b"abc"), (1, b"bcd"), (0, b"abcd")):
        await client._input.request("POST", f"/v1/tasks/{task}/stdin?offset={offset}", piece)
    with pytest.raises(GuestRefused, match="gap"):
        await client._input.request("POST", f"/v1/tasks/{task}/stdin?offset=9", b"x")
    await client._input.request("POST", f"/v1/tasks/{task}/stdin?offset=4&end=1", b"")
    got = b""

    async def take(stream: str, data: bytes) -> None:
        nonlocal got
        got += data

    await client.follow(task, take)
    assert got == b"abcd"


async def test_a_signal_reaches_the_whole_tree(client: AgentClient) -> None:
    task = await client.start(["sh", "-c", "sleep 1000 & sleep 1000; echo not reached"])
    await client.signal(task, signal.SIGTERM, why="asked")
    end = await client.follow(task, nothing)
    assert (end.signal, end.ended_by) == (signal.SIGTERM, "asked")


async def test_a_job_that_closes_its_streams_still_ends_properly(client: AgentClient) -> None:
    end, _, _ = await run(client, "sh", "-c", "exec >&- 2>&- <&-; sleep 0.2; exit 3")
    assert end.exit_code == 3


async def test_what_a_job_leaves_running_does_not_hold_its_end(client: AgentClient) -> None:
    with anyio.fail_after(20):
        end, out, _ = await run(client, "sh", "-c", "mkfifo f; "
                                "setsid sh -c 'echo $$ > f; exec sleep 1000' & cat f")
    assert end.exit_code == 0
    assert psutil.pid_exists(int(out))  # without control groups only the machine's end reaches it


async def test_commands_run_side_by_side(client: AgentClient) -> None:
    ends: list[int] = []

    async def one(number: int) -> None:
        end, out, _ = await run(client, "sh", "-c", f"sleep 0.{9 - number}; echo {number}")
        assert out.strip() == str(number).encode()
        ends.append(number)

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(one, number)
    assert sorted(ends) == list(range(8))


async def test_three_hundred_commands_leave_no_descriptor_open(client: AgentClient,
                                                               session: Session) -> None:
    agent = psutil.Process(session.machine.agent_pid)  # type: ignore[attr-defined]
    await run(client, "true")
    before = agent.num_fds()
    for _ in range(300):
        await run(client, "true")
    assert agent.num_fds() == before
    assert len((await client._control.request("GET", "/v1/tasks")).json()["tasks"]) <= 1


async def test_files_come_back_as_they_went(client: AgentClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "data").write_bytes(os.urandom(3_000_000))
    await client.put(source, "there/it is")
    await client.get("there/it is", tmp_path / "back", limit=1 << 30)
    assert (tmp_path / "back" / "sub" / "data").read_bytes() == \
        (source / "sub" / "data").read_bytes()
    assert [entry.name for entry in await client.ls("there")] == ["it is"]
    await client.delete("there")
    assert await client.ls() == []


async def test_an_output_that_is_not_there_is_missing_and_nothing_appears(
        client: AgentClient, tmp_path: Path) -> None:
    with pytest.raises(OutputMissing):
        await client.get("nothing", tmp_path / "x", limit=1)
    with pytest.raises(InputMissing):
        await client.put(tmp_path / "nothing", "x")
    assert list(tmp_path.glob("*x*")) == []


@pytest.mark.parametrize("direction", ["put", "get"])
async def test_a_transfer_that_is_cut_off_leaves_no_half_file(
        client: AgentClient, tmp_path: Path, direction: str) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        for _ in range(200):
            file.write(b"x" * 1_000_000)
    if direction == "get":
        await client.put(big, "big")
    with anyio.CancelScope() as scope:
        def cut(count: int) -> None:
            if count > 300_000:
                anyio.from_thread.run_sync(scope.cancel, token=token)

        token = anyio.lowlevel.current_token()
        if direction == "put":
            await client.put(big, "half", progress=cut)
        else:
            await client.get("big", tmp_path / "half", limit=1 << 40, progress=cut)
    assert scope.cancelled_caught
    small = tmp_path / "small"
    small.write_bytes(b"next")
    await client.put(small, "small")  # the lane is clean again, and what was half is gone
    assert [entry.name for entry in await client.ls() if "half" in entry.name
            or entry.name.startswith(".")] == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".vmjob")] == []
    assert not (tmp_path / "half").exists()


async def test_messages_go_both_ways(client: AgentClient) -> None:
    heard: list[str] = []
    client.on_message(heard.append)
    await client.message_to_guest("hello\nguest")
    _, out, _ = await run(client, "sh", "-c",
                          'cat "$VMJOB_FROM_HOST"; echo "hello host" > "$VMJOB_TO_HOST"')
    await client.poll_messages()
    assert out == b"hello guest\n"
    assert heard == ["hello host"]
    with pytest.raises(GuestRefused):
        await client.message_to_guest("x" * 5000)


async def test_a_flood_of_messages_is_bounded(client: AgentClient) -> None:
    heard: list[str] = []
    client.on_message(heard.append)
    await run(client, "sh", "-c", 'yes "$(head -c 3000 /dev/zero | tr "\\0" y)" | head -5000 '
                                  '> "$VMJOB_TO_HOST"')
    await client.poll_messages()
    assert all(len(text) <= wire.MAX_MESSAGE for text in heard)


async def test_a_short_command_is_told_in_one_exchange(client: AgentClient) -> None:
    polled = client._output.sent
    end, out, err = await run(client, "sh", "-c", "echo out; echo err >&2; exit 3", wait=5.0)
    assert (end.exit_code, out, err) == (3, b"out\n", b"err\n")
    assert client._output.sent == polled


async def test_a_command_that_is_not_short_goes_on_where_its_start_left_off(
        client: AgentClient) -> None:
    script = "echo one; read line < $VMJOB_FROM_HOST; sleep 0.05; echo two"
    end, out, _ = await run(client, "sh", "-c", script, wait=0.001)
    assert (end.exit_code, out) == (0, b"one\ntwo\n")


async def test_more_output_than_an_answer_holds_follows_after_a_short_wait(
        client: AgentClient) -> None:
    end, out, _ = await run(client, "head", "-c", "5000000", "/dev/zero", wait=5.0)
    assert (end.exit_code, len(out)) == (0, 5_000_000)


async def test_a_full_window_in_the_pipe_of_a_command_that_has_ended_arrives_whole(
        client: AgentClient) -> None:
    # F_SETPIPE_SZ: what it holds is as much as the agent does, and nobody looked before the end.
    script = ("import fcntl, os; fcntl.fcntl(1, 1031, 1 << 20);"
              "os.write(1, b'x' * (1 << 20)); os.write(2, b'done'); os._exit(3)")
    end, out, err = await run(client, "python3", "-I", "-S", "-c", script, wait=5.0)
    assert (end.exit_code, len(out), err) == (3, wire.STREAM_WINDOW, b"done")


async def test_all_that_a_command_said_is_heard_before_its_end(client: AgentClient) -> None:
    heard: list[str] = []
    client.on_message(heard.append)
    script = "for i in $(seq 300); do printf '%s %01000d\\n' $i 0; done > $VMJOB_TO_HOST"
    for wait in (5.0, 0.0):
        end, _, _ = await run(client, "sh", "-c", script, wait=wait)
        assert end.exit_code == 0
        assert [text.split()[0] for text in heard] == [str(n) for n in range(1, 301)]
        heard.clear()


async def test_a_command_that_nobody_follows_holds_nobody_up(client: AgentClient) -> None:
    task = await client.start(["sh", "-c", "echo unheard; exec sleep 1000"], wait=0.001)
    end, out, _ = await run(client, "echo", "heard", wait=5.0)
    assert (end.exit_code, out) == (0, b"heard\n")
    await client.signal(task, 9)


@pytest.mark.parametrize("asked", [
    {}, {"argv": []}, {"argv": "ls"}, {"argv": [1]}, {"argv": ["a\0b"]},
    {"argv": ["true"], "limits": {"cpu_seconds": "x"}}, {"argv": ["true"], "env": 5}])
async def test_a_request_that_makes_no_sense_is_refused_and_the_agent_lives(
        client: AgentClient, asked: dict[str, object]) -> None:
    with pytest.raises(GuestRefused):
        await client._control.request("POST", "/v1/tasks", asked)
    await client.ping()


async def test_a_job_cannot_lift_its_file_limit(client: AgentClient) -> None:
    end, out, _ = await run(client, "sh", "-c", "sleep 0.2; ulimit -S -f unlimited || echo no; "
                            "head -c 100000 /dev/zero > big; wc -c < big",
                            limits=Limits(file_bytes=4096))
    assert int(out.split()[-1]) <= 4096
    del end


async def test_a_relative_directory_in_the_path_is_below_the_jobs(client: AgentClient) -> None:
    await run(client, "sh", "-c", "mkdir bin; printf '#!/bin/sh\necho mine' > bin/tool; "
                                  "chmod +x bin/tool")
    _, out, _ = await run(client, "tool", env={"PATH": "bin:/usr/bin:/bin"})
    assert out == b"mine\n"


async def test_a_cpu_limit_is_told_as_one(client: AgentClient) -> None:
    end, _, _ = await run(client, "sh", "-c", "while :; do :; done", limits=Limits(cpu_seconds=1))
    assert end.ended_by == "cpu-limit"


async def test_a_start_that_nobody_waited_for_leaves_no_process(client: AgentClient) -> None:
    with anyio.move_on_after(0.05):
        await client.start(["sh", "-c", "trap '' TERM; exec sleep 1000"], wait=5.0)
    await run(client, "true")
    with anyio.fail_after(10):
        while any(task["end"] is None  # noqa: ASYNC110 - it is announced to nobody
                  for task in await tasks_of(client)):
            await anyio.sleep(0.01)


async def tasks_of(client: AgentClient) -> list[dict[str, object]]:
    answer = await client._control.request("GET", "/v1/tasks")
    found: list[dict[str, object]] = answer.json()["tasks"]
    return found


async def test_file_limits_hold(client: AgentClient) -> None:
    end, _, _ = await run(client, "sh", "-c", "head -c 100000 /dev/zero > big",
                          limits=Limits(file_bytes=1000))
    assert end.exit_code != 0 or end.signal is not None
    assert [entry.size for entry in await client.ls()] == [1000]


LIES = [
    {"exit_code": 300, "signal": None}, {"exit_code": -1, "signal": None},
    {"exit_code": None, "signal": None}, {"exit_code": 0, "signal": 9},
    {"exit_code": None, "signal": 0}, {"exit_code": "0", "signal": None}]


@pytest.mark.parametrize("lie", LIES)
def test_a_result_that_cannot_be_is_refused(lie: dict[str, object]) -> None:
    from vmjob.guest.client import _check_end, _convert

    said = {"wall_seconds": 1.0, "rusage": {}, "ended_by": None, "cpu_seconds": None,
            "memory_peak_bytes": None, "oom_kills": 0, **lie}
    with pytest.raises(AgentProtocol):
        _check_end(_convert(said, TaskEnd))


async def test_an_agent_of_another_protocol_is_refused(client: AgentClient,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "OLDEST_PROTOCOL", 99)
    with pytest.raises(AgentVersion) as caught:
        await client.hello(5)
    assert isinstance(caught.value, VmjobError)
    assert "image build" in caught.value.advice
