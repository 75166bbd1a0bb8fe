"""Clients that leave while they wait: what they asked for is given up.

Only those are looked after whose answer takes long: the others are answered before it would matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")

PATIENCE_S: Final = 0.1
"""How long an answer takes before anybody looks whether it is still waited for."""


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, whose request was read to its end.

    Raises:
        ClientDisconnect: the client left first; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        if not done:
            await _until_left(request, task)
        return await task
    finally:
        task.cancel()


async def _until_left(request: Request, task: asyncio.Task[T]) -> None:
    """Until the work is done.

    Raises:
        ClientDisconnect
    """
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise ClientDisconnect
    finally:
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
