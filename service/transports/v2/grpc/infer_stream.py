"""The requests of one `ModelStreamInfer` call, answered in their order.

Requests of different sequences run at the same time, those of one sequence one after the other:
`stream_order` has their order. An error is a response with `error_message`, and the call continues.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

from service.core.errors import CarryError
from service.transports.common.stream_order import StreamOrder
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.admission import MessageRoom
from service.transports.v2.grpc.messages import InferMessage, error_response

WINDOW_BYTES: Final = 1024 * 1024
"""No further request of a call is read while those that are not yet applied have as many bytes."""

Answer = Callable[
    [InferMessage, CarryError | None], Awaitable[pb.ModelStreamInferResponse | CarryError]
]
"""Returns the response to a request, or its error, logged and counted; a request with an error is
rejected with it."""


class InferStream:
    """The requests of one call.

    Args:
        context: the call, which receives requests and sends responses.
        answer: as above.
        messages: counts the requests.
        window: maximum unanswered requests.
    """

    def __init__(self, context: Any, answer: Answer, messages: MessageRoom, window: int):
        self._context = context
        self._answer = answer
        self._messages = messages
        self._window = window
        self._error: CarryError | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._order: StreamOrder[InferMessage] = StreamOrder(
            self._begin, self._begin, self._release, overlaps=False
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._unanswered: deque[InferMessage] = deque()
        self._held_bytes = 0
        self._has_room = asyncio.Event()
        self._progress = asyncio.Event()

    def end(self, error: CarryError) -> None:
        """Read no more requests, and end with this error once those that were read are answered."""
        self._error = error
        if self._receiving is not None:
            self._receiving.cancel()

    async def run(self) -> None:
        """Answer the requests, in their order.

        Raises:
            CarryError: the one that `end` was called with.
        """
        self._receiving = receiving = asyncio.create_task(self._receive())
        receiving.add_done_callback(lambda _: self._progress.set())
        unanswered = self._unanswered
        try:
            while unanswered or not receiving.done():
                if unanswered and (response := unanswered[0].outcome) is not None:
                    await self._context.write(response)
                    unanswered.popleft()
                    self._has_room.set()
                else:
                    self._progress.clear()
                    await self._progress.wait()
        finally:
            for each in (receiving, *self._tasks):
                each.cancel()
            self._order.clear()
            self._messages.count(self._held_bytes, 0)
        if self._error is not None:
            raise self._error

    async def _receive(self) -> None:
        while True:
            # a request that was read is always answered, so there is room for it before
            while len(self._unanswered) >= self._window or self._held_bytes >= WINDOW_BYTES:
                self._has_room.clear()
                await self._has_room.wait()
            await self._messages.wait_for_room()
            data = await self._context.read()
            if not isinstance(data, bytes):
                return
            self._add(InferMessage(data))

    def _add(self, message: InferMessage) -> None:
        """Start a request as soon as it is its turn."""
        self._unanswered.append(message)
        self._count(message.size)
        if message.stream:
            self._order.add(message)
            self._order.set_ready(message)
        else:
            self._begin(message)

    def _begin(self, message: InferMessage, error: CarryError | None = None) -> None:
        task = asyncio.create_task(self._respond(message, error))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _respond(self, message: InferMessage, error: CarryError | None) -> None:
        response = result = await self._answer(message, error)
        if isinstance(response, CarryError):
            response = error_response(response, message.head)
        message.drop()
        self._count(-message.size)
        if not message.stream:
            message.outcome = response
            self._release(message)
            return
        if not message.is_dry_run:
            self._order.record_result(message, failed=isinstance(result, CarryError))
        self._order.answer(message, response)

    def _release(self, message: InferMessage) -> None:
        self._progress.set()

    def _count(self, change: int) -> None:
        """Count bytes that are not yet applied."""
        self._messages.count(self._held_bytes, self._held_bytes + change)
        self._held_bytes += change
        self._has_room.set()
