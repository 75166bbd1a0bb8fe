"""Admission of messages: bounds the bytes that the calls of one worker buffer.

The library receives a message as a whole and does not say how much of it has arrived. So a message
that is being received counts as the largest, and once it is complete as its length, until its call
is answered. Without room for the largest, no further message is received: its call waits, with at
most HTTP/2's first window in memory. Calls that receive slowly do not make others wait: they are
ended, the oldest first.

The messages of a stream count once they are complete, since a stream may pause for ever between
two of them. So each stream may exceed the limit by the one message that it is receiving.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from service.core.errors import MalformedBody, Overloaded
from service.server.errors import RequestTimeout

SLOW_S: Final = 0.05
"""A call that finds no room ends the oldest call that has been receiving for longer than this, and
a further one each time that it has waited this long. Most messages arrive with their call, within
milliseconds."""

WAIT_S: Final = 2.0
"""A call that has waited this long for room is rejected."""


class Receivers:
    """Receives messages of calls, each in limited time; the oldest call can be ended earlier.

    Args:
        timeout_s: longest time in which a message may arrive.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._receiving: dict[asyncio.Timeout, float] = {}

    def __len__(self) -> int:
        """The number of calls that are receiving."""
        return len(self._receiving)

    async def receive(self, read: Callable[[], Awaitable[object]]) -> bytes:
        """Receive the message of a call that has one.

        Args:
            read: returns the bytes of the message; something else if the call has none.

        Raises:
            Overloaded: `end_oldest` ended it.
            RequestTimeout: the message did not arrive in time.
            MalformedBody: the call has no message.
        """
        scope = asyncio.timeout(self._timeout_s)
        try:
            async with scope:
                self._receiving[scope] = asyncio.get_running_loop().time()
                message = await read()
        except TimeoutError as error:
            if scope in self._receiving:
                raise RequestTimeout("the message of the call did not arrive in time") from error
            detail = "the message arrived slowly, and other calls need the memory"
            raise Overloaded(detail, retry_after_s=1) from error
        finally:
            self._receiving.pop(scope, None)
        if not isinstance(message, bytes):
            raise MalformedBody("message: expected one, got none", at="message", got="none")
        return message

    def end_oldest(self, since_s: float) -> None:
        """End the oldest call if it has been receiving since this time."""
        oldest = next(iter(self._receiving.items()), None)
        if oldest is not None and oldest[1] <= since_s:
            scope = oldest[0]
            del self._receiving[scope]
            if not scope.expired():
                scope.reschedule(since_s)


class MessageAdmission:
    """Counts messages, and admits those that there is room for.

    Args:
        limit_bytes: most bytes of all messages together.
        message_bytes: length of the largest message.
        timeout_s: longest time in which the message of a call may arrive.
    """

    def __init__(self, limit_bytes: int, message_bytes: int, timeout_s: float):
        self._limit_bytes = max(limit_bytes, message_bytes)
        self._message_bytes = message_bytes
        self._used_bytes = 0
        self._receivers = Receivers(timeout_s)
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @asynccontextmanager
    async def receive(self, read: Callable[[], Awaitable[object]]) -> AsyncIterator[list[bytes]]:
        """Receive the message of a call that has one; it counts during the context.

        Args:
            read: returns the bytes of the message; something else if the call has none.

        Returns:
            A list of the message, so that the caller can take it out and drop it.

        Raises:
            Overloaded: there is no room, or it arrives slowly and others need the room.
            RequestTimeout: it did not arrive in time.
            MalformedBody: the call has no message.
        """
        counted = self._message_bytes
        await self._acquire(counted)
        try:
            message = await self._receivers.receive(read)
            self.count(counted, len(message))
            counted = len(message)
            messages = [message]
            del message
            yield messages
        finally:
            self.count(counted, 0)

    async def wait_for_room(self) -> None:
        """Wait until a stream may receive its next message."""
        if self._waiting or not self._has_room():
            await self._enqueue(0)

    def count(self, before: int, after: int) -> None:
        """Count `after` bytes instead of `before`."""
        self._used_bytes += after - before
        while self._waiting and self._has_room():
            future, size = self._waiting.popleft()
            if not future.done():
                self._used_bytes += size
                future.set_result(None)

    def _has_room(self) -> bool:
        return self._used_bytes + self._message_bytes <= self._limit_bytes

    async def _acquire(self, size: int) -> None:
        if not self._waiting and self._has_room():
            self._used_bytes += size
            return
        loop = asyncio.get_running_loop()
        until_s = loop.time() + WAIT_S
        acquired = asyncio.ensure_future(self._enqueue(size))
        try:
            while not acquired.done():
                if loop.time() >= until_s:
                    raise Overloaded(
                        f"{self._used_bytes} bytes of messages are buffered, "
                        f"of at most {self._limit_bytes}",
                        retry_after_s=1,
                    )
                self._receivers.end_oldest(loop.time() - SLOW_S)
                await asyncio.wait({acquired}, timeout=SLOW_S)
        except BaseException:
            if not acquired.cancel():
                # it got the room in the same moment
                self.count(size, 0)
            raise

    async def _enqueue(self, size: int) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((future, size))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.count(size, 0)
            raise
