"""One ModelStreamInfer call: requests of many sequences, answered in the order of the requests.

Requests of different sequences run at the same time, up to a window, beyond which no further
request is read. Those of one sequence run one after the other. After one that failed, a request
without a position would be applied in its place; so such requests of that sequence are rejected
(`previous_failed`) until one with a position, or one that starts the sequence, has been applied.
An error is a response with `error_message`, and the call continues.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Final

from service.core.errors import CarryError, PreviousFailed, ShuttingDown
from service.transports.failed_streams import FailedStreams
from service.transports.http.media import Media, dumps
from service.transports.http.problems import problem
from service.transports.kserve.grpc import v2_pb2 as pb
from service.transports.kserve.grpc.errors import status_details
from service.transports.kserve.grpc.incoming import InferMessage
from service.transports.kserve.grpc.message_admission import MessageAdmission
from service.transports.kserve.grpc.messages import decode_parameters, encode_reply
from service.transports.kserve.parameters import parse_parameters
from service.transports.kserve.values import InferReply

WINDOW: Final = 64
"""Maximum unanswered requests of one call."""

WINDOW_BYTES: Final = 1024 * 1024
"""No further request of a call is read while those that are not yet applied have as many bytes."""

Requests = AsyncIterator[bytes]
Responses = AsyncIterator[pb.ModelStreamInferResponse]
_Task = asyncio.Task[pb.ModelStreamInferResponse]

Infer = Callable[[InferMessage], Awaitable[InferReply]]
Answer = Callable[[str, Callable[[], Awaitable[InferReply]]], Awaitable[InferReply | CarryError]]
"""Runs the work of one request of a model, and returns its reply, or its error, logged and
counted."""


class InferStream:
    """The requests of one call.

    Args:
        infer: answers one request.
        answer: as above.
        messages: counts the requests.
        stopping: set when the service stops: what was read is answered, and no more is read.
    """

    def __init__(
        self, infer: Infer, answer: Answer, messages: MessageAdmission, stopping: asyncio.Event
    ):
        self._infer = infer
        self._answer = answer
        self._messages = messages
        self._stopping = stopping
        self._last: dict[str, _Task] = {}
        self._failed = FailedStreams()
        self._held_bytes = 0
        self._has_room = asyncio.Event()

    async def responses(self, requests: Requests) -> Responses:
        """The response to each request, in their order.

        Raises:
            ShuttingDown: the service stops.
        """
        unanswered: asyncio.Queue[_Task | None] = asyncio.Queue()
        window = asyncio.Semaphore(WINDOW)
        tasks: set[_Task] = set()

        def forget(size: int, task: _Task) -> None:
            tasks.discard(task)
            self._messages.count(size, 0)
            self._held_bytes -= size
            self._has_room.set()

        async def receive() -> None:
            incoming = aiter(requests)
            try:
                while True:
                    # a request that was read is always answered, so there is room for it before
                    await window.acquire()
                    while self._held_bytes >= WINDOW_BYTES:
                        self._has_room.clear()
                        await self._has_room.wait()
                    await self._messages.wait_for_room()
                    data = await anext(incoming)
                    size = len(data)
                    self._held_bytes += size
                    self._messages.count(0, size)
                    task = self._start(data)
                    # waiting for the next one must not keep it in memory
                    del data
                    tasks.add(task)
                    task.add_done_callback(partial(forget, size))
                    unanswered.put_nowait(task)
            except StopAsyncIteration:
                pass
            finally:
                unanswered.put_nowait(None)

        receiving = asyncio.create_task(receive())
        stop = asyncio.create_task(self._stopping.wait())
        stop.add_done_callback(lambda _: receiving.cancel())
        try:
            while (task := await unanswered.get()) is not None:
                yield await task
                window.release()
        finally:
            for each in (receiving, stop, *tasks):
                each.cancel()
        if self._stopping.is_set():
            raise ShuttingDown("the service is stopping and reads no more requests")

    def _start(self, data: bytes) -> _Task:
        """Start a request, after the one before it in its sequence."""
        try:
            message = InferMessage(data)
        except CarryError as error:
            return asyncio.create_task(self._reject(error))
        sequence = message.sequence()
        if sequence is None:
            return asyncio.create_task(self._respond(message, None, None))
        task = asyncio.create_task(self._respond(message, sequence, self._last.get(sequence)))
        self._last[sequence] = task
        task.add_done_callback(lambda task: self._forget(sequence, task))
        return task

    async def _reject(self, error: CarryError) -> pb.ModelStreamInferResponse:
        """The response to a message that cannot be parsed."""

        async def fail() -> InferReply:
            raise error

        await self._answer("", fail)
        return _error_response(error, pb.ModelInferRequest())

    def _forget(self, sequence: str, task: _Task) -> None:
        if self._last.get(sequence) is task:
            del self._last[sequence]

    async def _respond(
        self, message: InferMessage, sequence: str | None, previous: _Task | None
    ) -> pb.ModelStreamInferResponse:
        if previous is not None:
            await asyncio.wait([previous])
        head = message.head
        result = await self._answer(head.model_name, lambda: self._apply(message, sequence))
        if not isinstance(result, CarryError):
            return pb.ModelStreamInferResponse(infer_response=encode_reply(result))
        if sequence is not None and not _is_dry_run(head):
            self._failed.add(sequence)
        return _error_response(result, head)

    async def _apply(self, message: InferMessage, sequence: str | None) -> InferReply:
        parameters = parse_parameters(decode_parameters(message.head))
        appends = parameters.position is None and not parameters.starts_over
        if appends and sequence is not None and sequence in self._failed:
            raise PreviousFailed(
                "expected a request with a position, or one that starts the sequence, since an "
                "earlier one of this sequence failed on this call",
                stream=parameters.stream,
            )
        reply = await self._infer(message)
        if sequence is not None and not parameters.dry_run:
            self._failed.discard(sequence)
        return reply


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
