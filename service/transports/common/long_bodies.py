"""Long bodies are decoded one at a time, and leave half of the time to other requests.

A body up to `AT_ONCE_BYTES` is decoded in one step of the event loop. asyncio runs everything that
is ready before it reads from a socket again, so a hundred long bodies that are complete at once
would delay every other request by all of them. A longer body, which only the setting allows, is
decoded in a thread; most of its time it holds the interpreter's lock there.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from service.codec.decoding import detach_error
from service.codec.json_rows import MAX_LONG_BYTES
from service.core.errors import CarryError, DeadlineExceeded, Overloaded
from service.pipeline.turns import Turns

T = TypeVar("T")

LONG_BYTES: Final = 64 * 1024
"""Bodies of this length or more wait for their turn."""

AT_ONCE_BYTES: Final = MAX_LONG_BYTES
"""Longest body that is decoded on the event loop, whose thread alone may use the parser of rows."""

MAX_WAITING_BYTES: Final = 128 * 2**20
"""Maximum bytes of all waiting bodies, unless eight of the longest are more."""


class LongBodies:
    """The long bodies of a worker that wait to be decoded; use from one event loop.

    Args:
        max_body_bytes: length of the longest body.
    """

    def __init__(self, max_body_bytes: int):
        self._max_waiting_bytes = max(MAX_WAITING_BYTES, 8 * max_body_bytes)
        self._waiting_bytes = 0
        self._turns = Turns(at_once=1)
        self._thread = asyncio.Lock()

    async def read(self, size: int, deadline_s: float, decode: Callable[[], T]) -> T:
        """The result of `decode`, when it is this body's turn; at once for a short body.

        Args:
            size: the bytes of the body.
            deadline_s: when its client stops waiting, on the monotonic clock.

        Raises:
            Overloaded, DeadlineExceeded
        """
        if size < LONG_BYTES:
            return decode()
        if size > AT_ONCE_BYTES:
            return await self.run_in_thread(size, deadline_s, decode)
        await self._wait(size, deadline_s, self._turn)
        return _decode_uncollected(decode)

    async def run_in_thread(self, size: int, deadline_s: float, work: Callable[[], T]) -> T:
        """The result of long work on a body in a thread, one body at a time; raises as `read`."""
        await self._wait(size, deadline_s, self._thread.acquire)
        try:
            return await asyncio.to_thread(work)
        finally:
            self._thread.release()

    async def _turn(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._turns.request(turn)
        await turn

    async def _wait(
        self, size: int, deadline_s: float, turn: Callable[[], Awaitable[object]]
    ) -> None:
        if self._waiting_bytes and self._waiting_bytes + size > self._max_waiting_bytes:
            raise Overloaded(
                f"{self._waiting_bytes} bytes of long bodies wait to be decoded, of at most "
                f"{self._max_waiting_bytes}",
                retry_after_s=1,
            )
        self._waiting_bytes += size
        try:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            async with asyncio.timeout(left_s):
                await turn()
        except TimeoutError as error:
            raise DeadlineExceeded(
                "the deadline expired before the long body was decoded"
            ) from error
        finally:
            self._waiting_bytes -= size


def _decode_uncollected(decode: Callable[[], T]) -> T:
    """The result of `decode`, without garbage collections: they would traverse the objects of the
    body, which live until it is decoded, again and again, and take as long as the decoding."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        return decode()
    except CarryError as error:
        # frees the objects before the next collection
        detach_error(error)
        raise
    finally:
        if is_enabled:
            gc.enable()
