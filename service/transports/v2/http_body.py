"""Bodies of V2 over HTTP: requests and replies of inference, and errors.

They are JSON, or JSON followed by tensors in the binary format. `Inference-Header-Content-Length`
is the length of the JSON, if tensors follow it. Their order is that of the inputs or outputs with
`binary_data_size`. An error is `{"error": "code: detail"}`, with the members of a problem document
beside it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from service.codec.decoding import decode, invalid
from service.codec.media import Media, encode_json
from service.core.errors import BodyTooLarge, CarryError, MalformedBody
from service.transports.v1.problems import problem, problem_headers
from service.transports.v1.replies import Answer, Header
from service.transports.v2.parameters import (
    InferParameters,
    Parameter,
    decode_parameters,
    parse_parameters,
)
from service.transports.v2.replies import InferReply, OutputTensor
from service.transports.v2.request import InferRequest, RequestedOutput
from service.transports.v2.tensors import InputTensor, Shape

HEADER_LENGTH: Final = "inference-header-content-length"

COMPRESSIONS: Final = {"gzip": 31, "deflate": 15}
"""The arguments of zlib by Content-Encoding."""

_ID_AT_START: Final = re.compile(rb'\{"id": ?"([ !#-\[\]-~]*)(?=")').match
"""An id without escapes, where clients send it."""

_CUT_DATA: Final = b"[\0]"
"""Replaces the values of a tensor that are cut; no valid JSON contains it."""

_FEW: Final = Meta(max_length=256)
"""Bounds the lists of tensors and parameters."""


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Base of a request's objects."""


class _InputParameters(_Body, frozen=True):
    binary_data_size: Annotated[int, Meta(ge=0)] | None = None


class _OutputParameters(_Body, frozen=True):
    binary_data: bool | None = None


class _Input(_Body, frozen=True):
    name: str
    datatype: str
    shape: Shape
    parameters: _InputParameters | None = None
    data: list[Any] | None = None


class _Output(_Body, frozen=True):
    name: str
    parameters: _OutputParameters | None = None


class _Request(_Body, frozen=True):
    inputs: Annotated[list[_Input], _FEW]
    outputs: Annotated[list[_Output], _FEW] = []
    id: str = ""
    parameters: Annotated[dict[str, Parameter], _FEW] = {}


MAX_CUT_BYTES: Final = 4096
"""Longer parameters are not cut, since a hostile number in them may take msgspec 70 us; longer JSON
is not kept as a key."""


