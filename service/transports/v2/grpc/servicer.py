"""The methods of V2's `GRPCInferenceService`: messages to values, a call, values to messages.

Each request gets an id (the metadata `x-request-id` of a call, or a new one), one line in the log,
and on failure a status with Carry's code (see `errors`). Deadline and cancellation are gRPC's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any, Final, NoReturn, TypeVar

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from structlog.contextvars import bind_contextvars, bound_contextvars

from service.access.caller import PREDICT, Caller, Verb
from service.codec.decoding import detached
from service.core.errors import BodyTooLarge, CarryError
from service.core.tracing import PROPAGATED
from service.pipeline.recorder import ModelStatistics
from service.pipeline.served_model import ServedModel
from service.server.errors import DuplicateField
from service.telemetry.access_log import GRPC, RequestFacts, log_request, note_key, request_facts
from service.telemetry.logs import RequestIds, current_request_id
from service.transports.common.failure_log import log_failure, log_unexpected_failure
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.v1.request_log import is_request_id
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.call_admission import CallAdmission
from service.transports.v2.grpc.errors import (
    status_code,
    status_details,
    trailing_metadata,
)
from service.transports.v2.grpc.incoming import InferMessage, parse
from service.transports.v2.grpc.infer_stream import InferStream, Requests, Responses
from service.transports.v2.grpc.message_admission import MessageAdmission
from service.transports.v2.grpc.messages import encode_reply
from service.transports.v2.inference import Inference
from service.transports.v2.metadata import (
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)

SERVICE: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
REQUEST_ID: Final = "x-request-id"
MODELS: Final = (Verb.MODELS,)
AUTHORIZATION: Final = "authorization"
PROBES: Final = ("ServerLive", "ServerReady", "ModelReady")
"""Methods that probes call every few seconds; logged at `debug`."""

Context = grpc.aio.ServicerContext[Any, Any]
Statistics = Callable[[], Mapping[str, ModelStatistics]]
M = TypeVar("M", bound=Message)
Work = Callable[["Model", Context], Awaitable[Message]]
"""Receives and answers the message of a call."""

Describe = Callable[[Caller, Any], Awaitable[Message]]
"""Answers a message for what describes a model, or all models in the caller's scope."""

serialize: Final = methodcaller("SerializeToString")
"""The bytes of a message."""


