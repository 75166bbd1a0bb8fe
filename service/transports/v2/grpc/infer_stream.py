"""The requests of one `ModelStreamInfer` call, answered in their order.

Requests of different sequences run at the same time, those of one sequence one after the other:
`stream_order` has their order. An error is a response with `error_message`, and the call continues.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from service.core.errors import CarryError
from service.transports.common.stream_order import StreamOrder
from service.transports.v2.grpc.admission import MessageRoom
from service.transports.v2.grpc.call import Call, Handler
from service.transports.v2.grpc.messages import InferMessage
from service.transports.v2.grpc.replies import error_response

WINDOW_BYTES: Final = 1024 * 1024
"""No further request of a call is read while so many bytes of requests are not yet applied."""

OnResponse = Callable[[bytes | CarryError], None]
Answer = Callable[[InferMessage, CarryError | None, OnResponse], Callable[[], object]]
"""Answers a request, or rejects it with the given error. Calls back with the response, or with the
error once that is logged and counted; at once if the request is rejected early. Returns a function
that cancels the request."""


class InferStream(Handler):
    """The requests of one call.

    Args:
        call: sends the responses.
        answer: answers one request.
        room: counts the requests.
        window: maximum unanswered requests.
        on_end: called when no more requests will be answered.
    """

    def __init__(
        self,
        call: Call,
        answer: Answer,
        room: MessageRoom,
        window: int,
        on_end: Callable[[InferStream], None],
    ):
        self._call = call
        self._answer = answer
        self._room = room
        self._window = window
        self._on_end = on_end
        self._order: StreamOrder[InferMessage] = StreamOrder(
            self._begin, self._begin, self._release, overlaps=False
        )
        self._unanswered: deque[InferMessage] = deque()
        self._running: dict[InferMessage, Callable[[], object]] = {}
        self._held_bytes = 0
        self._is_full = False
        self._has_all = False
        self._has_ended = False
        self._error: CarryError | None = None

    def receive(self, message: bytes) -> None:
        """Start a request as soon as it is its turn."""
        request = InferMessage(message)
        self._unanswered.append(request)
        self._count(request.size)
        if request.stream:
            self._order.add(request)
            self._order.set_ready(request)
        else:
            self._begin(request)
        if len(self._unanswered) >= self._window or not self._has_room:
            self._is_full = True
            self._call.stop_reading()
            if self._room.is_full:
                self._room.notify(self._read_on)

    @property
    def _has_room(self) -> bool:
        within = len(self._unanswered) < self._window and self._held_bytes < WINDOW_BYTES
        return within and not self._room.is_full

    def receive_end(self) -> None:
        """The client has sent all: the call ends once all is answered."""
        self._has_all = True
        self._respond()

    def fail(self, error: CarryError) -> None:
        """Read no more requests, and end with this error once those that were read are answered."""
        if self._error is None and not self._has_ended:
            self._error = error
            self._call.stop_reading()
            self._respond()

    def reject(self, error: bytes | CarryError) -> None:
        """End the call, before any request, with this error."""
        if isinstance(error, CarryError):
            self.fail(error)

    def cancel(self) -> None:
        """Drop the requests that are not in a batch."""
        self._has_ended = True
        self._order.clear()
        for cancel in list(self._running.values()):
            cancel()
        self._running.clear()
        self._count(-self._held_bytes)
        self._on_end(self)

    def resume(self) -> None:
        """Send the responses that could not be written before."""
        self._respond()

    def _begin(self, message: InferMessage, error: CarryError | None = None) -> None:
        def answered(response: bytes | CarryError) -> None:
            if not self._has_ended:
                self._running.pop(message, None)
                self._finish(message, response)

        cancel = self._answer(message, error, answered)
        if message.outcome is None:
            self._running[message] = cancel

    def _finish(self, message: InferMessage, result: bytes | CarryError) -> None:
        is_failed = isinstance(result, CarryError)
        response = (
            error_response(result, message).SerializeToString()
            if isinstance(result, CarryError)
            else result
        )
        message.drop()
        self._count(-message.size)
        if not message.stream:
            message.outcome = response
            self._release(message)
            return
        if not message.is_dry_run:
            self._order.record_result(message, failed=is_failed)
        self._order.answer(message, response)

    def _release(self, message: InferMessage) -> None:
        self._respond()

    def _respond(self) -> None:
        """Send the responses whose turn it is, then read on, or end the call after the last."""
        unanswered, call = self._unanswered, self._call
        while unanswered and unanswered[0].outcome is not None:
            if not call.can_write:
                # responses are not counted: there are those of the requests that were read
                self._is_full = True
                call.stop_reading()
                return
            call.respond(unanswered.popleft().outcome)
        if unanswered or self._has_ended:
            self._read_on()
        elif self._error is not None:
            self._end(self._error)
        elif self._has_all:
            self._end(None)
        else:
            self._read_on()

    def _end(self, error: CarryError | None) -> None:
        self._has_ended = True
        if error is None:
            self._call.end()
        else:
            self._call.fail(error)
        self._on_end(self)

    def _read_on(self) -> None:
        if self._is_full and not self._has_ended and self._error is None and self._has_room:
            self._is_full = False
            self._call.start_reading()

    def _count(self, change: int) -> None:
        """Count bytes that are not yet applied."""
        self._held_bytes += change
        self._room.count(change)
