"""The methods of V2's `GRPCInferenceService`, and the standard services health and reflection.

Each request of V2 gets an id (the metadata `x-request-id` of a call, or a new one), one line in the
log, and on failure a status with Carry's code (see `messages`). Deadline and cancellation are
gRPC's. Health, for the whole server and for V2's service, and reflection need no key.

All methods are streams of requests for the library, since only those leave it to the handler when a
message is received; clients see no difference.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from operator import methodcaller
from typing import Any, Final, NoReturn, TypeVar

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from structlog.contextvars import bind_contextvars, bound_contextvars

from service.access.caller import Caller
from service.codec.decoding import detach_error
from service.core.errors import CarryError, MalformedBody, ShuttingDown
from service.core.tracing import PROPAGATED
from service.server.errors import DuplicateField
from service.telemetry.access_log import GRPC, RequestFacts, log_request, note_key, request_facts
from service.telemetry.logs import RequestIds, current_request_id
from service.transports.common.failure_log import log_failure, log_unexpected_failure
from service.transports.v1.request_log import is_request_id
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.admission import Admission
from service.transports.v2.grpc.infer_stream import InferStream
from service.transports.v2.grpc.messages import (
    InferMessage,
    encode_reply,
    parse_short,
    status_code,
    status_details,
    trailing_metadata,
)
from service.transports.v2.inference import Inference, InferReply
from service.transports.v2.metadata import Document, Metadata, Statistics

SERVICE: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
SERVICES: Final = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
REQUEST_ID: Final = "x-request-id"
AUTHORIZATION: Final = "authorization"
Describe = Callable[..., Awaitable[Document]]
OPEN: Final = ("ServerLive", "ServerReady")
"""Methods that need no key."""

DESCRIPTIONS: Final[Mapping[str, tuple[type[Message], type[Message], Describe]]] = {
    "ServerLive": (pb.ServerLiveRequest, pb.ServerLiveResponse, Metadata.live),
    "ServerReady": (pb.ServerReadyRequest, pb.ServerReadyResponse, Metadata.ready),
    "ServerMetadata": (pb.ServerMetadataRequest, pb.ServerMetadataResponse, Metadata.server),
    "ModelReady": (pb.ModelReadyRequest, pb.ModelReadyResponse, Metadata.model_ready),
    "ModelMetadata": (pb.ModelMetadataRequest, pb.ModelMetadataResponse, Metadata.model),
    "ModelConfig": (pb.ModelConfigRequest, pb.ModelConfigResponse, Metadata.config),
    "ModelStatistics": (
        pb.ModelStatisticsRequest,
        pb.ModelStatisticsResponse,
        Metadata.statistics,
    ),
    "RepositoryIndex": (pb.RepositoryIndexRequest, pb.RepositoryIndexResponse, Metadata.index),
}
"""The messages of the methods that describe the server or its models, and what answers them."""

PROBES: Final = (*OPEN, "ModelReady")
"""Methods that probes call every few seconds; logged at `debug`."""

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)
Work = Callable[[RequestFacts], Awaitable[M]]
"""Answers a request, whose facts it notes."""

CallWork = Callable[[Context, RequestFacts], Awaitable[Message]]
"""Receives and answers the request of a call."""

_serialize: Final = methodcaller("SerializeToString")


class InferenceServicer:
    """Answers the calls of one server.

    Args:
        statistics: returns the totals of every model; called in a thread.
        stream_window: most unanswered requests of a stream.

    Attributes:
        requests: requests that are being answered.
    """

    def __init__(
        self,
        inference: Inference,
        statistics: Statistics,
        admission: Admission,
        stream_window: int,
    ):
        self._admission = admission
        self._stream_window = stream_window
        self._inference = inference
        self._api = inference.api
        self._metadata = Metadata(inference, statistics)
        self._ids = RequestIds()
        self._health = health.aio.HealthServicer()
        self._reflection = reflection.aio.ReflectionServicer(SERVICES)
        self._streams: set[InferStream] = set()
        self._end: CarryError | None = None
        self.requests = 0

    def handlers(self) -> dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]]:
        """The handlers of each service's methods."""
        unary: dict[str, CallWork] = {
            **{name: partial(self._describe, name, *each) for name, each in DESCRIPTIONS.items()},
            "ModelInfer": self._model_infer,
        }
        return {
            SERVICE: {
                **{name: _unary(partial(self._call, name, work)) for name, work in unary.items()},
                "ModelStreamInfer": _stream(self._model_stream_infer),
            },
            health.SERVICE_NAME: {"Check": _unary(self._check), "Watch": _stream(self._watch)},
            reflection.SERVICE_NAME: {"ServerReflectionInfo": _stream(self._reflect)},
        }

    async def begin_stop(self) -> None:
        """Report that the server is not ready, and end the streams of requests."""
        self._end = ShuttingDown("the service is stopping and reads no more requests")
        for stream in self._streams:
            stream.end(self._end)
        await self._health.enter_graceful_shutdown()

    async def _call(
        self,
        method: str,
        work: CallWork,
        context: Context,
    ) -> Message:
        """Answer a call with one request; an error ends it with a status."""
        with bound_contextvars(request_id=self._request_id(context)):
            result = await self._answer(
                method, partial(work, context), self._read_trace_headers(context)
            )
            if isinstance(result, CarryError):
                return await _abort(context, result)
            return result

    async def _describe(
        self,
        method: str,
        kind: type[Message],
        response: type[M],
        describe: Describe,
        context: Context,
        facts: RequestFacts,
    ) -> M:
        """Answer a call for what describes the server or its models."""
        if method in OPEN:
            parse_short(kind, await self._admission.receive_probe(context))
            document = await describe(self._metadata)
        else:
            caller = self._admit(context)
            async with self._admission.messages.receive(context.read) as [data]:
                message: Any = parse_short(kind, data)
                names: dict[str, str] = {}
                if "version" in kind.DESCRIPTOR.fields_by_name:
                    names = {"model": message.name, "version": message.version}
                self._note(facts, names.get("model", ""), len(data))
                document = await describe(self._metadata, caller, **names)
        return ParseDict(document, response(), ignore_unknown_fields=True)

    async def _model_infer(self, context: Context, facts: RequestFacts) -> pb.ModelInferResponse:
        caller = self._admit(context)
        async with self._admission.messages.receive(context.read) as received:
            message = InferMessage(received.pop())
            reply = await self._infer(caller, message, context.time_remaining(), facts)
            return encode_reply(reply, pb.ModelInferResponse())

    async def _model_stream_infer(self, context: Context) -> None:
        # the call has a context of its own, which the tasks of its requests inherit
        bind_contextvars(request_id=self._request_id(context))
        began_s = time.monotonic()
        try:
            authorization = _authorization(context)
            caller = self._api.access.caller(authorization)
            self._admission.calls.acquire(context)
        except CarryError as error:
            self._finish("ModelStreamInfer", RequestFacts(), began_s, error)
            raise
        answer = partial(self._answer_in_stream, authorization, self._read_trace_headers(context))
        stream = InferStream(context, answer, self._admission.messages, self._stream_window)
        forget = self._api.access.notify_end(caller, stream.end)
        self._streams.add(stream)
        try:
            if self._end is not None:
                raise self._end
            await stream.run()
        finally:
            self._streams.discard(stream)
            forget()

    async def _answer_in_stream(
        self,
        authorization: bytes | None,
        propagated: Mapping[str, str],
        message: InferMessage,
        error: CarryError | None,
    ) -> pb.ModelStreamInferResponse | CarryError:
        async def work(facts: RequestFacts) -> pb.ModelStreamInferResponse:
            # the key may have been revoked since the call began
            caller = self._api.access.caller(authorization)
            facts.key = caller.key_id
            if error is not None:
                raise error
            reply = await self._infer(caller, message, None, facts)
            response = pb.ModelStreamInferResponse()
            encode_reply(reply, response.infer_response)
            return response

        return await self._answer("ModelStreamInfer", work, propagated)

    async def _infer(
        self,
        caller: Caller,
        message: InferMessage,
        remaining_s: float | None,
        facts: RequestFacts,
    ) -> InferReply:
        """Answer a request whose client waits for so long; None if it does not say."""
        self._note(facts, message.head.model_name, message.size)
        deadline_s = time.monotonic() + self._api.limits.effective_timeout_s(remaining_s)
        call = await message.read(self._inference, caller, deadline_s)
        return await self._inference.answer(caller, call)

    def _note(self, facts: RequestFacts, model: str, received_bytes: int) -> None:
        """Note the message of a request, and its model if that is served."""
        facts.received_bytes = received_bytes
        facts.model = model if model in self._api.pipeline.models else None

    async def _answer(
        self, method: str, work: Work[M], propagated: Mapping[str, str]
    ) -> M | CarryError:
        """The result of a request's work, or its error, counted; either is logged and traced.

        It is called in a context of the request.

        Args:
            propagated: the metadata that carries the trace of the caller.
        """
        began_s, facts = time.monotonic(), RequestFacts()
        request_facts.set(facts)
        if self._api.tracer is not None:
            facts.span = self._api.tracer.start_request(propagated, began_s)
        self.requests += 1
        result: M | CarryError
        try:
            result = await work(facts)
        except CarryError as error:
            result = error
            log_failure(error)
        except asyncio.CancelledError:
            _log(method, grpc.StatusCode.CANCELLED, began_s, facts)
            raise
        except Exception as error:
            result = log_unexpected_failure(error)
        finally:
            self.requests -= 1
        self._finish(method, facts, began_s, result)
        return result

    def _finish(
        self, method: str, facts: RequestFacts, began_s: float, result: Message | CarryError
    ) -> None:
        """Count and log a request that was answered."""
        status = grpc.StatusCode.OK
        if isinstance(result, CarryError):
            # the error and its causes would be cycles: they refer to frames that refer to them
            detach_error(result)
            facts.note_error(result)
            self._api.recorder.record_error(facts.model or "-", result)
            status = status_code(result)
        else:
            facts.sent_bytes = result.ByteSize()
        _log(method, status, began_s, facts)

    def _admit(self, context: Context) -> Caller:
        """Admit a call; returns the caller.

        Raises:
            Unauthenticated, StoreUnavailable, DuplicateField, Overloaded
        """
        caller = self._caller(context)
        note_key(caller.key_id)
        self._admission.calls.acquire(context)
        return caller

    def _caller(self, context: Context) -> Caller:
        access = self._api.access
        return access.open_caller or access.caller(_authorization(context))

    def _has_key(self, context: Context) -> bool:
        """Whether the caller has an access key, or needs none."""
        try:
            self._caller(context)
        except CarryError:
            return False
        return True

    def _request_id(self, context: Context) -> str:
        """The id of a call, as for HTTP: the client's if it is a token, else a new one; the client
        reads it from the trailing metadata."""
        for request_id in _metadata(context, REQUEST_ID):
            if isinstance(request_id, str) and is_request_id(request_id.encode()):
                break
        else:
            request_id = self._ids.next().decode()
        context.set_trailing_metadata(((REQUEST_ID, request_id),))
        return request_id

    def _read_trace_headers(self, context: Context) -> dict[str, str]:
        """The metadata that carries the trace of the caller; none if it is repeated."""
        if self._api.tracer is None:
            return {}
        values = {name: _metadata(context, name) for name in PROPAGATED}
        if any(len(each) > 1 for each in values.values()):
            return {}
        return {name: str(each[0]) for name, each in values.items() if each}

    async def _check(self, context: Context) -> health_pb2.HealthCheckResponse:
        """Whether calls should be sent here; watchers get a change at the next check."""
        data = await self._admission.receive_probe(context)
        request = parse_short(health_pb2.HealthCheckRequest, data)
        is_ready = (await self._metadata.ready())["ready"]
        status = health_pb2.HealthCheckResponse.ServingStatus.Value(
            "SERVING" if is_ready else "NOT_SERVING"
        )
        for name in ("", SERVICE):
            await self._health.set(name, status)
        return await self._health.Check(request, context)

    async def _watch(self, context: Context) -> None:
        async with self._admission.public_stream(context, has_key=self._has_key(context)):
            data = await self._admission.receive_public(context)
            await self._health.Watch(parse_short(health_pb2.HealthCheckRequest, data), context)

    async def _reflect(self, context: Context) -> None:
        async with self._admission.public_stream(context, has_key=self._has_key(context)):
            # an async generator, which the types of the library say it is not
            answers: Any = self._reflection.ServerReflectionInfo(
                self._reflection_requests(context), context
            )
            async for answer in answers:
                await context.write(answer)

    async def _reflection_requests(
        self, context: Context
    ) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        while True:
            try:
                data = await self._admission.receive_public(context)
            except MalformedBody:
                return  # the client has sent all
            yield parse_short(reflection_pb2.ServerReflectionRequest, data)


