"""Messages fit into a channel whatever is said, and nonsense from the client is nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.grid.boinc import Channel, Channels, ChannelsUnusable, Status, messages
from vmjob.grid.boinc.channels import LENGTH, MAX_TEXT, SIZE
from vmjob.grid.boinc.messages import Command, Heartbeat

numbers = st.floats() | st.integers(-(1 << 70), 1 << 70).map(float)
statuses = st.builds(Status, numbers, st.none() | numbers, st.none() | st.integers(),
                     st.none() | numbers, st.none() | numbers, st.booleans(), st.none() | numbers)
#: What could be in a channel: any bytes, or pieces of messages in any order.
texts = st.text(max_size=300) | st.lists(st.sampled_from([
    "<suspend/>", "<quit />", "<heartbeat/>", "<wss>", "1e+07", "1e999", "nan", "-1", "</wss>",
    "<max_wss>", "<network_suspended/>", "<network_suspended>1", "<network_suspended>0",
    "<have_trickle_down/>", "<upload_file_status/>", "<status>", "<", ">", "\n", "9" * 400,
]), max_size=20).map("".join)


@given(statuses, numbers, st.floats(0, 0.5), st.floats(0.5, 1))
def test_a_status_fits_and_has_both_times(status: Status, checkpoint: float, first: float,
                                          last: float) -> None:
    text = messages.app_status(status, checkpoint, first, last)
    assert len(text) <= MAX_TEXT
    found = {name: float(value) for name, value in re.findall(r"<(\w+)>([-+.\de]+)</\1>\n", text)}
    assert text == "".join(re.findall(r"<\w+>[^<]*</\w+>\n", text))
    assert found["current_cpu_time"] >= found["checkpoint_cpu_time"] >= 0
    assert first - 1e-8 <= found.get("fraction_done", first) <= last + 1e-8
    assert found.get("other_pid", 2) > 1


def test_only_what_is_known_is_said() -> None:
    assert messages.app_status(Status(1.5), 0) == (
        "<current_cpu_time>1.500000</current_cpu_time>\n"
        "<checkpoint_cpu_time>0.000000</checkpoint_cpu_time>\n")
    assert messages.app_status(
        Status(2, 0.5, 4711, 10, 20, want_network=True, memory_bytes=1e6), 2).endswith(
        "<fraction_done>0.500000000</fraction_done>\n<other_pid>4711</other_pid>\n"
        "<bytes_sent>10</bytes_sent>\n<bytes_received>20</bytes_received>\n<wss>1000000</wss>\n"
        "<want_network>1</want_network>\n")


def test_a_checkpoint_after_weeks_is_still_a_change() -> None:
    a = messages.app_status(Status(5e7), 5e7)
    assert a != messages.app_status(Status(5e7), 5e7 + 0.001)


@given(texts)
def test_any_text_is_read_or_is_nothing(text: str) -> None:
    assert all(isinstance(each, Command) for each in messages.commands(text))
    beat = messages.heartbeat(text)
    if beat is not None:
        assert all(each is None or each >= 0 for each in (beat.used_bytes, beat.allowed_bytes))
    messages.trickle_flags(text)
    status = messages.upload_status(text)
    assert status is None or abs(status) < 1e9


def test_commands_are_told_in_their_order() -> None:
    assert messages.commands("<suspend/>\n") == (Command.SUSPEND,)
    assert messages.commands("x<abort/><unknown/><reread_app_info/><quit />") == (
        Command.ABORT, Command.REREAD, Command.QUIT)
    assert messages.commands("<suspend>") == ()


def test_a_heartbeat_is_one_only_with_its_tag() -> None:
    assert messages.heartbeat("<wss>1</wss>") is None
    assert messages.heartbeat("<heartbeat/>") == Heartbeat()
    assert messages.heartbeat(
        "<heartbeat/>\n<wss>1.100000e+07</wss>\n<max_wss>2.2e+10</max_wss>\n<network_suspended/>"
    ) == Heartbeat(11_000_000, 22_000_000_000, network_suspended=True)


@pytest.mark.parametrize("address", ["", "a b", "<x>", "é" * 200, "x\n", "\0"])
def test_an_address_that_cannot_be_shown_is_refused(address: str) -> None:
    for build in (messages.web_address, messages.remote_desktop):
        with pytest.raises(ValueError):
            build(address)


@given(st.text(max_size=300))
def test_an_address_that_is_taken_fits(address: str) -> None:
    try:
        text = messages.web_address(address)
    except ValueError:
        return
    assert len(text.encode()) <= MAX_TEXT
    assert text.count("<") == 2


@given(st.text(max_size=30), st.text(max_size=100))
def test_a_trickle_is_a_variety_and_then_the_text_as_it_is(variety: str, text: str) -> None:
    try:
        data = messages.trickle(variety, text)
    except ValueError:
        return
    assert data == f"<variety>{variety}</variety>\n{text}".encode("utf-8", "replace")


def test_a_trickle_that_cannot_be_sent_is_refused() -> None:
    for variety, text in [("", "x"), ("a<b", "x"), ("a\nb", "x"), ("a", "\0"),
                          ("a", "x" * messages.MAX_TRICKLE)]:
        with pytest.raises(ValueError):
            messages.trickle(variety, text)


@given(st.text(), st.integers(1, 50))
def test_one_line_is_one_and_short(text: str, most: int) -> None:
    line = messages.one_line(text, most)
    assert len(line.encode()) <= most
    assert line.isprintable()
    assert line == line.strip()


# -- channels --------------------------------------------------------------------------------------


@given(st.binary(max_size=SIZE), st.sampled_from(Channel))
def test_garbage_in_a_channel_is_a_text_or_nothing(data: bytes, channel: Channel) -> None:
    memory = bytearray(LENGTH)
    start = channel * SIZE
    memory[start:start + len(data)] = data
    with Channels(memoryview(memory)) as channels:
        text = channels.get(channel)
        assert (text is None) == (not data or not data[0])
        assert channels.get(channel) is None
    before = bytearray(LENGTH)
    before[start:start + len(data)] = data
    before[start] = 0
    assert memory == before


@given(st.lists(st.tuples(st.sampled_from(Channel), st.text(max_size=400).filter(
    lambda text: "\0" not in text))))
def test_what_is_put_is_got_in_each_channel_alone(said: list[tuple[Channel, str]]) -> None:
    waiting: dict[Channel, str] = {}
    with Channels(memoryview(bytearray(LENGTH))) as channels:
        for channel, text in said:
            if len(text.encode()) > MAX_TEXT:
                continue
            assert channels.put(channel, text) == (channel not in waiting)
            waiting.setdefault(channel, text)
        for channel in Channel:
            assert channels.is_full(channel) == (channel in waiting)
            assert channels.get(channel) == waiting.get(channel)


def test_half_a_message_is_never_sent() -> None:
    with Channels(memoryview(bytearray(LENGTH))) as channels:
        for text in ("x" * (MAX_TEXT + 1), "é" * 512, "a\0b"):
            with pytest.raises(ValueError):
                channels.put(Channel.APP_STATUS, text)
        assert not channels.is_full(Channel.APP_STATUS)


def test_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(ChannelsUnusable):
        Channels(memoryview(bytearray(LENGTH - 1)))