def decompress(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """Decompress a body; takes a few milliseconds for each MiB, so call it in a thread.

    Args:
        encoding: `gzip` or `deflate`.

    Raises:
        BodyTooLarge: more than the limit comes out.
        MalformedBody: it is damaged, truncated or followed by other bytes.
    """
    stream = zlib.decompressobj(COMPRESSIONS[encoding])
    try:
        content = stream.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise _malformed(f"{encoding}: {error}") from error
    if len(content) > limit_bytes:
        raise BodyTooLarge(
            f"body: expected at most {limit_bytes} bytes after decompression, got more",
            expected=limit_bytes,
            got="more",
        )
    if not stream.eof or stream.unused_data:
        got = "bytes after its end" if stream.eof else "the beginning of it"
        raise _malformed(f"{encoding}: expected one compressed body, got {got}")
    return content


def decode_request(body: bytes, json_bytes: int | None, model: str, version: str) -> InferRequest:
    """Decode a body.

    Args:
        json_bytes: length of its JSON; None if all of it is JSON.

    Raises:
        MalformedBody, InvalidInput, InvalidName
    """
    if json_bytes is not None and json_bytes > len(body):
        expected = f"at most {len(body)}, the length of the body"
        raise invalid("Inference-Header-Content-Length", expected, json_bytes)
    begin = len(body) if json_bytes is None else json_bytes
    decoded = decode(Media.JSON, body[:begin], _Request)
    end = begin
    inputs: list[InputTensor] = []
    for index, each in enumerate(decoded.inputs):
        size = each.parameters.binary_data_size if each.parameters else None
        data: bytes | list[Any] | None = each.data
        if (size is None) == (data is None):
            got = "none" if size is None else "both"
            expected = "either data or parameters.binary_data_size"
            raise invalid(f"inputs[{index}]", expected, got)
        if size is not None:
            data = body[end : end + size]
            end += size
        inputs.append(InputTensor(each.name, each.datatype, each.shape, data or []))
    if end != len(body):
        expected = f"{end - begin} bytes after the JSON, all the binary_data_size together"
        raise invalid("body", expected, len(body) - begin)
    parameters = parse_parameters(decoded.parameters)
    outputs = []
    for output in decoded.outputs:
        binary = None if output.parameters is None else output.parameters.binary_data
        is_binary = parameters.binary_by_default if binary is None else binary
        outputs.append(RequestedOutput(output.name, is_binary))
    return InferRequest(model, inputs, parameters, tuple(outputs), version, decoded.id)


class CutRequest(msgspec.Struct, frozen=True, gc=False):
    """The JSON of a request of a sequence, cut at its id, its parameters and the values of its
    tensor: the rest is the same in all requests of most clients, so that it need not be decoded
    again.

    Attributes:
        before: what precedes the parameters; without the beginning up to the id, if that is first.
        after: what follows the parameters.
        data: the values, a list in JSON; None if they are in the binary format.
    """

    before: bytes
    after: bytes
    id: str
    parameters: InferParameters
    data: bytes | None

    def is_correct(self) -> bool:
        """Whether a short, valid request is cut at its id, its parameters and its first values.

        It is if other values there become the id, the parameters and the first values: up to a cut
        the parser of JSON has read the same, so that any value there has the same effect.
        """
        if len(self.before) + len(self.after) > MAX_CUT_BYTES:
            return False
        has_id = not self.before.startswith(b"{")
        for number in (1, 2):
            lead = b'{"id":"%d' % number if has_id else b""
            text = b'%b%b{"sequence_id":%d}%b' % (lead, self.before, number, self.after)
            try:
                text = text.replace(_CUT_DATA, b"[%d]" % number)
                decoded = decode(Media.JSON, text, _Request)
            except CarryError:
                return False
            request_id = str(number) if has_id else ""
            if decoded.id != request_id or decoded.parameters != {"sequence_id": number}:
                return False
            if self.data is not None and decoded.inputs[0].data != [number]:
                return False
        return True


def cut_request(text: bytes, *, is_all: bool) -> CutRequest | None:
    """Cut the JSON of a request; None if its parameters are unusual or invalid. The cuts may be
    wrong. Values other than numbers are not cut.

    Args:
        is_all: whether no tensors in the binary format follow it.
    """
    data = None
    if is_all:
        # lists of numbers, up to the next member or the end of the tensor
        named = text.find(b'"data"')
        opening, brace = text.find(b"[", named), text.find(b"}", named)
        quote = text.find(b'"', opening, brace)
        closing = text.rfind(b"]", opening, brace if quote < 0 else quote)
        if named >= 0 and opening >= 0 and closing >= 0:
            data = text[opening : closing + 1]
            text = b"%b%b%b" % (text[:opening], _CUT_DATA, text[closing + 1 :])
    start = _ID_AT_START(text)
    begin = 0 if start is None else start.end()
    named = text.find(b'"sequence_id"', begin)
    first, end = text.rfind(b"{", begin, named), text.find(b"}", named) + 1
    if named < 0 or first < 0 or not 0 < end - first <= MAX_CUT_BYTES:
        return None
    if (parameters := decode_parameters(text[first:end])) is None:
        return None
    request_id = "" if start is None else start[1].decode()
    return CutRequest(text[begin:first], text[end:], request_id, parameters, data)


def reply_document(reply: InferReply) -> dict[str, Any]:
    """The JSON of a reply, with the values of the outputs that are not binary as NumPy arrays."""
    document: dict[str, Any] = {"model_name": reply.model, "model_version": reply.version}
    if reply.id:
        document["id"] = reply.id
    if reply.parameters:
        document["parameters"] = reply.parameters
    document["outputs"] = [output_document(output) for output in reply.outputs]
    return document


def output_document(output: OutputTensor) -> dict[str, Any]:
    """The JSON of an output."""
    name, values, is_binary = output
    document = {"name": name, "datatype": output.datatype, "shape": list(values.shape)}
    if is_binary:
        return {**document, "parameters": {"binary_data_size": values.nbytes}}
    return {**document, "data": values.ravel()}


def encode_reply(reply: InferReply) -> tuple[bytes, int]:
    """The body of a reply with binary outputs, and the length of its JSON."""
    text = encode_json(reply_document(reply))
    data = [output.data for output in reply.outputs if output.is_binary]
    return b"".join((text, *data)), len(text)


def error_answer(error: CarryError) -> Answer:
    """The response to a request that failed; its status and headers are those of the HTTP API, and
    `Carry-Error` has the code alone."""
    document = problem(error)
    content = {"error": f"{error.code}: {error.detail}", **document}
    headers = [(b"carry-error", error.code.encode()), *problem_headers(error, document)]
    return json_answer(content, document["status"], headers)


def json_answer(document: Any, status: int = 200, headers: Iterable[Header] = ()) -> Answer:
    """A response with a document in JSON."""
    return Answer(encode_json(document), (b"content-type", b"application/json"), status, headers)


def _malformed(reason: str) -> MalformedBody:
    return MalformedBody(f"body: {reason}", at="body", got=reason)
