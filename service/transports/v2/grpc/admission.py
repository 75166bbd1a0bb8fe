"""Admission of calls and of their messages: bounds how many there are, and the bytes they buffer.

Calls with a key have slots and room for messages of their own, and so have those that need none:
probes, health and reflection. So neither kind keeps out the other.

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
from typing import Any, Final

from service.core.errors import MalformedBody, Overloaded
from service.server.connections import BODY_BYTES_PER_S
from service.server.errors import RequestTimeout
from service.server.settings import ConnectionSettings
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.v2.settings import V2Settings

SLOW_S: Final = 0.05
"""A call that finds no room ends the oldest call that has been receiving for longer than this, and
a further one each time that it has waited this long. Most messages arrive with their call, within
milliseconds."""

WAIT_S: Final = 2.0
"""A call that has waited this long for room is rejected."""

MAX_RECEIVING: Final = 64
"""Most calls to probes, health and reflection that receive a message at once. A further call ends
the oldest one: a message that is sent with its call is received within milliseconds."""

RECEIVE_S: Final = 5.0
"""Longest time until such a message has arrived."""

MAX_PROBES: Final = 1000
"""Most probes whose reply is not sent yet: a client may delay it by flow control."""

MAX_STREAMS: Final = 64
"""Most streams of health and reflection without a key."""

STREAM_S: Final = 300.0
"""Longest duration of such a stream; a client that watches the health then opens another one."""


class Admission:
    """Admits the calls of one server.

    Attributes:
        calls: slots of calls with a key.
        messages: room for their messages.
    """

    def __init__(self, settings: V2Settings, connections: ConnectionSettings):
        self.calls = Slots(settings.grpc_max_calls)
        self._probes = Slots(MAX_PROBES)
        self._streams = Slots(MAX_STREAMS)
        max_bytes, max_pending = settings.grpc_max_message_bytes, connections.max_pending_body_bytes
        receive_s = connections.body_timeout_s + max_bytes / BODY_BYTES_PER_S
        self.messages = MessageRoom(max_pending, max_bytes, receive_s)
        self._public = MessageRoom(MAX_RECEIVING * LONG_BYTES, LONG_BYTES, RECEIVE_S, slow_s=0.0)

    async def receive_probe(self, context: Any) -> bytes:
        """Admit a call that needs no key and has one message, and receive that.

        Raises:
            Overloaded: there are too many.
            Overloaded, RequestTimeout, MalformedBody: as `MessageRoom.receive`.
        """
        self._probes.acquire(context)
        return await self.receive_public(context)

    @asynccontextmanager
    async def public_stream(self, context: Any, *, has_key: bool) -> AsyncIterator[None]:
        """Admit a stream that needs no key; with one it counts as other calls with a key.

        Raises:
            Overloaded: there are too many.
            RequestTimeout: it has no key, and lasted as long as it may.
        """
        (self.calls if has_key else self._streams).acquire(context)
        try:
            async with asyncio.timeout(None if has_key else STREAM_S):
                # the library would send it twice if the first reply was cancelled
                await context.send_initial_metadata(())
                yield
        except TimeoutError as error:
            raise RequestTimeout(f"a stream without a key may last {STREAM_S:g} s") from error

    async def receive_public(self, context: Any) -> bytes:
        """Receive a message of a call that needs no key.

        Raises:
            Overloaded, RequestTimeout, MalformedBody: as `MessageRoom.receive`.
        """
        async with self._public.receive(context.read) as [message]:
            return message


class Slots:
    """Bounds concurrent calls. Each counts until its reply is sent."""

    def __init__(self, limit: int):
        self._limit = self._free = limit

    def acquire(self, context: Any) -> None:
        """Take a slot until the call ends.

        Raises:
            Overloaded: there are too many.
        """
        if self._free == 0:
            detail = f"expected at most {self._limit} concurrent calls, got one more"
            raise Overloaded(detail, retry_after_s=1)
        self._free -= 1
        context.add_done_callback(self._release)

    def _release(self, context: Any) -> None:
        self._free += 1


class MessageRoom:
    """Bounds the bytes of messages: receives one only while there is room for it.

    Args:
        limit_bytes: most bytes of all messages together.
        message_bytes: length of the largest message.
        timeout_s: longest time in which the message of a call may arrive.
        slow_s: how long a call may receive while others need its room.
    """

    def __init__(
        self, limit_bytes: int, message_bytes: int, timeout_s: float, slow_s: float = SLOW_S
    ):
        self._limit_bytes = max(limit_bytes, message_bytes)
        self._message_bytes = message_bytes
        self._timeout_s = timeout_s
        self._slow_s = slow_s
        self._used_bytes = 0
        self._receiving: dict[asyncio.Timeout, float] = {}
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
            messages = [await self._receive(read)]
            self.count(counted, len(messages[0]))
            counted = len(messages[0])
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

    def _enqueue(self, size: int) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, size))
        return future

    async def _acquire(self, size: int) -> None:
        if not self._waiting and self._has_room():
            self._used_bytes += size
            return
        loop = asyncio.get_running_loop()
        until_s, acquired = loop.time() + WAIT_S, self._enqueue(size)
        try:
            while not acquired.done():
                if loop.time() >= until_s:
                    raise Overloaded(
                        f"{self._used_bytes} bytes of messages are buffered, "
                        f"of at most {self._limit_bytes}",
                        retry_after_s=1,
                    )
                self._end_oldest(loop.time() - self._slow_s)
                await asyncio.wait({acquired}, timeout=SLOW_S)
        except BaseException:
            if not acquired.cancel():
                # it got the room in the same moment
                self.count(size, 0)
            raise

    async def _receive(self, read: Callable[[], Awaitable[object]]) -> bytes:
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

    def _end_oldest(self, since_s: float) -> None:
        """End the oldest call if it has been receiving since this time."""
        oldest = next(iter(self._receiving.items()), None)
        if oldest is not None and oldest[1] <= since_s:
            scope = oldest[0]
            del self._receiving[scope]
            if not scope.expired():
                scope.reschedule(since_s)