class InferenceServicer:
    """Answers the calls of one server.

    Args:
        statistics: returns the totals of every model; called in a thread.
        calls: admits calls.
        messages: admits what calls with a key receive.
        stream_window: most unanswered requests of a stream.

    Attributes:
        stopping: set when the server stops, which ends the streams.
        requests: requests that are being answered.
    """

    def __init__(
        self,
        inference: Inference,
        statistics: Statistics,
        calls: CallAdmission,
        messages: MessageAdmission,
        stream_window: int,
    ):
        self._calls = calls
        self._messages = messages
        self._stream_window = stream_window
        self._inference = inference
        self._api = inference.api
        self._statistics = statistics
        self._ids = RequestIds()
        self.stopping = asyncio.Event()
        self.requests = 0

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """The handler of each method."""
        probes: dict[str, tuple[type[Message], Callable[[Any], Awaitable[Message]]]] = {
            "ServerLive": (pb.ServerLiveRequest, self._server_live),
            "ServerReady": (pb.ServerReadyRequest, self._server_ready),
        }
        descriptions: dict[str, tuple[type[Message], Describe]] = {
            "ServerMetadata": (pb.ServerMetadataRequest, self._server_metadata),
            "ModelReady": (pb.ModelReadyRequest, self._model_ready),
            "ModelMetadata": (pb.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": (pb.ModelConfigRequest, self._model_config),
            "ModelStatistics": (pb.ModelStatisticsRequest, self._model_statistics),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self._repository_index),
        }
        unary: dict[str, Work] = {
            **{method: partial(self._probe, *probe) for method, probe in probes.items()},
            **{method: partial(self._describe, *each) for method, each in descriptions.items()},
            "ModelInfer": self._model_infer,
        }
        # as streams, since only those leave it to the handler when a message is received;
        # clients see no difference
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            method: grpc.stream_unary_rpc_method_handler(
                partial(self._call, method, work), response_serializer=serialize
            )
            for method, work in unary.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._model_stream_infer, response_serializer=serialize
        )
        return handlers

    async def _call(
        self, method: str, work: Work, requests: AsyncIterator[bytes], context: Context
    ) -> Message:
        """Answer a call with one request; an error ends it with a status."""
        with bound_contextvars(request_id=self._request_id(context)):
            model = Model()
            propagated = self._propagated(context)
            result = await self._answer(method, model, partial(work, model, context), propagated)
            if isinstance(result, CarryError):
                return await abort(context, result)
            return result

    async def _probe(
        self,
        kind: type[Message],
        work: Callable[[Any], Awaitable[Message]],
        model: Model,
        context: Context,
    ) -> Message:
        """Answer a call that needs no access key."""
        return await work(parse_short(kind, await self._calls.receive_probe(context)))

    async def _describe(
        self, kind: type[Message], work: Describe, model: Model, context: Context
    ) -> Message:
        """Answer a call for what describes a model, or all models."""
        caller = self._admit(context)
        async with self._messages.receive(context.read) as [data]:
            message: Any = parse_short(kind, data)
            model.name = getattr(message, "name", "")
            _note_message(len(data))
            return await work(caller, message)

    def _admit(self, context: Context) -> Caller:
        """Admit a call; returns the caller.

        Raises:
            Unauthenticated, StoreUnavailable, DuplicateField, Overloaded
        """
        caller = self._caller(context)
        self._calls.admit(context)
        return caller

    def _caller(self, context: Context) -> Caller:
        access = self._api.access
        if access.open_caller is not None:
            return access.open_caller
        caller = access.caller(_authorization(context))
        note_key(caller.key_id)
        return caller

    def has_key(self, context: Context) -> bool:
        """Whether the caller has an access key, or needs none."""
        try:
            self._caller(context)
        except CarryError:
            return False
        return True

    async def _model_infer(self, model: Model, context: Context) -> pb.ModelInferResponse:
        caller = self._admit(context)
        async with self._messages.receive(context.read) as received:
            message = InferMessage(received.pop())
            model.name = message.head.model_name
            return await self._infer(caller, message, context.time_remaining())

    async def _model_stream_infer(self, requests: Requests, context: Context) -> Responses:
        # the call has a context of its own, which the tasks of its requests inherit
        bind_contextvars(request_id=self._request_id(context))
        began_s = time.monotonic()
        try:
            authorization = _authorization(context)
            caller = self._api.access.caller(authorization)
            self._calls.admit(context)
        except CarryError as error:
            facts = RequestFacts()
            facts.note_error(error)
            self._api.recorder.record_error("-", error)
            _log("ModelStreamInfer", status_code(error), began_s, facts)
            await abort(context, error)
        try:
            stream = InferStream(
                partial(self._infer_in_stream, authorization),
                partial(self._answer_in_stream, self._propagated(context)),
                self._messages,
                self._stream_window,
                self.stopping,
            )
            forget = self._api.access.notify_end(caller, stream.end)
            try:
                async for response in stream.responses(requests):
                    yield response
            finally:
                forget()
        except CarryError as error:
            await abort(context, error)

    async def _infer_in_stream(
        self, authorization: bytes | None, message: InferMessage
    ) -> pb.ModelInferResponse:
        # the key may have been revoked since the call began
        caller = self._api.access.caller(authorization)
        note_key(caller.key_id)
        return await self._infer(caller, message, None)

    async def _answer_in_stream(
        self, propagated: Mapping[str, str], model: str, work: Callable[[], Awaitable[M]]
    ) -> M | CarryError:
        return await self._answer("ModelStreamInfer", Model(model), work, propagated)

    async def _answer(
        self,
        method: str,
        model: Model,
        work: Callable[[], Awaitable[M]],
        propagated: Mapping[str, str],
    ) -> M | CarryError:
        """The result of a request's work, or its error, counted; either is logged and traced.

        It is called in a context of the request.

        Args:
            propagated: the metadata that carries the trace of the caller.
        """
        began_s = time.monotonic()
        facts = RequestFacts()
        request_facts.set(facts)
        if self._api.tracer is not None:
            facts.span = self._api.tracer.start_request(propagated, began_s)
        result: M | CarryError
        self.requests += 1
        try:
            result = await work()
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
        if isinstance(result, CarryError):
            # it and its causes refer to this frame, which refers to it
            detached(result)
            self._api.recorder.record_error(model.name or "-", result)
            _log(method, status_code(result), began_s, facts)
        else:
            facts.sent_bytes = result.ByteSize()
            _log(method, grpc.StatusCode.OK, began_s, facts)
        return result

    def _request_id(self, context: Context) -> str:
        """The id of a call, as for HTTP: the client's if it is a token, else a new one; the client
        reads it from the trailing metadata."""
        request_id = self._sent_request_id(context) or self._ids.next().decode()
        context.set_trailing_metadata(((REQUEST_ID, request_id),))
        return request_id

    def _sent_request_id(self, context: Context) -> str | None:
        for name, value in context.invocation_metadata() or ():
            if name == REQUEST_ID and isinstance(value, str) and is_request_id(value.encode()):
                return value
        return None

    def _propagated(self, context: Context) -> dict[str, str]:
        """The metadata that carries the trace of the caller; none if it is repeated."""
        if self._api.tracer is None:
            return {}
        entries = [
            (name, value)
            for name, value in context.invocation_metadata() or ()
            if name in PROPAGATED and isinstance(value, str)
        ]
        propagated = dict(entries)
        return propagated if len(propagated) == len(entries) else {}

    async def _infer(
        self, caller: Caller, message: InferMessage, remaining_s: float | None
    ) -> pb.ModelInferResponse:
        """Answer a request whose client waits for so long; None if it does not say."""
        self._api.pipeline.model(caller, PREDICT, message.head.model_name)
        _note_message(message.size)
        timeout_s = self._api.limits.effective_timeout_s(remaining_s)
        deadline_s = time.monotonic() + timeout_s
        return encode_reply(await message.infer(self._inference, caller, deadline_s))

    async def _server_live(self, message: Message) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, message: Message) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=await self.is_ready())

    async def _server_metadata(self, caller: Caller, message: Message) -> pb.ServerMetadataResponse:
        self._api.pipeline.describe(caller)
        return ParseDict(server_metadata(), pb.ServerMetadataResponse())

    async def _model_ready(
        self, caller: Caller, message: pb.ModelReadyRequest
    ) -> pb.ModelReadyResponse:
        self._inference.served(caller, MODELS, message.name, message.version)
        return pb.ModelReadyResponse(ready=await self.is_ready())

    async def _model_metadata(
        self, caller: Caller, message: pb.ModelMetadataRequest
    ) -> pb.ModelMetadataResponse:
        served = self._inference.served(caller, MODELS, message.name, message.version)
        return ParseDict(model_metadata(served), pb.ModelMetadataResponse())

    async def _model_config(
        self, caller: Caller, message: pb.ModelConfigRequest
    ) -> pb.ModelConfigResponse:
        served = self._inference.served(caller, MODELS, message.name, message.version)
        config = model_config(served, self._api.limits.max_items)
        return ParseDict({"config": config}, pb.ModelConfigResponse())

    async def _model_statistics(
        self, caller: Caller, message: pb.ModelStatisticsRequest
    ) -> pb.ModelStatisticsResponse:
        served: Iterable[ServedModel] = self._api.pipeline.describe(caller).values()
        if message.name:
            served = [self._inference.served(caller, MODELS, message.name, message.version)]
        totals = await asyncio.to_thread(self._statistics)
        return ParseDict(model_statistics(served, totals), pb.ModelStatisticsResponse())

    async def _repository_index(
        self, caller: Caller, message: pb.RepositoryIndexRequest
    ) -> pb.RepositoryIndexResponse:
        index = repository_index(self._api.pipeline.describe(caller).values())
        return ParseDict({"models": index}, pb.RepositoryIndexResponse())

    async def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return all(check.ok for check in await self._api.pipeline.readiness())


