"""Cancellation of work whose client disconnected.

Only slow requests are watched: a fast one is answered before a disconnect would matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")

WATCH_AFTER_S: Final = 0.1
"""A request that takes longer is watched for a disconnect of its client."""


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work for a request that was received completely.

    Raises:
        ClientDisconnect: the client disconnected first; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=WATCH_AFTER_S)
        if not done:
            disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
            try:
                await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                disconnect.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                raise ClientDisconnect
        return await task
    finally:
        task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
