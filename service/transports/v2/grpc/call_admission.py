"""Admission of calls: slots for those with a key, and others for probes, health and reflection.

The latter need no key. They have slots and room for messages of their own, so that neither kind of
call keeps out the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from service.core.errors import Overloaded
from service.server.errors import RequestTimeout
from service.transports.v2.grpc.message_admission import Receivers

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


class CallAdmission:
    """Admits the calls of one server.

    Args:
        max_calls: most concurrent calls with a key.
    """

    def __init__(self, max_calls: int):
        self._calls = _Slots(max_calls)
        self._probes = _Slots(MAX_PROBES)
        self._streams = _Slots(MAX_STREAMS)
        self._receivers = Receivers(RECEIVE_S)

    def admit(self, context: Any) -> None:
        """Admit a call with a key.

        Raises:
            Overloaded: there are too many.
        """
        self._calls.acquire(context)

    async def receive_probe(self, context: Any) -> bytes:
        """Admit a call that needs no key and has one message, and receive that.

        Raises:
            Overloaded: there are too many.
            Overloaded, RequestTimeout, MalformedBody: as `receive_public`.
        """
        self._probes.acquire(context)
        return await self.receive_public(context.read)

    @asynccontextmanager
    async def public_stream(self, context: Any, *, has_key: bool) -> AsyncIterator[None]:
        """Admit a stream that needs no key; with one it counts as other calls with a key.

        Raises:
            Overloaded: there are too many.
            RequestTimeout: it has no key, and lasted as long as it may.
        """
        (self._calls if has_key else self._streams).acquire(context)
        try:
            async with asyncio.timeout(None if has_key else STREAM_S):
                # the library would send it twice if the first reply was cancelled
                await context.send_initial_metadata(())
                yield
        except TimeoutError as error:
            raise RequestTimeout(f"a stream without a key may last {STREAM_S:g} s") from error

    async def receive_public(self, read: Callable[[], Awaitable[object]]) -> bytes:
        """Receive a message of a call that needs no key.

        Raises:
            Overloaded, RequestTimeout, MalformedBody: as `Receivers.receive`.
        """
        if len(self._receivers) == MAX_RECEIVING:
            self._receivers.end_oldest(asyncio.get_running_loop().time())
        return await self._receivers.receive(read)


class _Slots:
    """Bounds concurrent calls. Each counts until its reply is sent."""

    def __init__(self, limit: int):
        self._limit = self._free = limit

    def acquire(self, context: Any) -> None:
        if self._free == 0:
            detail = f"expected at most {self._limit} concurrent calls, got one more"
            raise Overloaded(detail, retry_after_s=1)
        self._free -= 1
        context.add_done_callback(self._release)

    def _release(self, context: Any) -> None:
        self._free += 1
