"""The requests of one `ModelStreamInfer` call, answered in their order.

Requests of different sequences run at the same time, those of one sequence one after the other:
`stream_order` has their order. An error is a response with `error_message`, and the call continues.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Final

from service.codec.media import Media, dumps
from service.core.errors import CarryError, ShuttingDown
from service.transports.common.stream_order import PendingChunk, StreamOrder
from service.transports.v1.problems import problem
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.errors import status_details
from service.transports.v2.grpc.incoming import InferMessage
from service.transports.v2.grpc.message_admission import MessageAdmission
from service.transports.v2.grpc.messages import decode_parameters
from service.transports.v2.parameters import parse_parameters

WINDOW_BYTES: Final = 1024 * 1024
"""No further request of a call is read while those that are not yet applied have as many bytes."""

Requests = AsyncIterator[bytes]
Responses = AsyncIterator[pb.ModelStreamInferResponse]

_Response = asyncio.Future[pb.ModelStreamInferResponse]

Infer = Callable[[InferMessage], Awaitable[pb.ModelInferResponse]]
Answer = Callable[
    [str, Callable[[], Awaitable[pb.ModelInferResponse]]],
    Awaitable[pb.ModelInferResponse | CarryError],
]
"""Runs the work of one request of a model, and returns its reply, or its error, logged and
counted."""


class _Request(PendingChunk):
    """A request that has not been answered.

    Attributes:
        message: None if it cannot be parsed, and once it was applied.
        response: resolved once the response may be sent.
    """

    __slots__ = ("message", "response")

    outcome: pb.ModelStreamInferResponse | None

    def __init__(self, message: InferMessage | None, sequence: str | None, response: _Response):
        super().__init__(sequence or "")
        self.message = message
        self.response = response


class InferStream:
    """The requests of one call.

    Args:
        infer: answers one request.
        answer: as above.
        messages: counts the requests.
        window: maximum unanswered requests.
        stopping: set when the service stops: what was read is answered, and no more is read.
    """

    def __init__(
        self,
        infer: Infer,
        answer: Answer,
        messages: MessageAdmission,
        window: int,
        stopping: asyncio.Event,
    ):
        self._infer = infer
        self._answer = answer
        self._messages = messages
        self._window = asyncio.Semaphore(window)
        self._stopping = stopping
        self._error: CarryError | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._order: StreamOrder[_Request] = StreamOrder(
            self._begin, self._reject, self._release, overlaps=False
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._held_bytes = 0
        self._has_room = asyncio.Event()
        self._responses: asyncio.Queue[_Response | None] = asyncio.Queue()

    def end(self, error: CarryError) -> None:
        """Read no more requests, and end with this error once those that were read are answered."""
        self._error = error
        if self._receiving is not None:
            self._receiving.cancel()

    async def responses(self, requests: Requests) -> Responses:
        """The response to each request, in their order.

        Raises:
            ShuttingDown: the service stops.
            CarryError: the one that `end` was called with.
        """
        self._receiving = receiving = asyncio.create_task(self._receive(aiter(requests)))
        stop = asyncio.create_task(self._stopping.wait())
        stop.add_done_callback(lambda _: receiving.cancel())
        try:
            while (response := await self._responses.get()) is not None:
                yield await response
                self._window.release()
        finally:
            for each in (receiving, stop, *self._tasks):
                each.cancel()
            self._order.clear()
            self._messages.count(self._held_bytes, 0)
        if self._error is not None:
            raise self._error
        if self._stopping.is_set():
            raise ShuttingDown("the service is stopping and reads no more requests")

    async def _receive(self, requests: Requests) -> None:
        try:
            while True:
                # a request that was read is always answered, so there is room for it before
                await self._window.acquire()
                while self._held_bytes >= WINDOW_BYTES:
                    self._has_room.clear()
                    await self._has_room.wait()
                await self._messages.wait_for_room()
                self._add(await anext(requests))
        except StopAsyncIteration:
            pass
        finally:
            self._responses.put_nowait(None)

    def _add(self, data: bytes) -> None:
        """Start a request as soon as it is its turn."""
        response: _Response = asyncio.get_running_loop().create_future()
        self._responses.put_nowait(response)
        try:
            message = InferMessage(data)
        except CarryError as error:
            self._reject(_Request(None, None, response), error)
            return
        self._count(message.size)
        request = _Request(message, message.sequence(), response)
        if not request.stream:
            self._begin(request)
            return
        request.appends = _appends(message.head)
        self._order.add(request)
        self._order.set_ready(request)

    def _begin(self, request: _Request) -> None:
        self._run(self._respond(request, None))

    def _reject(self, request: _Request, error: CarryError) -> None:
        self._run(self._respond(request, error))

    async def _respond(self, request: _Request, error: CarryError | None) -> None:
        message = request.message
        head = pb.ModelInferRequest() if message is None else message.head

        async def work() -> pb.ModelInferResponse:
            if error is not None or message is None:
                raise error or RuntimeError("a request without a message cannot start")
            return await self._infer(message)

        result = await self._answer(head.model_name, work)
        failed = isinstance(result, CarryError)
        if request.stream and not _is_dry_run(head):
            self._order.record_result(request, failed=failed)
        if isinstance(result, CarryError):
            response = _error_response(result, head)
        else:
            response = pb.ModelStreamInferResponse(infer_response=result)
        if message is not None:
            self._count(-message.size)
            request.message = None
        if request.stream:
            self._order.answer(request, response)
        else:
            request.response.set_result(response)

    def _release(self, request: _Request) -> None:
        if request.outcome is not None:
            request.response.set_result(request.outcome)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _count(self, change: int) -> None:
        """Count bytes that are not yet applied."""
        self._messages.count(self._held_bytes, self._held_bytes + change)
        self._held_bytes += change
        self._has_room.set()


def _appends(request: pb.ModelInferRequest) -> bool:
    """Whether a request could take the place of one that failed."""
    try:
        parameters = parse_parameters(decode_parameters(request))
    except CarryError:
        return True
    return parameters.position is None and not parameters.starts_over


def _is_dry_run(request: pb.ModelInferRequest) -> bool:
    return "dry_run" in request.parameters and request.parameters["dry_run"].bool_param


def _error_response(
    error: CarryError, request: pb.ModelInferRequest
) -> pb.ModelStreamInferResponse:
    response = pb.ModelInferResponse(
        model_name=request.model_name, model_version=request.model_version, id=request.id
    )
    response.parameters["carry_error"].string_param = error.code
    document = dumps(Media.JSON, problem(error))
    response.parameters["carry_problem"].string_param = document.decode()
    return pb.ModelStreamInferResponse(error_message=status_details(error), infer_response=response)
