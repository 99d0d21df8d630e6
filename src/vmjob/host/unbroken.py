"""Work that must not be left in the middle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["unbroken"]

T = TypeVar("T")


async def unbroken(work: Coroutine[Any, Any, T],
                   may_cancel: Callable[[], bool] = lambda: False) -> T:
    """Do ``work`` to its end even when cancelled, which is then passed on.

    Where ``may_cancel`` says so at that time, the work is cancelled too, and waited for. anyio's
    shields do not hold off asyncio's own cancellation, nor do threads end by either.
    """
    doing = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        if may_cancel():
            doing.cancel()
        while not doing.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([doing])
        if not doing.cancelled():
            doing.exception()  # it was heard of
        raise
