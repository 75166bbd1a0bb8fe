"""Admits calls and their messages: bounds how many there are, and the bytes that they buffer.

Calls with a key have slots and room for messages of their own, and so have those that need none:
probes, health and reflection. So neither kind blocks the other.

An incomplete message counts as what has arrived of it, a complete one as its length until it is
applied. Beyond the limit the calls whose messages are incomplete are ended, the oldest first, as
over HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from service.core.errors import CarryError, Overloaded
from service.server.connections import BODY_BYTES_PER_S
from service.server.errors import RequestTimeout
from service.server.http2_stream import ErrorCode
from service.server.settings import ConnectionSettings
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.v2.settings import V2Settings

if TYPE_CHECKING:
    from service.transports.v2.grpc.call import Call

MAX_RECEIVING: Final = 64
"""Most calls to probes, health and reflection that receive a message at once. A further call ends
the oldest one: a message that is sent with its call is received within milliseconds."""

RECEIVE_S: Final = 5.0
"""Longest time until such a message has arrived."""

MAX_PROBES: Final = 1000
"""Most probes whose reply is not sent yet: a client may delay it by flow control. A further one
resets the oldest, since a probe usually takes milliseconds."""

MAX_STREAMS: Final = 64
"""Most concurrent `Watch` and reflection calls without a key."""

STREAM_S: Final = 300.0
"""Longest duration of such a call; a client that watches the health then begins another one."""


class Admission:
    """Admits the calls of one server.

    Attributes:
        calls: slots of calls with a key.
        messages: room for their messages.
        probes, streams, public: the same of calls that need no key.
    """

    def __init__(self, settings: V2Settings, connections: ConnectionSettings):
        max_bytes = settings.grpc_max_message_bytes
        receive_s = connections.body_timeout_s + max_bytes / BODY_BYTES_PER_S
        self.calls = Slots(settings.grpc_max_calls)
        self.probes = Slots(MAX_PROBES, ends_oldest=True)
        self.streams = Slots(MAX_STREAMS)
        max_pending_bytes = max(connections.max_pending_body_bytes, max_bytes)
        self.messages = MessageRoom(max_pending_bytes, receive_s)
        self.public = MessageRoom(MAX_RECEIVING * LONG_BYTES, RECEIVE_S, MAX_RECEIVING)

    @asynccontextmanager
    async def public_stream(self, call: Call, *, has_key: bool) -> AsyncIterator[None]:
        """Admit a streaming call that needs no key; with one it counts as other calls with a key.

        Raises:
            Overloaded: there are too many.
            RequestTimeout: it has no key, and lasted as long as it may.
        """
        (self.calls if has_key else self.streams).acquire(call)
        try:
            async with asyncio.timeout(None if has_key else STREAM_S):
                yield
        except TimeoutError as error:
            raise RequestTimeout(f"a stream without a key may last {STREAM_S:g} s") from error


class Slots:
    """Bounds concurrent calls. Each counts until its reply is sent.

    Args:
        ends_oldest: whether a further call resets the oldest one, and is not rejected.
    """

    def __init__(self, limit: int, *, ends_oldest: bool = False):
        self._limit = limit
        self._ends_oldest = ends_oldest
        self._calls: dict[Call, None] = {}

    def acquire(self, call: Call) -> None:
        """Take a slot until the call ends.

        Raises:
            Overloaded: there are too many.
        """
        if len(self._calls) >= self._limit:
            if not self._ends_oldest:
                detail = f"expected at most {self._limit} concurrent calls, got one more"
                raise Overloaded(detail, retry_after_s=1)
            oldest = next(iter(self._calls))
            oldest.cancel()
            oldest.reset(ErrorCode.ENHANCE_YOUR_CALM)
        self._calls[call] = None
        call.on_release.append(partial(self._calls.pop, call))


class MessageRoom:
    """Bounds the bytes of messages, and the time in which they arrive.

    Args:
        limit_bytes: most bytes of all messages together.
        timeout_s: longest time in which a message may arrive.
        max_receiving: most calls that wait for a message or receive one.
    """

    def __init__(self, limit_bytes: int, timeout_s: float, max_receiving: int | None = None):
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._max_receiving = max_receiving
        self._used_bytes = 0
        self._receiving: dict[Call, float] = {}
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_notifying = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_full(self) -> bool:
        """Whether no further message should be received."""
        return self._used_bytes > self._limit_bytes

    def overloaded(self) -> Overloaded:
        """The error of a message for which there is no room."""
        return Overloaded(
            f"{self._used_bytes} bytes of messages are buffered, of at most {self._limit_bytes}",
            retry_after_s=1,
        )

    def notify(self, on_room: Callable[[], None]) -> None:
        """Call this once there is room."""
        self._waiting.append(on_room)

    def begin(self, call: Call) -> None:
        """Note that a call waits for a message or receives one, since now if it has not before."""
        if call in self._receiving:
            return
        loop = call.connection.loop
        self._receiving[call] = loop.time()
        if self._max_receiving is not None and len(self._receiving) > self._max_receiving:
            self._end_oldest()
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s, self._expire, loop)

    def end(self, call: Call) -> None:
        """Note that a call receives no message: it is complete, or the call has ended."""
        self._receiving.pop(call, None)

    def count(self, change: int) -> None:
        """Count bytes that are held, or no longer held if the change is negative."""
        self._used_bytes += change
        if change > 0:
            while self._used_bytes > self._limit_bytes and self._receiving:
                self._end_oldest()
        elif self._waiting and not self._is_notifying:
            # a call that releases its bytes at once would notify the next one recursively
            self._is_notifying = True
            try:
                while self._waiting and not self.is_full:
                    self._waiting.popleft()()
            finally:
                self._is_notifying = False

    def _end_oldest(self) -> None:
        detail = "the message arrived slowly, and other calls need the memory"
        self._fail(next(iter(self._receiving)), Overloaded(detail, retry_after_s=1))

    def _fail(self, call: Call, error: CarryError) -> None:
        del self._receiving[call]
        call.drop_received()
        call.handler.fail(error)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the calls whose message did not arrive in time."""
        self._timer = None
        while self._receiving:
            call, began_s = next(iter(self._receiving.items()))
            if (left_s := began_s + self._timeout_s - loop.time()) > 0:
                self._timer = loop.call_later(left_s, self._expire, loop)
                return
            self._fail(call, RequestTimeout("the message of the call did not arrive in time"))
