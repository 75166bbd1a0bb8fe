"""Fast path for chunks by V2 with binary tensors: parsed from the socket buffer, no ASGI scope.

As the fast path of the HTTP API, it accepts a strict subset: a complete, valid request for one
short chunk of a sequence, tensors after its JSON, and binary outputs. Anything else is None, and
the slow path reads it from its first byte and makes the errors. Responses have the same bytes as
the slow path's.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np
from structlog.contextvars import bound_contextvars

from service.codec.media import Media, encode_json
from service.codec.pieces import LONG_VALUES
from service.core.errors import CarryError
from service.core.memo import Memo
from service.core.values import Chunk, Reply, StreamKey
from service.telemetry.logs import RequestIds
from service.transports.v1.fast_path import FastChunkRoute, FastRequest
from service.transports.v1.problems import response_bytes
from service.transports.v2.http_body import (
    HEADER_LENGTH,
    decode_request,
    encode_reply,
    error_answer,
    output_document,
)
from service.transports.v2.inference import VERSION, InferCall, Inference, reply_to_chunk
from service.transports.v2.request import Signature, output_shape
from service.transports.v2.tensors import OutputTensor

ROUTE: Final = "/v2/models/{model}/infer"

CACHED_SIGNATURES: Final = 1024
"""Most signatures whose outputs in JSON are cached, since clients repeat them."""

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


class FastInferPath(FastChunkRoute):
    """Parses and answers requests of one application; the `details` of one are its `InferCall`."""

    def __init__(self, inference: Inference, ids: RequestIds):
        super().__init__(
            inference.api, ids, ROUTE, _REQUEST_LINE, _read_json_length, _error_response
        )
        self._inference = inference
        self._outputs_json = Memo(_constant_outputs, CACHED_SIGNATURES)

    def _read(self, request: FastRequest, line: re.Match[bytes], details: int, body: bytes) -> bool:
        caller, model = request.caller, request.codec.served.name
        version = "" if line[2] is None else line[2].decode()
        try:
            decoded = decode_request(body, details, model, version)
            parameters, stream = decoded.parameters, decoded.parameters.stream
            if stream is None or parameters.dry_run:
                return False
            request.stream = stream
            left_s = request.deadline_s - request.received_s
            if parameters.timeout_us:
                left_s = min(left_s, parameters.timeout_us / 1e6)
            key = StreamKey(model, stream)
            request.rejection = self._pipeline.check_admission(caller, model, key, left_s)
            if request.rejection is not None:
                return True
            call = self._inference.read(caller, decoded, request.received_s + left_s)
        except CarryError:
            return False
        signature, chunk = call.signature, call.work
        if call.deletes or not signature.has_binary or not isinstance(chunk, Chunk):
            return False
        request.chunk, request.deadline_s, request.details = chunk, call.deadline_s, call
        size = request.codec.served.outputs.size
        return signature.steps * size <= LONG_VALUES[Media.JSON]

    def _response(self, request: FastRequest, reply: Reply, header_lines: bytes) -> bytes:
        body, json_bytes = self._encode(request.details, reply)
        head = _RESPONSE_HEAD % (json_bytes, len(body), request.request_id, header_lines)
        return head + body

    def _encode(self, call: InferCall, reply: Reply) -> tuple[bytes, int]:
        """The body of a reply, and the length of its JSON."""
        outputs_json = self._outputs_json[call.signature]
        if outputs_json is None:
            return encode_reply(reply_to_chunk(call, reply))
        head = reply.head
        text = _REPLY % (
            call.signature.codec.served.name.encode(),
            b'"id":%b,' % encode_json(call.id) if call.id else b"",
            head.position,
            head.epoch.hex().encode(),
            head.tag.hex().encode(),
            b"true" if reply.replayed else b"false",
            b',"created":true' if reply.created else b"",
            outputs_json,
        )
        return text + OutputTensor("", reply.outputs).data, len(text)


def _constant_outputs(signature: Signature) -> bytes | None:
    """The outputs in the reply's JSON, if there is one, binary, with the same shape in every reply;
    else None."""
    served, [selected, *others] = signature.codec.served, signature.outputs
    output = selected.output
    if others or output is None or output.size != served.outputs.size:
        return None
    if output.per != "step" or served.blocks is not None:
        return None
    lead = () if signature.batch is None else (1,)
    values = np.zeros((*lead, signature.steps, *output_shape(output)), np.float32)
    return encode_json([output_document(OutputTensor(output.name, values))])


def _error_response(
    error: CarryError, media: Media, request_id: bytes, header_lines: bytes = b""
) -> bytes:
    with bound_contextvars(request_id=request_id.decode()):
        return response_bytes(error_answer(error), request_id, header_lines)


def _read_json_length(values: dict[bytes, bytes]) -> int | None:
    """The length of the JSON in a body; None leaves the request to the slow path."""
    json_bytes = values.get(_HEADER_LENGTH, b"")
    return int(json_bytes) if json_bytes.isdigit() and len(json_bytes) <= 9 else None