def _unary(answer: Callable[[Context], Awaitable[Message]]) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler of a method with one response."""
    return grpc.stream_unary_rpc_method_handler(
        _with_status(answer), response_serializer=_serialize
    )


def _stream(answer: Callable[[Context], Awaitable[None]]) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler of a method with many responses."""
    return grpc.stream_stream_rpc_method_handler(
        _with_status(answer), response_serializer=_serialize
    )


def _with_status(answer: Callable[[Context], Awaitable[Any]]) -> Any:
    """Wrap a method, so that its errors end the call with their status."""

    async def handle(requests: object, context: Context) -> Any:
        try:
            return await answer(context)
        except CarryError as error:
            await _abort(context, error)

    return handle


async def _abort(context: Context, error: CarryError) -> NoReturn:
    """End a call with the status of an error."""
    metadata = (*context.trailing_metadata(), *trailing_metadata(error))
    await context.abort(status_code(error), status_details(error), metadata)


def _authorization(context: Context) -> bytes | None:
    """The key in a call's metadata, as in the header of HTTP.

    Raises:
        DuplicateField
    """
    values = _metadata(context, AUTHORIZATION)
    if len(values) > 1:
        raise DuplicateField(
            f"{AUTHORIZATION}: expected it once, got it {len(values)} times", at=AUTHORIZATION
        )
    if not values:
        return None
    [value] = values
    return value.encode("latin-1", "replace") if isinstance(value, str) else value


def _metadata(context: Context, name: str) -> list[str | bytes]:
    """The values of a call's metadata of this name."""
    return [value for key, value in context.invocation_metadata() or () if key == name]


def _log(method: str, status: grpc.StatusCode, began_s: float, facts: RequestFacts) -> None:
    """Write the line of one request, with the number of its status."""
    log_request(
        current_request_id() or "-",
        GRPC,
        f"/{SERVICE}/{method}",
        status.value[0],
        round((time.monotonic() - began_s) * 1000, 2),
        facts,
        is_probe=method in PROBES,
    )
