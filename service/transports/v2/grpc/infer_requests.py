"""Answers requests for inference, of `ModelInfer` and `ModelStreamInfer` alike.

A short chunk goes straight to the pipeline, which calls back with its result, as on the fast path
of HTTP: no task, and no context of its own. Any other request, and one that may fail before it is
queued, is answered by a task. Both write one line to the log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Final, TypeVar, cast

import msgspec
import structlog
from structlog.contextvars import bound_contextvars

from service.access.caller import Caller
from service.codec.decoding import detach_error
from service.core.errors import CarryError
from service.core.values import Chunk, Reply, StreamKey
from service.telemetry.access_log import GRPC, RequestFacts, log_request, request_facts
from service.transports.common.failure_log import log_failure, log_unexpected_failure
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.call import Call
from service.transports.v2.grpc.infer_stream import OnResponse
from service.transports.v2.grpc.messages import CACHED_HEADS, InferMessage
from service.transports.v2.grpc.replies import ReplyEncoder, encode_reply
from service.transports.v2.grpc.status import StatusCode, status_code
from service.transports.v2.inference import Inference, is_of_rows
from service.transports.v2.request import InferCall, InferRequest, Signature

log = structlog.get_logger(__name__)

SERVICE: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
PROBES: Final = ("ServerLive", "ServerReady", "ModelReady")
"""Methods that probes call every few seconds; logged at `debug`."""

STREAM_INFER: Final = "ModelStreamInfer"

T = TypeVar("T")
Work = Callable[[RequestFacts], Awaitable[tuple[T, int]]]
"""Answers a request and notes its facts; returns the result and the number of bytes sent."""


class RequestContext(msgspec.Struct, frozen=True):
    """What the requests of one call share.

    Attributes:
        authorization: the access key in the metadata, which is not yet verified.
        propagated: the metadata that carries the trace of the caller.
        timeout_s: how long the client of a request waits; the default in a stream of requests.
        in_stream: whether the call has many requests.
    """

    call: Call
    method: str
    authorization: bytes | None = None
    propagated: Mapping[str, str] = {}
    timeout_s: float = 0.0
    in_stream: bool = False


class InferRequests:
    """The requests that one server answers.

    Attributes:
        count: requests that are being answered.
    """

    def __init__(self, inference: Inference):
        self._inference = inference
        self._api = inference.api
        self._encoder = ReplyEncoder()
        self._signatures: dict[Hashable, Signature] = {}
        inference.on_switch(self._signatures.clear)
        inference.on_switch(self._encoder.forget)
        self.count = 0

    def answer(
        self,
        context: RequestContext,
        message: InferMessage,
        error: CarryError | None,
        on_response: OnResponse,
    ) -> Callable[[], object]:
        """Answer a request: see `infer_stream.Answer`."""
        if error is None and not message.is_long and self._api.tracer is None:
            try:
                cancel = self._enqueue(context, message, on_response)
            except Exception:
                # a defect; the task answers, with `internal_error` if it has it too
                log.exception("fast_path_failed")
                cancel = None
            if cancel is not None:
                return cancel
        task = asyncio.create_task(self._answer_in_task(context, message, error, on_response))
        return task.cancel

    def reject(self, context: RequestContext, error: CarryError, on_response: OnResponse) -> None:
        """Answer a request or a call with an error before it was read."""
        self._finish(context, RequestFacts(), time.monotonic(), error, on_response)

    def _enqueue(
        self, context: RequestContext, message: InferMessage, on_response: OnResponse
    ) -> Callable[[], object] | None:
        """Hand a chunk to the pipeline; None if the request is not a valid chunk."""
        request, api = message.request, self._api
        if isinstance(request, CarryError) or not message.stream or message.is_dry_run:
            return None
        model, stream, began_s = request.model, request.parameters.stream, time.monotonic()
        caller = api.access.open_caller or api.access.cached.get(context.authorization)
        if caller is None or stream is None or model not in api.codecs:
            return None
        left_s = context.timeout_s
        if request.parameters.timeout_us:
            left_s = min(left_s, request.parameters.timeout_us / 1e6)
        facts = RequestFacts(model, stream, None, caller.key_id, None, message.size)
        try:
            key = StreamKey(model, stream)
            rejection = api.pipeline.check_admission(caller, model, key, left_s)
            if rejection is not None:
                self._finish(context, facts, began_s, rejection, on_response)
                return _ignore
            call = self._read(caller, message, request, key, began_s + left_s)
        except CarryError:
            return None
        chunk = call.work
        if call.deletes or not isinstance(chunk, Chunk):
            return None

        def respond(result: Reply | CarryError) -> None:
            self._count(context, -1)
            if isinstance(result, CarryError):
                self._finish(context, facts, began_s, result, on_response)
                return
            response = self._encoder.encode(call, result, in_stream=context.in_stream)
            facts.sent_bytes = len(response)
            self._log(context, StatusCode.OK, began_s, facts)
            on_response(response)

        def cancel() -> None:
            self._count(context, -1)
            api.pipeline.cancel(caller, job)
            self._log(context, StatusCode.CANCELLED, began_s, facts)

        self._count(context, 1)
        job = api.pipeline.enqueue(caller, chunk, call.deadline_s, respond)
        return cancel

    def _read(
        self,
        caller: Caller,
        message: InferMessage,
        request: InferRequest,
        key: StreamKey,
        deadline_s: float,
    ) -> InferCall:
        """Read the request for a chunk: of a known shape, only its rows.

        Raises:
            CarryError
        """
        call, parameters, data = None, request.parameters, request.inputs[0].data
        shape = self._api.codecs[request.model], request.version, message.shape
        signature = self._signatures.get(shape)
        version = request.version
        if version and self._inference.depends_on_stream(request.model, version):
            signature = None
        if signature is not None and not (parameters.ends and self._inference.delete_at_end):
            call = self._inference.read_rows(
                signature, request.id, key, parameters, cast(bytes, data), deadline_s
            )
        if call is None:
            call = self._inference.read(caller, request, deadline_s)
            if message.shape is not None and is_of_rows(call, len(data)):
                if len(self._signatures) >= CACHED_HEADS:
                    self._signatures.clear()
                self._signatures[shape] = call.signature
        return call

    def _finish(
        self,
        context: RequestContext,
        facts: RequestFacts,
        began_s: float,
        error: CarryError,
        on_response: OnResponse,
    ) -> None:
        """Answer a request with an error."""
        with bound_contextvars(request_id=context.call.request_id):
            log_failure(error)
            self._log_error(context, began_s, facts, error)
            on_response(error)

    async def _answer_in_task(
        self,
        context: RequestContext,
        message: InferMessage,
        error: CarryError | None,
        on_response: OnResponse,
    ) -> None:
        async def work(facts: RequestFacts) -> tuple[bytes, int]:
            self.note(facts, message.model, message.size)
            # the key may have been revoked since the call began
            caller = self._api.access.caller(context.authorization)
            facts.key = caller.key_id
            if error is not None:
                raise error
            deadline_s = time.monotonic() + context.timeout_s
            call = await message.read(self._inference, caller, deadline_s)
            response = pb.ModelStreamInferResponse()
            reply = await self._inference.answer(caller, call)
            encode_reply(reply, response.infer_response)
            data = (response if context.in_stream else response.infer_response).SerializeToString()
            return data, len(data)

        with bound_contextvars(request_id=context.call.request_id):
            on_response(await self.run(context, work))

    async def run(self, context: RequestContext, work: Work[T]) -> T | CarryError:
        """The result of a request's work, or its error, counted; either is logged and traced.

        It is called in a task of the request.
        """
        began_s, facts = time.monotonic(), RequestFacts()
        request_facts.set(facts)
        if self._api.tracer is not None:
            facts.span = self._api.tracer.start_request(context.propagated, began_s)
        self._count(context, 1)
        try:
            result, facts.sent_bytes = await work(facts)
        except CarryError as error:
            log_failure(error)
            self._log_error(context, began_s, facts, error)
            return error
        except asyncio.CancelledError:
            self._log(context, StatusCode.CANCELLED, began_s, facts)
            raise
        except Exception as error:
            internal = log_unexpected_failure(error)
            self._log_error(context, began_s, facts, internal)
            return internal
        finally:
            self._count(context, -1)
        self._log(context, StatusCode.OK, began_s, facts)
        return result

    def _count(self, context: RequestContext, change: int) -> None:
        self.count += change
        context.call.connection.requests += change

    def note(self, facts: RequestFacts, model: str, received_bytes: int) -> None:
        """Note the message of a request, and its model if that is served."""
        facts.received_bytes = received_bytes
        facts.model = model if model in self._api.codecs else None

    def _log_error(
        self, context: RequestContext, began_s: float, facts: RequestFacts, error: CarryError
    ) -> None:
        """Count and log a request that failed."""
        # the error and its causes would be cycles: they refer to frames that refer to them
        detach_error(error)
        facts.note_error(error)
        self._api.recorder.record_error(facts.model or "-", error)
        self._log(context, status_code(error), began_s, facts)

    def _log(
        self, context: RequestContext, status: StatusCode, began_s: float, facts: RequestFacts
    ) -> None:
        """Write the line of one request, with the number of its status."""
        log_request(
            context.call.request_id,
            GRPC,
            f"/{SERVICE}/{context.method}",
            int(status),
            # `round` with a number of digits takes four times as long
            round((time.monotonic() - began_s) * 100_000) / 100,
            facts,
            is_probe=context.method in PROBES,
        )


def _ignore() -> None:
    """Nothing is left to cancel."""
