"""Admits calls and their messages: bounds how many there are, and the bytes that they buffer.

Calls with a key have slots and room for messages of their own, and so have those that need none:
probes, health and reflection. So neither kind blocks the other. A further call that needs no key
resets the oldest one of the connection with the most, since a probe usually takes milliseconds, and
those who watch the health of the service should not lose it to a client with many calls.

An incomplete message counts as what has arrived of it, a complete one as its length until it is
applied. Beyond the limit the calls whose messages are incomplete are ended, the oldest first, as
over HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
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
    from service.server.http2_protocol import Http2Connection
    from service.transports.v2.grpc.call import Call

MAX_PUBLIC: Final = 1000
"""Most concurrent calls to probes, health and reflection."""

PUBLIC_BYTES: Final = 64 * LONG_BYTES
"""Most bytes of all their messages together."""

PUBLIC_RECEIVE_S: Final = 5.0
"""Longest time until such a message has arrived."""


class Admission:
    """Admits the calls of one server.

    Attributes:
        calls: slots of calls with a key.
        messages: room for their messages.
        public, public_messages: the same of calls that need no key.
    """

    def __init__(self, settings: V2Settings, connections: ConnectionSettings):
        max_bytes = settings.grpc_max_message_bytes
        receive_s = connections.body_timeout_s + max_bytes / BODY_BYTES_PER_S
        max_pending_bytes = max(connections.max_pending_body_bytes, max_bytes)
        self.calls = Slots(settings.grpc_max_calls)
        self.messages = MessageRoom(max_pending_bytes, receive_s)
        self.public = Slots(MAX_PUBLIC, ends_oldest=True)
        self.public_messages = MessageRoom(PUBLIC_BYTES, PUBLIC_RECEIVE_S)


class Slots:
    """Bounds concurrent calls. Each counts until its reply is sent.

    Args:
        ends_oldest: whether a further call resets the oldest one of the connection that has the
            most, and is not rejected.
    """

    def __init__(self, limit: int, *, ends_oldest: bool = False):
        self._limit = limit
        self._ends_oldest = ends_oldest
        self._count = 0
        self._calls: dict[Http2Connection, dict[Call, None]] = {}

    def acquire(self, call: Call) -> None:
        """Take a slot until the call ends.

        Raises:
            Overloaded: there are too many.
        """
        if self._count >= self._limit:
            if not self._ends_oldest:
                detail = f"expected at most {self._limit} concurrent calls, got one more"
                raise Overloaded(detail, retry_after_s=1)
            calls = max(self._calls.values(), key=len)
            oldest = next(iter(calls))
            oldest.cancel()
            oldest.reset(ErrorCode.ENHANCE_YOUR_CALM)
        self._count += 1
        self._calls.setdefault(call.connection, {})[call] = None
        call.on_release.append(partial(self._release, call))

    def _release(self, call: Call) -> None:
        self._count -= 1
        calls = self._calls[call.connection]
        del calls[call]
        if not calls:
            del self._calls[call.connection]


class MessageRoom:
    """Bounds the bytes of messages, and the time in which they arrive.

    Args:
        limit_bytes: most bytes of all messages together.
        timeout_s: longest time in which a message may arrive.
    """

    def __init__(self, limit_bytes: int, timeout_s: float):
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
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
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s, self._expire, loop)

    def end(self, call: Call) -> None:
        """Note that a call receives no message: it is complete, or the call has ended."""
        self._receiving.pop(call, None)

    def count(self, change: int) -> None:
        """Count bytes that are held, or no longer held if the change is negative."""
        self._used_bytes += change
        if change > 0:
            detail = "the message arrived slowly, and other calls need the memory"
            while self._used_bytes > self._limit_bytes and self._receiving:
                self._fail(next(iter(self._receiving)), Overloaded(detail, retry_after_s=1))
        elif self._waiting and not self._is_notifying:
            # a call that releases its bytes at once would notify the next one recursively
            self._is_notifying = True
            try:
                while self._waiting and not self.is_full:
                    self._waiting.popleft()()
            finally:
                self._is_notifying = False

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
