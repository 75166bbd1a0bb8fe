"""Tensors of KServe's V2 protocol, as HTTP and gRPC carry them, and their binary format.

Numbers of a tensor are row-major and little-endian. An element of a `BYTES` tensor is its length as
a little-endian uint32 and then its bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from service.codec.decoding import decode_element, invalid
from service.codec.media import Media
from service.core.errors import InvalidInput

FP32: Final = "FP32"
BYTES: Final = "BYTES"
BOOL: Final = "BOOL"

_F4: Final = np.dtype("<f4")
_LENGTH: Final = struct.Struct("<I")

MAX_RANK: Final = 8

Shape = Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=MAX_RANK)]
"""The shape of an input, of HTTP and gRPC alike."""


class InputTensor(msgspec.Struct, frozen=True, gc=False):
    """An input of a request.

    Attributes:
        data: the binary format of all elements, or the elements: without the nesting of `shape`
            or, in JSON, with it; numbers, for `BYTES` strings or bytes, for `BOOL` booleans.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | Sequence[Any]


def float_values(tensor: InputTensor, at: str) -> NDArray[np.float64] | bytes:
    """The values of an FP32 tensor: numbers, or all of them in the binary format.

    Raises:
        InvalidInput: their number does not fit the shape.
    """
    data = tensor.data
    if isinstance(data, bytes):
        expected_bytes = _F4.itemsize * math.prod(tensor.shape)
        if len(data) != expected_bytes:
            expected = f"{expected_bytes} bytes for FP32 of shape {list(tensor.shape)}"
            raise invalid(f"{at}.data", expected, f"{len(data)} bytes")
        return data
    return np.array(_elements(tensor, float, at), np.float64)


def flags(tensor: InputTensor, at: str) -> list[bool]:
    """The values of a BOOL tensor; in the binary format each is a byte, 0 or 1.

    Raises:
        InvalidInput: their number does not fit the shape, or a byte is another.
    """
    data = tensor.data
    if not isinstance(data, bytes):
        return _elements(tensor, bool, at)
    if len(data) != math.prod(tensor.shape):
        raise _wrong_count(tensor, at, len(data))
    if data.strip(b"\0\1"):
        raise invalid(f"{at}.data", "bytes that are 0 or 1", "another byte")
    return list(map(bool, data))


def byte_elements(tensor: InputTensor, at: str) -> list[bytes]:
    """The elements of a BYTES tensor.

    Raises:
        InvalidInput: their number does not fit the shape, or the binary format is damaged.
    """
    data, count = tensor.data, math.prod(tensor.shape)
    if not isinstance(data, bytes):
        elements = _elements(tensor, str, at)
        return [each.encode() if isinstance(each, str) else each for each in elements]
    split: list[bytes] = []
    for element in _split_bytes(data, at):
        if len(split) == count:
            raise _wrong_count(tensor, at, "more")
        split.append(element)
    if len(split) != count:
        raise _wrong_count(tensor, at, len(split))
    return split


def _elements(tensor: InputTensor, kind: Any, at: str) -> list[Any]:
    """The elements of a tensor that has no binary format, without the nesting of its shape.

    Raises:
        InvalidInput: one has another type, or their number does not fit the shape.
    """
    values: Any = tensor.data
    if isinstance(values, list):
        values = _flatten(values, kind, tensor.shape, f"{at}.data")
    # values of a gRPC message have their type; they are counted before they are copied
    if len(values) != math.prod(tensor.shape):
        raise _wrong_count(tensor, at, len(values))
    return list(values)


def _flatten(values: Any, kind: Any, shape: Sequence[int], at: str) -> list[Any]:
    """The elements of lists of JSON, which are flat or nested as the shape is."""
    depth, inner = 0, values
    while isinstance(inner, list) and inner and depth < len(shape):
        depth, inner = depth + 1, inner[0]
    # each list is an object, and is copied when it is checked
    lists, max_lists = values, math.prod(shape[:-1])
    for _ in range(depth - 1):
        if len(lists) > max_lists:
            expected = f"at most {max_lists} lists of values for shape {list(shape)}"
            raise invalid(at, expected, len(lists))
        lists = [each for part in lists if isinstance(part, list) for each in part]
    for _ in range(max(depth, 1)):
        kind = list[kind]
    values = decode_element(Media.JSON, values, kind, at)
    for _ in range(depth - 1):
        values = list(chain.from_iterable(values))
    flat: list[Any] = values
    return flat


def _wrong_count(tensor: InputTensor, at: str, got: int | str) -> InvalidInput:
    expected = f"{math.prod(tensor.shape)} values for shape {list(tensor.shape)}"
    return invalid(f"{at}.data", expected, f"{got} values")


def _split_bytes(data: bytes, at: str) -> Iterator[bytes]:
    """The elements in the binary format."""
    end = 0
    while end < len(data):
        start = end + _LENGTH.size
        length = _LENGTH.unpack_from(data, end)[0] if start <= len(data) else 0
        end = start + length
        if end > len(data):
            expected = "for each element its length as uint32 and as many bytes"
            raise invalid(f"{at}.data", expected, f"{len(data)} bytes, which end in an element")
        yield data[start:end]
