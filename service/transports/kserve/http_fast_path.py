"""Fast path for chunks by V2 with binary tensors: parsed from the socket buffer, no ASGI scope.

As the fast path of the HTTP API, it accepts a strict subset: a complete request for one short chunk
of a sequence, its JSON before the tensor, valid. Anything else is None, and the slow path reads it
from its first byte and makes the errors. Responses have the same bytes as the slow path's.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache, partial
from typing import Final, NamedTuple

import msgspec
import numpy as np
from structlog.contextvars import bound_contextvars

from service.access.principal import Verb
from service.core.errors import CarryError, Forbidden
from service.core.values import Chunk, Reply, StreamKey
from service.ops.logs import RequestIds
from service.pipeline.scoped_pipeline import PipelineInterface
from service.transports.http.connection.fast_path import (
    MAX_HEADERS_BYTES,
    MAX_REQUEST_BYTES,
    FastRoute,
    IncompleteRequest,
    RejectedRequest,
    parse_common_headers,
    split_trace_headers,
)
from service.transports.http.connection.rejections import CLOSE, response_bytes
from service.transports.http.context import ModelWire
from service.transports.http.limits import ApiLimits
from service.transports.http.media import Media, encode_json
from service.transports.http.replies.pieces import LONG_VALUES
from service.transports.kserve.calls import ResolvedCall, Signature, output_shape, read_values
from service.transports.kserve.http_body import (
    BINARY_OUTPUT,
    HEADER_LENGTH,
    BinaryOutputs,
    Dimension,
    InputParameters,
    RequestedOutput,
    encode_reply,
    may_have_duplicates,
    reply_document,
)
from service.transports.kserve.http_errors import error_answer
from service.transports.kserve.inference import VERSION, Inference
from service.transports.kserve.parameters import parse_parameters
from service.transports.kserve.values import InferReply, InferRequest, InputTensor, OutputTensor

ROUTE: Final = "/v2/models/{model}/infer"

_REQUEST_LINE = re.compile(
    rb"POST /v2/models/([a-z0-9_-]{1,64})(?:/versions/([0-9a-f]{1,12}))?/infer HTTP/1\.1\r\n"
)
_HEADER_LENGTH: Final = HEADER_LENGTH.encode()
_REPLY: Final = (
    b'{"model_name":"%%b","model_version":"%b",%%b"parameters":{"position":%%d,"epoch":"%%b",'
    b'"tag":"%%b","replayed":%%b%%b},"outputs":%%b}' % VERSION.encode()
)
_RESPONSE_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\n"
    b"inference-header-content-length: %d\r\ncontent-length: %d\r\n"
    b"content-type: application/octet-stream\r\nx-request-id: %b\r\n%b\r\n"
)


class _BinaryTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    name: str
    datatype: str
    shape: tuple[Dimension, ...]
    parameters: InputParameters


class _BinaryRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """The JSON of a request with one binary tensor."""

    inputs: tuple[_BinaryTensor]
    outputs: tuple[RequestedOutput, ...] = ()
    id: str = ""
    parameters: dict[str, bool | int | float | str] = {}


_DECODER: Final = msgspec.json.Decoder(_BinaryRequest)


class _Plan(NamedTuple):
    """What requests with the same model, tensor and outputs share.

    Attributes:
        binary: which outputs are binary; at least one is.
        outputs_json: the outputs in the reply's JSON, if there is one, binary, with the same shape
            in every reply; else None.
    """

    wire: ModelWire
    signature: Signature
    binary: BinaryOutputs
    outputs_json: bytes | None


class FastInferRequest(NamedTuple):
    """A complete request for one chunk; attributes as those of `FastRequest`."""

    pipeline: PipelineInterface
    plan: _Plan
    call: ResolvedCall
    chunk: Chunk
    request_id: bytes
    received_s: float
    deadline_s: float
    body_bytes: int
    total_bytes: int


class _Headers(NamedTuple):
    """Parsed headers; attributes as those of `CommonHeaders`."""

    length: int
    authorization: bytes | None
    json_bytes: int
    request_id: bytes | None
    timeout_s: float


class FastInferPath(FastRoute[FastInferRequest]):
    """Parses and answers the requests of one application."""

    def __init__(self, inference: Inference, ids: RequestIds):
        super().__init__(inference.api, ROUTE, _error_response)
        self._inference = inference
        self._ids = ids
        # cached, since clients repeat their shapes and headers
        self._plan = lru_cache(maxsize=1024)(self._make_plan)
        self._max_bytes = min(MAX_REQUEST_BYTES, inference.api.limits.max_body_bytes)
        self._parse_headers = lru_cache(maxsize=4096)(partial(_parse_headers, inference.api.limits))

    def parse(self, data: bytes) -> FastInferRequest | RejectedRequest | IncompleteRequest | None:
        """The request at the beginning of these bytes; None leaves it to the slow path."""
        start = _REQUEST_LINE.match(data)
        if start is None:
            return None
        end = data.find(b"\r\n\r\n", start.end() - 2)
        if end < 0:
            return None
        block = data[start.end() : end]
        propagated: dict[str, str] = {}
        if self._tracer is not None:
            block, propagated = split_trace_headers(block)
        headers = None if len(block) > MAX_HEADERS_BYTES else self._parse_headers(block)
        if headers is None:
            return None
        total_bytes = end + 4 + headers.length
        if total_bytes > self._max_bytes:
            return None
        if len(data) < total_bytes:
            return IncompleteRequest(total_bytes)
        received_s = time.monotonic()
        model, version = start[1].decode(), (start[2] or b"").decode()
        access = self._api.access
        # the slow path verifies a new key, and answers what has none
        pipeline = access.open_pipeline or access.cached.get(headers.authorization)
        if pipeline is None or (served := pipeline.models.get(model)) is None:
            return None
        body = data[end + 4 : total_bytes]
        chunk_parts = self._read(self._api.wire(served), version, body, headers.json_bytes)
        if chunk_parts is None:
            return None
        plan, call, stream = chunk_parts
        timeout_s = headers.timeout_s
        if call.parameters.timeout_s is not None:
            timeout_s = min(timeout_s, call.parameters.timeout_s)
        request_id = headers.request_id or self._ids.next()
        try:
            error = pipeline.check_admission(model, StreamKey(model, stream), timeout_s)
            if plan.signature.has_state:
                pipeline.require(Verb.READ_STATE, model=model, stream=stream)
        except Forbidden:
            return None
        if error is not None:
            tracer = self._tracer
            span = None if tracer is None else tracer.start_request(propagated, received_s)
            return RejectedRequest(
                plan.wire,
                stream,
                error,
                Media.JSON,
                request_id,
                received_s,
                headers.length,
                total_bytes,
                span,
            )
        try:
            chunk = self._inference.read_chunk(call, stream)
        except CarryError:
            return None
        if self._tracer is not None:
            chunk = chunk._replace(span=self._tracer.start_request(propagated, received_s))
        deadline_s = received_s + timeout_s
        return FastInferRequest(
            pipeline,
            plan,
            call,
            chunk,
            request_id,
            received_s,
            deadline_s,
            headers.length,
            total_bytes,
        )

    def _read(
        self, wire: ModelWire, version: str, body: bytes, json_bytes: int
    ) -> tuple[_Plan, ResolvedCall, str] | None:
        """The chunk in a body, its values not yet validated, and its stream; or None."""
        text, data = body[:json_bytes], body[json_bytes:]
        try:
            decoded: _BinaryRequest = _DECODER.decode(text)
            by_default = decoded.parameters.get(BINARY_OUTPUT, False)
            if may_have_duplicates(text, decoded) or not isinstance(by_default, bool):
                return None
            decoded.parameters.pop(BINARY_OUTPUT, None)
            parameters = parse_parameters(decoded.parameters)
            [tensor] = decoded.inputs
            plan = self._plan(wire, version, tensor, decoded.outputs, by_default)
            if plan is None or len(data) != tensor.parameters.binary_data_size:
                return None
            values = read_values(InputTensor(tensor.name, tensor.datatype, tensor.shape, data))
        except (CarryError, msgspec.MsgspecError, ValueError, RecursionError):
            return None
        is_deleted = parameters.ends and self._inference.delete_at_end
        if parameters.stream is None or is_deleted or parameters.dry_run:
            return None
        request = InferRequest(wire.served.name, (), id=decoded.id)
        call = ResolvedCall(request, wire, parameters, plan.signature, values)
        return plan, call, parameters.stream

    def _make_plan(
        self,
        wire: ModelWire,
        version: str,
        tensor: _BinaryTensor,
        outputs: tuple[RequestedOutput, ...],
        by_default: bool,
    ) -> _Plan | None:
        """The plan of requests; None if the slow path reads them.

        Raises:
            CarryError: they are invalid; not returned, since returned values stay in the cache.
        """
        names = tuple([output.name for output in outputs])
        shape = tensor.name, tensor.datatype, tensor.shape
        signature = self._inference.chunk_signature(wire, version, shape, names)
        binary, layout = BinaryOutputs.of(outputs, by_default), wire.served.outputs
        is_binary = [binary.has(output.name) for output in signature.outputs]
        if not any(is_binary) or signature.steps * layout.size > LONG_VALUES:
            return None
        first = signature.outputs[0].output
        is_only = is_binary == [True] and first is not None and first.size == layout.size
        outputs_json = None
        if is_only and first is not None and first.per == "step" and wire.served.blocks is None:
            lead = () if signature.batch is None else (1,)
            values = np.zeros((*lead, signature.steps, *output_shape(first)), np.float32)
            reply = InferReply("", "", "", {}, [OutputTensor(first.name, values)])
            outputs_json = encode_json(reply_document(reply, binary)["outputs"])
        return _Plan(wire, signature, binary, outputs_json)

    def response(
        self, request: FastInferRequest, result: Reply | CarryError, *, closes: bool
    ) -> bytes:
        """The whole response; with `closes`, the connection is closed after it."""
        header_lines = CLOSE if closes else b""
        if isinstance(result, CarryError):
            return self.failure(request, request.plan.wire, result, Media.JSON, header_lines)
        body, json_bytes = self._encode(request, result)
        head = _RESPONSE_HEAD % (json_bytes, len(body), request.request_id, header_lines)
        response = head + body
        self.log(request, 200, response)
        return response

    def _encode(self, request: FastInferRequest, reply: Reply) -> tuple[bytes, int]:
        """The body of a reply, and the length of its JSON."""
        plan = request.plan
        if plan.outputs_json is None:
            return encode_reply(self._inference.reply_to_chunk(request.call, reply), plan.binary)
        epoch, tag, position = reply.head
        identity = request.call.request.id
        text = _REPLY % (
            plan.wire.served.name.encode(),
            b'"id":%b,' % encode_json(identity) if identity else b"",
            position,
            epoch.hex().encode(),
            tag.hex().encode(),
            b"true" if reply.replayed else b"false",
            b',"created":true' if reply.created else b"",
            plan.outputs_json,
        )
        return text + OutputTensor("", reply.outputs).data, len(text)


def _error_response(
    error: CarryError, media: Media, request_id: bytes, header_lines: bytes = b""
) -> bytes:
    with bound_contextvars(request_id=request_id.decode()):
        return response_bytes(error_answer(error), request_id, header_lines)


def _parse_headers(limits: ApiLimits, block: bytes) -> _Headers | None:
    """The headers in a block of lines, or None if they are for the slow path."""
    common = parse_common_headers(limits, block)
    if common is None:
        return None
    json_bytes = common.values.get(_HEADER_LENGTH, b"")
    if not json_bytes.isdigit() or len(json_bytes) > 9:
        return None
    return _Headers(
        common.length, common.authorization, int(json_bytes), common.request_id, common.timeout_s
    )
