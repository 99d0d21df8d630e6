"""Who waits for room in a command's input is told once, and only while it waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmjob.guest.agent.loop import Loop
from vmjob.guest.agent.place import Place
from vmjob.guest.agent.tasks import Task, TaskTable


class Full:
    """A task whose input pipe is full, and who was told of room in it."""

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.table = TaskTable(Place(str(directory), str(directory), None, None), self.loop,
                               lambda: None)
        self.task = Task(1, None, None)
        self.reader, writer = os.pipe2(os.O_NONBLOCK)
        self.task.stdin = writer
        offset = 0
        while (taken := self.table.write_stdin(self.task, offset, b"x" * 65536)) > offset:
            offset = taken
        self.told = 0

    def wait(self) -> None:
        def tell() -> None:
            self.told += 1

        self.table.when_writable(self.task, tell)

    def make_room(self) -> None:
        os.read(self.reader, 1 << 20)

    def turn(self) -> None:
        """Let the loop do what is due."""
        self.loop.stopped = False

        def stop() -> None:
            self.loop.stopped = True

        self.loop.later("stop", 0.0, stop)
        self.loop.run()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Full]:
    made = Full(tmp_path)
    yield made
    made.table.close_stdin(made.task)
    os.close(made.reader)


def test_room_is_told_once(full: Full) -> None:
    full.wait()
    full.turn()
    assert full.told == 0
    full.make_room()
    full.turn()
    full.turn()
    assert full.told == 1


def test_the_end_of_the_input_is_told_as_well(full: Full) -> None:
    full.wait()
    full.table.close_stdin(full.task)
    full.turn()
    assert full.told == 1


def test_who_gave_up_is_not_told(full: Full) -> None:
    """An answer to a request that was answered already would be taken for the next one's."""
    full.wait()
    full.table.stop_waiting(full.task)
    full.make_room()
    full.turn()
    full.table.close_stdin(full.task)
    assert full.told == 0


def test_an_input_that_is_closed_already_is_told_at_once(full: Full) -> None:
    full.table.close_stdin(full.task)
    full.wait()
    assert full.told == 1
