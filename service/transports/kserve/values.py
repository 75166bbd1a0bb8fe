"""Values of KServe's V2 inference protocol, as HTTP and gRPC carry them, and its binary format.

Numbers of a tensor are row-major and little-endian. An element of a `BYTES` tensor is its length as
a little-endian uint32 and then its bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.core.errors import InvalidInput

Parameter = bool | int | float | str
"""The value of a request's or a reply's parameter."""

FP32: Final = "FP32"
BYTES: Final = "BYTES"

_F4: Final = np.dtype("<f4")
_LENGTH: Final = struct.Struct("<I")


class InputTensor(NamedTuple):
    """An input of a request.

    Attributes:
        data: the binary format of all elements, or the elements, without the nesting of `shape`:
            numbers, or for `BYTES` texts or bytes.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    data: bytes | memoryview | Sequence[Any]


class OutputTensor(NamedTuple):
    """An output of a reply: float32 values of any shape, in C order."""

    name: str
    values: NDArray[np.float32]

    @property
    def data(self) -> bytes:
        """The binary format."""
        return self.values.astype(_F4, copy=False).tobytes()


class InferRequest(NamedTuple):
    """A request of the V2 protocol.

    Attributes:
        version: the model's version; empty for the one that is served.
        id: returned in the reply.
        outputs: names of the outputs to return; empty for all.
    """

    model: str
    inputs: Sequence[InputTensor]
    parameters: Mapping[str, Parameter] = {}
    outputs: Sequence[str] = ()
    version: str = ""
    id: str = ""


class InferReply(NamedTuple):
    """A reply of the V2 protocol."""

    model: str
    version: str
    id: str
    parameters: Mapping[str, Parameter]
    outputs: Sequence[OutputTensor]


def invalid(at: str, expected: object, got: object) -> InvalidInput:
    """The error for a part of a request that does not fit."""
    return InvalidInput(
        f"{at}: expected {expected}, got {got}", at=at, expected=expected, got=str(got)
    )


def float32_bytes(tensor: InputTensor, at: str) -> bytes:
    """The values of an FP32 tensor in the binary format.

    Raises:
        InvalidInput: their number does not fit the shape.
    """
    count = math.prod(tensor.shape)
    data = tensor.data
    if isinstance(data, bytes | memoryview):
        if len(data) != _F4.itemsize * count:
            expected = f"{_F4.itemsize * count} bytes for FP32 of shape {list(tensor.shape)}"
            raise invalid(f"{at}.data", expected, f"{len(data)} bytes")
        return bytes(data)
    if len(data) != count:
        expected = f"{count} values for shape {list(tensor.shape)}"
        raise invalid(f"{at}.data", expected, f"{len(data)} values")
    with np.errstate(over="ignore"):
        # a number that overflows becomes infinite, which the model's reader rejects
        return np.array(data, np.float64).astype(_F4).tobytes()


def byte_elements(tensor: InputTensor, at: str) -> list[bytes]:
    """The elements of a BYTES tensor.

    Raises:
        InvalidInput: their number does not fit the shape, or the binary format is damaged.
    """
    data, count = tensor.data, math.prod(tensor.shape)
    is_binary = isinstance(data, bytes | memoryview)
    elements = _split_bytes(bytes(data), count, at) if is_binary else data
    if len(elements) != count:
        expected = f"{count} elements for shape {list(tensor.shape)}"
        got = "more" if is_binary and len(elements) > count else len(elements)
        raise invalid(f"{at}.data", expected, f"{got} elements")
    return [each.encode() if isinstance(each, str) else bytes(each) for each in elements]


def _split_bytes(data: bytes, count: int, at: str) -> list[bytes]:
    """The first elements in the binary format, up to one more than `count`."""
    elements: list[bytes] = []
    end = 0
    while end < len(data) and len(elements) <= count:
        start = end + _LENGTH.size
        length = _LENGTH.unpack_from(data, end)[0] if start <= len(data) else 0
        end = start + length
        if end > len(data):
            expected = "for each element its length as uint32 and as many bytes"
            raise invalid(f"{at}.data", expected, f"{len(data)} bytes, which end in an element")
        elements.append(data[start:end])
    return elements
