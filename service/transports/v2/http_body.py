"""Bodies of V2 inference over HTTP: JSON, and JSON followed by tensors in the binary format.

`Inference-Header-Content-Length` is the length of the JSON, if tensors follow it. Their order is
that of the inputs or outputs with `binary_data_size`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from service.codec.decoding import decode, invalid
from service.codec.media import Media, encode_json
from service.core.errors import BodyTooLarge, MalformedBody
from service.transports.v2.values import (
    MAX_RANK,
    InferReply,
    InferRequest,
    InputTensor,
    Parameter,
)

HEADER_LENGTH: Final = "inference-header-content-length"
BINARY_OUTPUT: Final = "binary_data_output"

COMPRESSIONS: Final = {"gzip": 31, "deflate": 15}
"""The arguments of zlib by Content-Encoding."""

_FEW: Final = Meta(max_length=256)
"""Bounds the lists of tensors and parameters."""

Dimension = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class InputParameters(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    """The parameters of a request's tensor."""

    binary_data_size: Annotated[int, Meta(ge=0)] | None = None


class _OutputParameters(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    binary_data: bool | None = None


class _Input(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    name: str
    datatype: str
    shape: Annotated[tuple[Dimension, ...], Meta(max_length=MAX_RANK)]
    parameters: InputParameters | None = None
    data: list[Any] | None = None


class RequestedOutput(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    """An output that a request names."""

    name: str
    parameters: _OutputParameters | None = None


class _Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    inputs: Annotated[list[_Input], _FEW]
    outputs: Annotated[list[RequestedOutput], _FEW] = []
    id: str = ""
    parameters: Annotated[dict[str, bool | int | float | str], _FEW] = {}


class BinaryOutputs(NamedTuple):
    """Which outputs a client wants in the binary format."""

    by_name: Mapping[str, bool]
    by_default: bool = False

    @classmethod
    def of(cls, outputs: Iterable[RequestedOutput], by_default: bool) -> BinaryOutputs:
        """What the outputs that a request names say, and its parameter."""
        by_name = {
            output.name: output.parameters.binary_data
            for output in outputs
            if output.parameters is not None and output.parameters.binary_data is not None
        }
        return cls(by_name, by_default)

    def has(self, name: str) -> bool:
        """Whether it wants this one so."""
        return self.by_name.get(name, self.by_default)

    def has_any(self, names: Iterable[str]) -> bool:
        """Whether it wants any of these so."""
        return any(map(self.has, names)) if self.by_name else self.by_default


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


def decode_request(
    body: bytes, json_bytes: int | None, model: str, version: str
) -> tuple[InferRequest, BinaryOutputs]:
    """Decode a body.

    Args:
        json_bytes: length of its JSON; None if all of it is JSON.

    Raises:
        MalformedBody, InvalidInput, BodyTooLarge
    """
    if json_bytes is not None and json_bytes > len(body):
        expected = f"at most {len(body)}, the length of the body"
        raise invalid("Inference-Header-Content-Length", expected, json_bytes)
    text = body if json_bytes is None else body[:json_bytes]
    decoded = decode(Media.JSON, text, _Request)
    begin, binary_bytes = len(text), len(body) - len(text)
    inputs: list[InputTensor] = []
    used = 0
    for index, each in enumerate(decoded.inputs):
        at = f"inputs[{index}]"
        size = each.parameters.binary_data_size if each.parameters else None
        data: bytes | list[Any] | None = each.data
        if (size is None) == (data is None):
            got = "none" if size is None else "both"
            raise invalid(at, "either data or parameters.binary_data_size", got)
        if size is not None:
            data = body[begin + used : begin + used + size]
            used += size
        inputs.append(InputTensor(each.name, each.datatype, each.shape, data or []))
    if used != binary_bytes:
        expected = f"{used} bytes after the JSON, all the binary_data_size together"
        raise invalid("body", expected, binary_bytes)
    parameters: dict[str, Parameter] = decoded.parameters
    by_default = parameters.pop(BINARY_OUTPUT, False)
    if not isinstance(by_default, bool):
        raise invalid(f"parameters.{BINARY_OUTPUT}", "true or false", repr(by_default)[:300])
    names = [output.name for output in decoded.outputs]
    request = InferRequest(model, inputs, parameters, names, version, decoded.id)
    return request, BinaryOutputs.of(decoded.outputs, by_default)


def reply_document(reply: InferReply, binary: BinaryOutputs) -> dict[str, Any]:
    """The JSON of a reply, with the values of the outputs that are not binary as NumPy arrays."""
    document: dict[str, Any] = {"model_name": reply.model, "model_version": reply.version}
    if reply.id:
        document["id"] = reply.id
    if reply.parameters:
        document["parameters"] = reply.parameters
    outputs: list[dict[str, Any]] = []
    for tensor in reply.outputs:
        name, values = tensor
        output: dict[str, Any] = {
            "name": name,
            "datatype": tensor.datatype,
            "shape": list(values.shape),
        }
        if binary.has(name):
            output["parameters"] = {"binary_data_size": values.nbytes}
        else:
            output["data"] = values.ravel()
        outputs.append(output)
    document["outputs"] = outputs
    return document


def encode_reply(reply: InferReply, binary: BinaryOutputs) -> tuple[bytes, int]:
    """The body of a reply with binary outputs, and the length of its JSON."""
    text = encode_json(reply_document(reply, binary))
    return b"".join((text, *[o.data for o in reply.outputs if binary.has(o.name)])), len(text)


def _malformed(reason: str) -> MalformedBody:
    return MalformedBody(f"body: {reason}", at="body", got=reason)
