"""Fast path for chunks by V2 with binary tensors: parsed from the socket buffer, no ASGI scope.

As the fast path of the HTTP API, it accepts a strict subset: a complete request for one short chunk
of a sequence, its JSON before the tensor, valid. Anything else is None, and the slow path reads it
from its first byte and makes the errors. Responses have the same bytes as the slow path's.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec
import numpy as np
from structlog.contextvars import bound_contextvars

from service.access.caller import Verb
from service.codec.media import Media, encode_json
from service.codec.pieces import LONG_VALUES
from service.core.errors import CarryError
from service.core.values import Reply, StreamKey
from service.telemetry.logs import RequestIds
from service.transports.v1.context import ModelCodec
from service.transports.v1.fast_path import FastChunkRoute, FastRequest
from service.transports.v1.problems import response_bytes
from service.transports.v2.http_body import (
    HEADER_LENGTH,
    Body,
    Dimension,
    InputParameters,
    RequestedOutput,
    binary_outputs,
    encode_reply,
    error_answer,
    reply_document,
)
from service.transports.v2.inference import (
    VERSION,
    InferCall,
    Inference,
    InferReply,
    read_chunk,
    reply_to_chunk,
)
from service.transports.v2.request import (
    BinaryOutputs,
    Parameter,
    Signature,
    output_shape,
    parse_parameters,
)
from service.transports.v2.tensors import InputTensor, OutputTensor

ROUTE: Final = "/v2/models/{model}/infer"

MAX_JSON_BYTES: Final = 4096
"""Longer JSON takes the slow path: msgspec may take 15 us for a hostile number."""

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


class _BinaryTensor(Body, frozen=True):
    name: str
    datatype: str
    shape: tuple[Dimension, ...]
    parameters: InputParameters


class _BinaryRequest(Body, frozen=True):
    """The JSON of a request with one binary tensor."""

    inputs: tuple[_BinaryTensor]
    outputs: tuple[RequestedOutput, ...] = ()
    id: str = ""
    parameters: dict[str, Parameter] = msgspec.field(default_factory=dict)


_DECODER: Final = msgspec.json.Decoder(_BinaryRequest)


class _Plan(NamedTuple):
    """What requests with the same model, tensor and outputs share.

    Attributes:
        binary: which outputs are binary; at least one is.
        outputs_json: the outputs in the reply's JSON, if there is one, binary, with the same shape
            in every reply; else None.
    """

    codec: ModelCodec
    signature: Signature
    binary: BinaryOutputs
    outputs_json: bytes | None


class FastInferPath(FastChunkRoute):
    """Parses and answers the requests of one application.

    The details of a request are its plan and its id.
    """

    def __init__(self, inference: Inference, ids: RequestIds):
        super().__init__(
            inference.api, ids, ROUTE, _REQUEST_LINE, _read_json_length, _error_response
        )
        self._inference = inference
        # cached, since clients repeat their shapes
        self._plan = lru_cache(maxsize=1024)(self._make_plan)

    def _read(self, request: FastRequest, line: re.Match[bytes], details: int, body: bytes) -> bool:
        if details > MAX_JSON_BYTES:
            return False
        try:
            version = (line[2] or b"").decode()
            return self._read_chunk(request, version, body[:details], body[details:])
        except (CarryError, msgspec.MsgspecError, ValueError, RecursionError):
            return False

    def _read_chunk(self, request: FastRequest, version: str, text: bytes, data: bytes) -> bool:
        decoded: _BinaryRequest = _DECODER.decode(text)
        parameters, [tensor] = parse_parameters(decoded.parameters), decoded.inputs
        codec, caller, stream = request.codec, request.caller, parameters.stream
        by_default = parameters.binary_by_default
        plan = self._plan(codec, version, tensor, decoded.outputs, by_default)
        if plan is None or len(data) != tensor.parameters.binary_data_size:
            return False
        if stream is None or parameters.dry_run or self._inference.deletes(parameters):
            return False
        request.stream, request.details, model = stream, (plan, decoded.id), codec.served.name
        left_s = request.deadline_s - request.received_s
        if parameters.timeout_us:
            left_s = min(left_s, parameters.timeout_us / 1e6)
            request.deadline_s = request.received_s + left_s
        key = StreamKey(model, stream)
        request.rejection = self._pipeline.check_admission(caller, model, key, left_s)
        if plan.signature.has_state:
            self._pipeline.model(caller, (Verb.READ_STATE,), model, stream)
        if request.rejection is None:
            values = InputTensor(tensor.name, tensor.datatype, tensor.shape, data)
            request.chunk = read_chunk(codec, parameters, stream, values, None)
        return True

    def _make_plan(
        self,
        codec: ModelCodec,
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
        signature = self._inference.chunk_signature(codec, version, shape, names)
        binary, layout = binary_outputs(outputs, by_default), codec.served.outputs
        is_binary = [binary.has(output.name) for output in signature.outputs]
        if not any(is_binary) or signature.steps * layout.size > LONG_VALUES[Media.JSON]:
            return None
        first = signature.outputs[0].output
        is_only = is_binary == [True] and first is not None and first.size == layout.size
        outputs_json = None
        if is_only and first is not None and first.per == "step" and codec.served.blocks is None:
            lead = () if signature.batch is None else (1,)
            values = np.zeros((*lead, signature.steps, *output_shape(first)), np.float32)
            reply = InferReply("", "", "", {}, [OutputTensor(first.name, values)], binary)
            outputs_json = encode_json(reply_document(reply)["outputs"])
        return _Plan(codec, signature, binary, outputs_json)

    def _response(self, request: FastRequest, reply: Reply, header_lines: bytes) -> bytes:
        body, json_bytes = self._encode(request, reply)
        head = _RESPONSE_HEAD % (json_bytes, len(body), request.request_id, header_lines)
        return head + body

    def _encode(self, request: FastRequest, reply: Reply) -> tuple[bytes, int]:
        """The body of a reply, and the length of its JSON."""
        plan: _Plan
        identity: str
        plan, identity = request.details
        if plan.outputs_json is None:
            call = InferCall(plan.codec, identity, plan.signature, plan.binary)
            return encode_reply(reply_to_chunk(call, reply))
        head = reply.head
        text = _REPLY % (
            plan.codec.served.name.encode(),
            b'"id":%b,' % encode_json(identity) if identity else b"",
            head.position,
            head.epoch.hex().encode(),
            head.tag.hex().encode(),
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


def _read_json_length(values: dict[bytes, bytes]) -> int | None:
    """The length of the JSON in a body; None leaves the request to the slow path."""
    json_bytes = values.get(_HEADER_LENGTH, b"")
    return int(json_bytes) if json_bytes.isdigit() and len(json_bytes) <= 9 else None
