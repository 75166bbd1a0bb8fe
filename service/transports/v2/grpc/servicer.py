"""The methods of V2's `GRPCInferenceService`, and the standard services health and reflection.

Each request of V2 gets an id (the metadata `x-request-id` of a call, or a new one), one line in the
log, and on failure a status with Carry's code (see `status`). Health, for the whole server and for
V2's service, and reflection need no key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from structlog.contextvars import bound_contextvars

from service.access.caller import Caller
from service.core.errors import CarryError, MalformedBody, ShuttingDown
from service.core.tracing import PROPAGATED
from service.server.errors import DuplicateField
from service.server.http2_protocol import Http2Connection
from service.telemetry.access_log import RequestFacts, note_key
from service.telemetry.logs import RequestIds
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.admission import Admission, MessageRoom
from service.transports.v2.grpc.call import Call, CallHead, Handler, ReadingHandler
from service.transports.v2.grpc.infer_requests import (
    SERVICE,
    STREAM_INFER,
    InferRequests,
    RequestContext,
)
from service.transports.v2.grpc.infer_stream import InferStream
from service.transports.v2.grpc.messages import InferMessage, parse
from service.transports.v2.grpc.public_services import PublicServices
from service.transports.v2.grpc.status import StatusCode
from service.transports.v2.inference import Inference
from service.transports.v2.metadata import Document, Metadata, Statistics

AUTHORIZATION: Final = b"authorization"
Describe = Callable[..., Awaitable[Document]]
OPEN: Final = ("ServerLive", "ServerReady")
"""Methods that need no key."""

MAX_SHORT_BYTES: Final = LONG_BYTES - 1
"""Length of the longest message to a method other than inference, also once it is decompressed."""

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


class InferenceServicer:
    """Answers the calls of one server.

    Args:
        statistics: returns the totals of every model; called in a thread.
        stream_window: most unanswered requests of a stream.
        max_bytes: length of the longest message.
    """

    def __init__(
        self,
        inference: Inference,
        statistics: Statistics,
        admission: Admission,
        stream_window: int,
        max_bytes: int,
    ):
        self._admission = admission
        self._stream_window = stream_window
        self._max_bytes = max_bytes
        self._api = inference.api
        self._metadata = Metadata(inference, statistics)
        self._infer = InferRequests(inference)
        self._ids = RequestIds()
        self._streams: set[InferStream] = set()
        self._end: CarryError | None = None
        self._public = PublicServices(self._metadata)
        self._methods: dict[str, Callable[[Call], Handler]] = {
            f"/{SERVICE}/ModelInfer": self._model_infer,
            f"/{SERVICE}/{STREAM_INFER}": self._model_stream_infer,
            **{
                f"/{SERVICE}/{name}": partial(self._start_description, name)
                for name in DESCRIPTIONS
            },
            **{
                path: partial(self._start_public, run) for path, run in self._public.methods.items()
            },
        }

    @property
    def requests(self) -> int:
        """Requests that are being answered."""
        return self._infer.count

    def accept(self, connection: Http2Connection, stream_id: int, head: CallHead) -> Call:
        """Begin a call."""
        call = Call(connection, stream_id, head, self._ids, self._max_bytes)
        call.room = self._admission.messages
        method = self._methods.get(head.path)
        if method is None:
            call.end(StatusCode.UNIMPLEMENTED, "the server has no such method")
        else:
            handler = method(call)
            if call.is_open:
                call.handler = handler
        return call

    def begin_stop(self) -> None:
        """Report that the server is not ready, and end the streams of requests."""
        self._end = ShuttingDown("the service is stopping and reads no more requests")
        for stream in list(self._streams):
            stream.fail(self._end)
        self._public.begin_stop()

    def _model_infer(self, call: Call) -> Handler:
        context, caller = self._admit(call, "ModelInfer")
        handler = UnaryInfer(context, self._infer, self._admission.messages)
        if isinstance(caller, CarryError):
            handler.fail(caller)
        else:
            self._admission.messages.begin(call)
        return handler

    def _model_stream_infer(self, call: Call) -> Handler:
        context, caller = self._admit(call, STREAM_INFER)
        answer, room = partial(self._infer.answer, context), self._admission.messages
        stream = InferStream(call, answer, room, self._stream_window, self._streams.discard)
        if isinstance(caller, CarryError):
            self._infer.reject(context, caller, stream.reject)
        else:
            self._streams.add(stream)
            call.on_release.append(self._api.access.notify_end(caller, stream.fail))
            call.end_at_deadline()
        return stream

    def _admit(self, call: Call, method: str) -> tuple[RequestContext, Caller | CarryError]:
        """What the requests of a call share, and the caller, or why the call is rejected."""
        in_stream = method == STREAM_INFER
        timeout_s = self._api.limits.effective_timeout_s(None if in_stream else call.head.timeout_s)
        propagated, authorization = self._read_trace_headers(call), None
        caller: Caller | CarryError
        try:
            authorization = _authorization(call)
            caller = self._caller(authorization)
            self._admission.calls.acquire(call)
            if self._end is not None:
                caller = self._end.copy()
        except CarryError as error:
            caller = error
        context = RequestContext(call, method, authorization, propagated, timeout_s, in_stream)
        return context, caller

    def _start_description(self, method: str, call: Call) -> Handler:
        run = partial(self._describe, method)
        if method in OPEN:
            return self._start_public(run, call)
        call.max_bytes = MAX_SHORT_BYTES
        return ReadingHandler(call, run)

    def _start_public(self, run: Callable[[ReadingHandler], Any], call: Call) -> Handler:
        """Begin a call that needs no key."""
        self._admission.public.acquire(call)
        call.room = self._admission.public_messages
        call.max_bytes = MAX_SHORT_BYTES
        return ReadingHandler(call, run)

    async def _describe(self, method: str, handler: ReadingHandler) -> None:
        """Answer a call for what describes the server or its models."""
        kind, response, describe = DESCRIPTIONS[method]
        call = handler.call

        async def work(facts: RequestFacts) -> tuple[bytes, int]:
            if method in OPEN:
                parse(kind, await handler.read_only())
                document = await describe(self._metadata)
            else:
                caller = self._caller(_authorization(call))
                note_key(caller.key_id)
                self._admission.calls.acquire(call)
                data = await handler.read_only()
                message: Any = parse(kind, data)
                names: dict[str, str] = {}
                if "version" in kind.DESCRIPTOR.fields_by_name:
                    names = {"model": message.name, "version": message.version}
                self._infer.note(facts, names.get("model", ""), len(data))
                document = await describe(self._metadata, caller, **names)
            data = ParseDict(document, response(), ignore_unknown_fields=True).SerializeToString()
            return data, len(data)

        context = RequestContext(call, method, None, self._read_trace_headers(call))
        with bound_contextvars(request_id=call.request_id):
            result = await self._infer.run(context, work)
            if isinstance(result, CarryError):
                call.fail(result)
            else:
                call.respond(result)
                call.end()

    def _caller(self, authorization: bytes | None) -> Caller:
        access = self._api.access
        return access.open_caller or access.caller(authorization)

    def _read_trace_headers(self, call: Call) -> dict[str, str]:
        """The metadata that carries the trace of the caller; none if it is repeated."""
        if self._api.tracer is None:
            return {}
        values = {name: call.head.values(name.encode()) for name in PROPAGATED}
        if any(len(each) > 1 for each in values.values()):
            return {}
        return {name: each[0].decode("latin-1") for name, each in values.items() if each}


class UnaryInfer(Handler):
    """The request of a `ModelInfer` call."""

    def __init__(self, context: RequestContext, requests: InferRequests, room: MessageRoom):
        self._context = context
        self._call = call = context.call
        self._requests = requests
        self._room = room
        self._held_bytes = 0
        self._cancel: Callable[[], object] = call.stop_reading

    def receive(self, message: bytes) -> None:
        """Answer the request."""
        self._call.stop_reading()
        self._hold(len(message))
        if self._room.is_full:
            self.fail(self._room.overloaded())
            return
        request = InferMessage(message)
        self._cancel = self._requests.answer(self._context, request, None, self._respond)

    def receive_end(self) -> None:
        """The client has sent nothing."""
        self.fail(MalformedBody("message: expected one, got none", at="message", got="none"))

    def fail(self, error: CarryError) -> None:
        """End the call with an error."""
        self._requests.reject(self._context, error, self._respond)

    def cancel(self) -> None:
        """Drop the request."""
        self._cancel()
        self._hold(0)

    def _respond(self, response: bytes | CarryError) -> None:
        self._hold(0)
        self._cancel = self._call.stop_reading
        if isinstance(response, CarryError):
            self._call.fail(response)
        elif self._call.is_open:
            self._call.respond(response)
            self._call.end()

    def _hold(self, held_bytes: int) -> None:
        change, self._held_bytes = held_bytes - self._held_bytes, held_bytes
        self._room.count(change)


def _authorization(call: Call) -> bytes | None:
    """The key in a call's metadata, as in the header of HTTP.

    Raises:
        DuplicateField
    """
    values = call.head.values(AUTHORIZATION)
    if len(values) > 1:
        name = AUTHORIZATION.decode()
        raise DuplicateField(f"{name}: expected it once, got it {len(values)} times", at=name)
    return values[0] if values else None