@dataclass(slots=True)
class Model:
    """The model of a request, once it is known."""

    name: str = ""


def parse_short(kind: type[M], data: bytes) -> M:
    """Parse a message of a kind that is always short.

    Raises:
        BodyTooLarge, MalformedBody
    """
    if len(data) >= LONG_BYTES:
        raise BodyTooLarge(
            f"message: expected less than {LONG_BYTES} bytes, got {len(data)}",
            expected=LONG_BYTES,
            got=len(data),
        )
    return parse(kind, data)


def _authorization(context: Context) -> bytes | None:
    """The key in a call's metadata, as in the header of HTTP.

    Raises:
        DuplicateField
    """
    values = [value for name, value in context.invocation_metadata() or () if name == AUTHORIZATION]
    if len(values) > 1:
        raise DuplicateField(
            f"{AUTHORIZATION}: expected it once, got it {len(values)} times", at=AUTHORIZATION
        )
    if not values:
        return None
    [value] = values
    return value.encode("latin-1", "replace") if isinstance(value, str) else value


async def abort(context: Context, error: CarryError) -> NoReturn:
    """End a call with the status of an error."""
    metadata = (*context.trailing_metadata(), *trailing_metadata(error))
    await context.abort(status_code(error), status_details(error), metadata)


def _note_message(size: int) -> None:
    """Note the length of the message of the request that is being served."""
    facts = request_facts.get()
    if facts is not None:
        facts.received_bytes = size


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
