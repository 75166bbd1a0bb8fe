"""Encoder of the protobuf messages of an ONNX graph.

It covers the messages and fields that Carry's graphs use, by onnx.proto of ONNX 1.18 and the
protobuf encoding: fields in the order of their numbers, each repeated value with its own tag. The
library `onnx` would write the same bytes (the tests compare them). It is not used, because the
service derives the graph of every model that it loads, even if only ONNX Runtime is installed,
and because the bytes must not depend on the version of a library.

`models.onnx.decoding` reads imported files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

_VARINT, _BYTES, _FLOAT32 = 0, 2, 5
"""Wire types of a field."""


class DataType(IntEnum):
    """Element types, TensorProto.DataType."""

    FLOAT = 1
    INT32 = 6
    INT64 = 7
    BOOL = 9
    DOUBLE = 11


class _AttributeType(IntEnum):
    """AttributeProto.AttributeType."""

    FLOAT = 1
    INT = 2
    STRING = 3
    GRAPH = 5
    FLOATS = 6
    INTS = 7
    STRINGS = 8


_DATA_TYPES = {
    "float32": DataType.FLOAT,
    "int32": DataType.INT32,
    "int64": DataType.INT64,
    "bool": DataType.BOOL,
    "float64": DataType.DOUBLE,
}


@dataclass(frozen=True, slots=True)
class Graph:
    """A serialised GraphProto, as the value of a node's attribute."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """A constant, TensorProto.

    Attributes:
        name: name of the value.
        dtype: NumPy's name of the element type.
        shape: dimensions.
        raw: the elements, little-endian, in row-major order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    def pieces(self) -> list[bytes]:
        """Encode the message, in pieces so that its elements are not copied."""
        head = b"".join(_integer(1, size) for size in self.shape)
        head += _integer(2, _DATA_TYPES[self.dtype])
        head += _text(8, self.name)
        return [head + _tag(9, _BYTES) + _varint(len(self.raw)), self.raw]


def node(
    operator: str, inputs: Iterable[str], outputs: Iterable[str], attributes: Mapping[str, Any]
) -> bytes:
    """Encode a NodeProto of the default domain, with attributes sorted by name."""
    return b"".join(
        (
            *(_text(1, name) for name in inputs),
            *(_text(2, name) for name in outputs),
            _text(4, operator),
            *(_bytes(5, _attribute(name, attributes[name])) for name in sorted(attributes)),
        )
    )


def tensor_value(name: str, dtype: DataType, shape: Iterable[str | int]) -> bytes:
    """Encode a ValueInfoProto of a tensor; a dynamic dimension is given by name."""
    dimensions = b"".join(
        _bytes(1, _text(2, size) if isinstance(size, str) else _integer(1, size)) for size in shape
    )
    tensor_type = _integer(1, dtype) + _bytes(2, dimensions)
    return _text(1, name) + _bytes(2, _bytes(1, tensor_type))


def graph(
    name: str,
    nodes: Iterable[bytes],
    inputs: Iterable[bytes],
    outputs: Iterable[bytes],
    constants: Sequence[Tensor] = (),
) -> list[bytes]:
    """Encode a GraphProto, in pieces."""
    pieces = [*(_bytes(1, each) for each in nodes), _text(2, name)]
    for constant in constants:
        parts = constant.pieces()
        pieces += [_tag(5, _BYTES) + _varint(sum(map(len, parts))), *parts]
    pieces += [_bytes(11, each) for each in inputs]
    pieces += [_bytes(12, each) for each in outputs]
    return pieces


def model(
    graph: Sequence[bytes],
    *,
    ir_version: int,
    producer: str,
    opset: int,
    metadata: Mapping[str, str],
) -> bytes:
    """Encode a ModelProto, which is an ONNX file."""
    return b"".join(
        (
            _integer(1, ir_version) + _text(2, producer),
            _tag(7, _BYTES) + _varint(sum(map(len, graph))),
            *graph,
            _bytes(8, _text(1, "") + _integer(2, opset)),
            *(_bytes(14, _text(1, key) + _text(2, value)) for key, value in metadata.items()),
        )
    )


def encode_bytes(field: int, pieces: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Encode a field of bytes or a message that is given in pieces, which are not copied."""
    return [_tag(field, _BYTES) + _varint(sum(map(len, pieces))), *pieces]


def _attribute(name: str, value: Any) -> bytes:
    head = _text(1, name)
    match value:
        case Graph():
            return head + _bytes(6, value.data) + _integer(20, _AttributeType.GRAPH)
        case float():
            return head + _float(2, value) + _integer(20, _AttributeType.FLOAT)
        case int():
            return head + _integer(3, value) + _integer(20, _AttributeType.INT)
        case str():
            return head + _text(4, value) + _integer(20, _AttributeType.STRING)
        case [float(), *_]:
            floats = b"".join(_float(7, each) for each in value)
            return head + floats + _integer(20, _AttributeType.FLOATS)
        case [int(), *_]:
            integers = b"".join(_integer(8, each) for each in value)
            return head + integers + _integer(20, _AttributeType.INTS)
        case [str(), *_]:
            strings = b"".join(_text(9, each) for each in value)
            return head + strings + _integer(20, _AttributeType.STRINGS)
    raise TypeError(f"attribute {name!r}: expected a number, string or graph, got {value!r}")


def _integer(field: int, value: int) -> bytes:
    """An int64 field."""
    return _tag(field, _VARINT) + _varint(value % 2**64)


def _float(field: int, value: float) -> bytes:
    return _tag(field, _FLOAT32) + struct.pack("<f", value)


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, _BYTES) + _varint(len(value)) + value


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Base-128 varint: seven bits a byte, lowest first; the top bit marks a continuation."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
