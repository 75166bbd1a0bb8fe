"""Fast path for chunks by V2 with binary tensors: parsed from the socket buffer, no ASGI scope.

As the fast path of the HTTP API, it accepts a strict subset: a complete, valid request for one
short chunk of a sequence, tensors after its JSON, and binary outputs. Anything else is None, and
the slow path reads it from its first byte and makes the errors. Responses have the same bytes as
the slow path's.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
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
    CutRequest,
    cut_request,
    decode_request,
    encode_reply,
    error_answer,
    output_document,
)
from service.transports.v2.inference import VERSION, InferCall, Inference, reply_to_chunk
from service.transports.v2.request import (
    InferOptions,
    Signature,
    output_shape,
)
from service.transports.v2.tensors import OutputTensor, binary_values

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
    """Parses and answers requests of one application; the `details` of one are its `InferCall`.

    The first request of a shape is decoded as a whole, the next ones only where they differ.
    """

    def __init__(self, inference: Inference, ids: RequestIds):
        super().__init__(
            inference.api, ids, ROUTE, _REQUEST_LINE, _read_json_length, _error_response
        )
        self._inference = inference
        self._signatures: dict[Hashable, Signature] = {}
        self._outputs_json = Memo(_constant_outputs, CACHED_SIGNATURES)

    def _read(self, request: FastRequest, line: re.Match[bytes], details: int, body: bytes) -> bool:
        try:
            cut = cut_request(body[:details])
            if cut is None or cut.options.false_alarms_per_day is not None:
                return self._read_whole(request, line, details, body)
            shape = request.codec, line[2], cut.before, cut.after, cut.options.binary_by_default
            signature = self._signatures.get(shape)
            if signature is not None:
                return self._read_rows(request, cut, signature, body[details:])
            is_read = self._read_whole(request, line, details, body)
        except CarryError:
            return False
        if request.chunk is not None and cut.is_correct():
            self._learn(shape, request, len(body) - details)
        return is_read

    def _read_rows(
        self, request: FastRequest, cut: CutRequest, signature: Signature, rows: bytes
    ) -> bool:
        """Read a request of a known shape."""
        reader, options = request.codec.reader, cut.options
        if len(rows) != _rows_bytes(signature) or not self._admit(request, cut.stream, options):
            return False
        if request.rejection is None:
            request.chunk = chunk = reader.build_chunk(
                options.position,
                options.epoch,
                reader.steps.packed_rows(rows, "", reader.limits.chunk),
                reader.key(cut.stream),
                None,
                starts_over=options.starts_over,
            )
            request.details = InferCall(signature, cut.id, chunk, request.deadline_s, False)
        return True

    def _read_whole(
        self, request: FastRequest, line: re.Match[bytes], json_bytes: int, body: bytes
    ) -> bool:
        """Read a request of any shape."""
        served, version = request.codec.served, "" if line[2] is None else line[2].decode()
        decoded = decode_request(body, json_bytes, served.name, version)
        parameters = decoded.parameters
        if not self._admit(request, parameters.stream, parameters):
            return False
        if request.rejection is not None:
            return True
        call = self._inference.read(request.caller, decoded, request.deadline_s)
        signature, chunk = call.signature, call.work
        if not signature.has_binary or not isinstance(chunk, Chunk):
            return False
        if signature.steps * served.outputs.size > LONG_VALUES[Media.JSON]:
            return False
        request.chunk, request.details = chunk, call
        return True

    def _admit(self, request: FastRequest, stream: str | None, options: InferOptions) -> bool:
        """Set the stream, the deadline and perhaps the rejection of a request; False leaves it to
        the slow path."""
        deletes = options.ends and self._inference.delete_at_end
        if stream is None or options.dry_run or deletes:
            return False
        left_s = request.deadline_s - request.received_s
        if options.timeout_us:
            left_s = min(left_s, options.timeout_us / 1e6)
            request.deadline_s = request.received_s + left_s
        request.stream, model = stream, request.codec.served.name
        request.rejection = self._pipeline.check_admission(
            request.caller, model, StreamKey(model, stream), left_s
        )
        return True

    def _learn(self, shape: Hashable, request: FastRequest, data_bytes: int) -> None:
        """Cache the signature of a request's shape, if its rows are all of it."""
        signature, chunk = request.details.signature, request.chunk
        if (
            chunk is not None
            and chunk.steps.rows is not None
            and not chunk.steps.resets
            and data_bytes == _rows_bytes(signature)
            and request.codec.served.blocks is None
            and not signature.has_state
        ):
            if len(self._signatures) >= CACHED_SIGNATURES:
                self._signatures.clear()
            self._signatures[shape] = signature

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
        return text + binary_values(reply.outputs), len(text)


def _rows_bytes(signature: Signature) -> int:
    """The length of the rows of a chunk in the binary format."""
    return 4 * signature.steps * signature.codec.served.input_features


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
