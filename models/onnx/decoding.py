"""Decoder of the protobuf messages of ONNX files, as far as imported graphs have to be inspected.

It walks the messages in which tensors and nodes can be (by onnx.proto of ONNX 1.18), at any depth,
and copies no weights. ONNX Runtime reads the file itself; this module reports what it does not
report before it runs anything: a graph's operators, and whether a tensor refers to another file.
The library `onnx` is not used, so that an installation that only serves can check its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from models.errors import ArtifactError
from models.onnx.messages import encode_bytes

Field = tuple[int, "int | memoryview", memoryview]
"""Number, value (an integer, or the bytes of a string or message), and the whole field encoded."""

MAX_DEPTH: Final = 64
"""Deepest nesting of messages: each subgraph of a node is three levels."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 9, 13, 14

_MESSAGES: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
    "opset": {},
}
"""The messages that a message contains, by field number, as far as they are of interest."""


class DecodingError(ValueError):
    """The bytes are not the messages of an ONNX file."""


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of one message, in their order.

    Raises:
        DecodingError: the bytes are not a protobuf message.
    """
    at, end = 0, len(message)
    while at < end:
        start = at
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        value: int | memoryview
        if tag >= 2**32:  # protobuf would drop the upper bits
            raise DecodingError(f"expected the number of a field, got {number}")
        if wire_type == _VARINT:
            value, at = _varint(message, at)
        else:
            if wire_type == _BYTES:
                size, at = _varint(message, at)
            elif wire_type in (_FIXED64, _FIXED32):
                size = 8 if wire_type == _FIXED64 else 4
            else:
                raise DecodingError(f"expected a protobuf wire type, got {wire_type}")
            if number == 0 or size > end - at:
                raise DecodingError("expected a complete protobuf message")
            value = message[at : at + size]
            at += size
        yield number, value, message[start:at]


def walk(data: memoryview, kind: str = "model", depth: int = 0) -> Iterator[tuple[str, memoryview]]:
    """Every message inside a message, with its kind, at any depth; the message itself comes first.

    Raises:
        DecodingError: the bytes are not such a message.
    """
    if depth > MAX_DEPTH:
        raise DecodingError(f"expected at most {MAX_DEPTH} messages inside each other")
    yield kind, data
    inner = _MESSAGES[kind]
    if inner:
        for number, value, _ in fields(data):
            if number in inner and not isinstance(value, int):
                yield from walk(value, inner[number], depth + 1)


def operators(model: bytes) -> set[tuple[str, str]]:
    """Domain and type of every operator of a model; the default domain is "".

    Raises:
        DecodingError: the bytes are no ONNX file.
    """
    found = set()
    for kind, message in walk(memoryview(model)):
        if kind == "node":
            names = {
                number: decode_string(value)
                for number, value, _ in fields(message)
                if number in (4, 7)
            }
            domain = names.get(7, "")
            found.add(("" if domain == "ai.onnx" else domain, names.get(4, "")))
    return found


def local_functions(model: bytes) -> set[tuple[str, str]]:
    """Domain and name of the functions that a model defines itself."""
    found = set()
    for number, function, _ in fields(memoryview(model)):
        if number == 25 and not isinstance(function, int):
            names = {
                place: decode_string(value)
                for place, value, _ in fields(function)
                if place in (1, 10)
            }
            found.add((names.get(10, ""), names.get(1, "")))
    return found


def external_data(tensor: memoryview) -> dict[str, str] | None:
    """The entries `location`, `offset` and `length` of a tensor in another file; None for others.

    Raises:
        DecodingError: the bytes are not a tensor.
    """
    entries: dict[str, str] = {}
    is_external = False
    for number, value, _ in fields(tensor):
        if number == _TENSOR_LOCATION:
            is_external = value != 0
        elif number == _TENSOR_EXTERNAL and not isinstance(value, int):
            pair = {place: decode_string(part) for place, part, _ in fields(value)}
            entries[pair.get(1, "")] = pair.get(2, "")
    return entries if is_external or entries else None


def embed_external_data(model: bytes, read: Callable[[dict[str, str]], bytes]) -> bytes:
    """Copy the data of tensors in other files into the model.

    Args:
        read: returns the bytes of a tensor's `external_data`.

    Returns:
        The model, unchanged if it refers to no other file.
    """
    return b"".join(_embedded(memoryview(model), "model", read))


def check_self_contained(model: bytes, where: str) -> None:
    """Reject a graph that refers to data outside of its file.

    Raises:
        ArtifactError: it does, or it is no ONNX file.
    """
    try:
        outside = [
            entries.get("location", "")
            for kind, message in walk(memoryview(model))
            if kind == "tensor" and (entries := external_data(message)) is not None
        ]
    except DecodingError as error:
        raise ArtifactError(f"{where}: expected an ONNX file, got other bytes: {error}") from error
    if outside:
        raise ArtifactError(
            f"{where}: expected a graph that contains its weights, got one that refers to the file "
            f"{outside[0]!r}; `carry import` packages both"
        )


def decode_string(value: int | memoryview) -> str:
    """Decode the UTF-8 string of a field."""
    if isinstance(value, int):
        raise DecodingError(f"expected a string, got the number {value}")
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:  # two names must not become one
        raise DecodingError(f"expected a string in UTF-8: {error}") from error


def _embedded(
    message: memoryview, kind: str, read: Callable[[dict[str, str]], bytes], depth: int = 0
) -> list[bytes | memoryview]:
    """The pieces of a message whose tensors contain their data."""
    if depth > MAX_DEPTH:
        raise DecodingError(f"expected at most {MAX_DEPTH} messages inside each other")
    if kind == "tensor":
        entries = external_data(message)
        if entries is None:
            return [message]
        own = (_TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION)
        kept = [whole for number, _, whole in fields(message) if number not in own]
        return [*kept, *encode_bytes(_TENSOR_RAW, [read(entries)])]
    inner = _MESSAGES[kind]
    pieces: list[bytes | memoryview] = []
    for number, value, whole in fields(message):
        if number in inner and not isinstance(value, int):
            changed = _embedded(value, inner[number], read, depth + 1)
            if changed[0] is not value:
                pieces += encode_bytes(number, changed)
                continue
        pieces.append(whole)
    return [message] if all(isinstance(piece, memoryview) for piece in pieces) else pieces


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A base-128 varint, and the place behind it."""
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise DecodingError("expected a complete protobuf varint")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
