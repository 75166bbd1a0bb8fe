"""Fast path for chunks by V2 over HTTP: parsed from the socket buffer, no ASGI scope.

As the fast path of the HTTP API, it accepts a strict subset: a complete, valid request for one
short chunk of a sequence. Anything else is None, and the slow path reads it from its first byte and
makes the errors. Responses have the same bytes as the slow path's.
"""

from __future__ import annotations

import re
from binascii import hexlify
from collections.abc import Hashable
from typing import Final

from msgspec.structs import replace
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
from service.transports.v2.inference import Inference, is_of_rows
from service.transports.v2.parameters import InferParameters
from service.transports.v2.replies import VERSION, binary_values, constant_output, reply_to_chunk
from service.transports.v2.request import InferCall, Signature

ROUTE: Final = "/v2/models/{model}/infer"

CACHED_SIGNATURES: Final = 1024
"""Most signatures whose outputs in JSON are cached, since clients repeat them."""

_REQUEST_LINE = re.compile(
    rb"POST /v2/models/([a-z0-9_-]{1,64})(?:/versions/([0-9a-f]{1,12}))?/infer HTTP/1\.1\r\n"
)
_HEADER_LENGTH: Final = HEADER_LENGTH.encode()
_REPLY: Final = (
    b'{"model_name":"%b","model_version":"%b",%%b"parameters":{"position":%%d,"epoch":"%%b",'
    b'"tag":"%%b","replayed":%%b%%b},"outputs":%b}'
)
_BINARY_RESPONSE: Final = (
    b"HTTP/1.1 200 OK\r\n"
    b"inference-header-content-length: %d\r\ncontent-length: %d\r\n"
    b"content-type: application/octet-stream\r\nx-request-id: %b\r\n%b\r\n%b"
)
_JSON_RESPONSE: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n"
    b"content-type: application/json\r\nx-request-id: %b\r\n%b\r\n%b"
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
        self._templates = Memo(_reply_template, CACHED_SIGNATURES)
        inference.on_switch(self._signatures.clear)
        inference.on_switch(self._templates.clear)

    def _read(self, request: FastRequest, line: re.Match[bytes], details: int, body: bytes) -> bool:
        cut = cut_request(body[:details], is_all=details == len(body))
        try:
            if cut is None or (key := self._admit(request, cut.parameters)) is None:
                return request.rejection is not None
            by_default = cut.parameters.binary_by_default
            shape = request.codec, line[2], cut.before, cut.after, by_default
            signature = self._signatures.get(shape)
            version = line[2]
            if version and self._inference.depends_on_stream(key.model, version.decode()):
                signature = None
            if signature is None:
                call = self._read_whole(request, cut, line[2], details, body)
                if call is not None and self._can_repeat(call, cut, len(body) - details):
                    if len(self._signatures) >= CACHED_SIGNATURES:
                        self._signatures.clear()
                    self._signatures[shape] = call.signature
            else:
                values = body[details:] if cut.data is None else cut.data
                call = self._inference.read_rows(
                    signature,
                    cut.id,
                    key,
                    cut.parameters,
                    values,
                    request.deadline_s,
                    is_json=cut.data is not None,
                )
        except CarryError:
            return False
        if call is None or not isinstance(call.work, Chunk):
            return False
        request.chunk, request.details = call.work, call
        return True

    def _read_whole(
        self,
        request: FastRequest,
        cut: CutRequest,
        version: bytes | None,
        json_bytes: int,
        body: bytes,
    ) -> InferCall | None:
        """Read a request of any shape; None if its reply is long, or it was cut at other parameters
        than its own."""
        served = request.codec.served
        decoded = decode_request(body, json_bytes, served.name, (version or b"").decode())
        admitted = replace(cut.parameters, sequence_id=cut.parameters.stream)
        if decoded.parameters != admitted:
            return None
        call = self._inference.read(request.caller, decoded, request.deadline_s)
        is_long = call.signature.steps * served.outputs.size > LONG_VALUES
        return None if is_long else call

    @staticmethod
    def _can_repeat(call: InferCall, cut: CutRequest, data_bytes: int) -> bool:
        """Whether requests that differ where this one is cut need not be decoded as a whole."""
        # the cuts last: to verify them takes as long as to decode the request twice
        return is_of_rows(call, None if cut.data else data_bytes) and cut.is_correct()

    def _admit(self, request: FastRequest, parameters: InferParameters) -> StreamKey | None:
        """Set the stream and the deadline of a request; returns the key of its stream. None if it
        is rejected, or left to the slow path."""
        stream = parameters.stream
        deletes = parameters.ends and self._inference.delete_at_end
        if stream is None or parameters.dry_run or deletes:
            return None
        left_s = request.deadline_s - request.received_s
        if parameters.timeout_us:
            left_s = min(left_s, parameters.timeout_us / 1e6)
            request.deadline_s = request.received_s + left_s
        request.stream, model = stream, request.codec.served.name
        key = StreamKey(model, stream)
        request.rejection = self._pipeline.check_admission(request.caller, model, key, left_s)
        return key if request.rejection is None else None

    def _response(self, request: FastRequest, reply: Reply, header_lines: bytes) -> bytes:
        call: InferCall = request.details
        template, head = self._templates[call.signature], reply.head
        has_binary = call.signature.has_binary
        is_other = reply.version not in (call.signature.codec.served, None)
        if template is None or is_other or reply.warm is not None:
            body, json_bytes = encode_reply(reply_to_chunk(call, reply))
        else:
            text = template % (
                b'"id":%b,' % encode_json(call.id) if call.id else b"",
                head.position,
                hexlify(head.epoch),
                hexlify(head.tag),
                b"true" if reply.replayed else b"false",
                b',"created":true' if reply.created else b"",
            )
            if has_binary:
                body, json_bytes = text + binary_values(reply.outputs), len(text)
            else:
                body = b"%b%b}]}" % (text, encode_json(reply.outputs.ravel()))
        end = len(body), request.request_id, header_lines, body
        return _BINARY_RESPONSE % (json_bytes, *end) if has_binary else _JSON_RESPONSE % end


def _reply_template(signature: Signature) -> bytes | None:
    """The JSON of a reply up to the values of its output, to be formatted, if it has one output,
    with the same shape in every reply; else None."""
    output = constant_output(signature)
    if output is None:
        return None
    outputs = encode_json([output_document(output)])
    constants = (signature.codec.served.name.encode(), VERSION.encode(), outputs)
    template = _REPLY % tuple([each.replace(b"%", b"%%") for each in constants])
    return template if output.is_binary else template[: template.rindex(b"[")]


def _error_response(
    error: CarryError, media: Media, request_id: bytes, header_lines: bytes = b""
) -> bytes:
    with bound_contextvars(request_id=request_id.decode()):
        return response_bytes(error_answer(error), request_id, header_lines)


def _read_json_length(values: dict[bytes, bytes]) -> int | None:
    """The length of the JSON in a body, without a header all of it; None leaves the request to the
    slow path."""
    json_bytes = values.get(_HEADER_LENGTH, values[b"content-length"])
    return int(json_bytes) if json_bytes.isdigit() and len(json_bytes) <= 9 else None
