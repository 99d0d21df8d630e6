"""Work that must not be left in the middle is not, however it is cancelled."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from vmjob.host.unbroken import unbroken

pytestmark = pytest.mark.anyio


class Work:
    def __init__(self) -> None:
        self.began, self.go_on = anyio.Event(), anyio.Event()
        self.ended = self.was_cancelled = False

    async def do(self) -> str:
        self.began.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        self.ended = True
        return "done"


async def test_what_it_returns_and_raises_comes_through() -> None:
    work = Work()
    work.go_on.set()
    assert await unbroken(work.do()) == "done"

    async def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        await unbroken(fail())


async def test_a_cancellation_waits_for_the_end_and_is_passed_on() -> None:
    work = Work()
    task = asyncio.ensure_future(unbroken(work.do()))
    await work.began.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    work.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended
    assert not work.was_cancelled


async def test_work_that_may_be_cancelled_is_waited_for_too() -> None:
    work = Work()
    task = asyncio.ensure_future(unbroken(work.do(), may_cancel=lambda: True))
    await work.began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.was_cancelled
