"""Values of KServe's V2 inference protocol, as HTTP and gRPC carry them, and its binary format.

Numbers of a tensor are row-major and little-endian. An element of a `BYTES` tensor is its length as
a little-endian uint32 and then its bytes.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.core.errors import InvalidInput
from service.transports.v2.json_errors import json_error

Parameter = bool | int | float | str
"""The value of a request's or a reply's parameter."""

FP32: Final = "FP32"
BYTES: Final = "BYTES"
BOOL: Final = "BOOL"

_DATATYPES: Final = {
    "float32": FP32,
    "float16": "FP16",
    "float64": "FP64",
    "bool": BOOL,
    **{
        f"{kind}{bits}": f"{kind}{bits}".upper()
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
}
"""By the name of NumPy's type."""

_F4: Final = np.dtype("<f4")
_LENGTH: Final = struct.Struct("<I")
_OPENING: Final = re.compile(rb"[ \t\r\n]*\[")

MAX_RANK: Final = 8


class JsonElements:
    """The elements of a tensor as a list in JSON, flat or nested.

    They are decoded once the tensor is known to have no more of them than a request may have.
    """

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes):
        self._raw = raw

    def __len__(self) -> int:
        """The number of elements, if they are numbers and no list inside is empty."""
        return self._raw.count(b",") + 1

    def decode(self, kind: type, at: str) -> list[Any]:
        """The elements.

        Raises:
            InvalidInput
        """
        raw = self._raw
        depth = _depth(raw)
        try:
            values: list[Any] = _nested_decoder(kind, min(depth, MAX_RANK)).decode(raw)
        except msgspec.ValidationError as error:
            raise json_error(error, f"{at}.data") from error
        except (msgspec.MsgspecError, ValueError) as error:
            # numbers out of range, and strings that are not UTF-8, are first detected here
            raise invalid(f"{at}.data", "a list of values of its datatype", str(error)) from error
        for _ in range(depth - 1):
            values = list(chain.from_iterable(values))
        return values


class InputTensor(NamedTuple):
    """An input of a request.

    Attributes:
        data: the binary format of all elements, or the elements: in JSON, or without the nesting
            of `shape`, numbers, for `BYTES` bytes or for `BOOL` booleans.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    data: bytes | memoryview | JsonElements | Sequence[Any]


class OutputTensor(NamedTuple):
    """An output of a reply: values of any shape, in C order."""

    name: str
    values: NDArray[Any]

    @property
    def datatype(self) -> str:
        """The datatype of the values."""
        return _DATATYPES[self.values.dtype.name]

    @property
    def data(self) -> bytes:
        """The binary format."""
        return self.values.astype(self.values.dtype.newbyteorder("<"), copy=False).tobytes()


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
    length = len(data)
    # too many numbers are rejected before objects are made of them
    if isinstance(data, JsonElements) and length <= 2 * count + 1:
        data = data.decode(float, at)
        length = len(data)
    if length != count:
        expected = f"{count} values for shape {list(tensor.shape)}"
        raise invalid(f"{at}.data", expected, f"{length} values")
    with np.errstate(over="ignore"):
        # a number that overflows becomes infinite, which the model's reader rejects
        return np.array(data, np.float64).astype(_F4).tobytes()


def flags(tensor: InputTensor, at: str) -> list[bool]:
    """The values of a BOOL tensor; in the binary format each is a byte, 0 or 1.

    Raises:
        InvalidInput: their number does not fit the shape, or a byte is another.
    """
    count, data = math.prod(tensor.shape), tensor.data
    length = len(data)
    # too many are rejected before objects are made of them
    if isinstance(data, JsonElements) and length <= 2 * count + 1:
        data = data.decode(bool, at)
        length = len(data)
    if length != count or isinstance(data, JsonElements):
        expected = f"{count} values for shape {list(tensor.shape)}"
        raise invalid(f"{at}.data", expected, f"{length} values")
    if isinstance(data, bytes | memoryview) and bytes(data).strip(b"\0\1"):
        raise invalid(f"{at}.data", "bytes that are 0 or 1", "another byte")
    return list(map(bool, data))


def iter_byte_elements(tensor: InputTensor, at: str) -> Iterator[bytes]:
    """The elements of a BYTES tensor, one by one.

    Raises:
        InvalidInput: their number does not fit the shape, or the binary format is damaged.
    """
    data, count = tensor.data, math.prod(tensor.shape)
    if isinstance(data, JsonElements):
        data = data.decode(str, at)
    got: int | str
    if isinstance(data, bytes | memoryview):
        got = 0
        for element in _split_bytes(bytes(data), at):
            if got == count:
                got = "more"
                break
            got += 1
            yield element
    else:
        got = len(data)
        if got == count:
            for each in data:
                yield each.encode() if isinstance(each, str) else bytes(each)
    if got != count:
        expected = f"{count} elements for shape {list(tensor.shape)}"
        raise invalid(f"{at}.data", expected, f"{got} elements")


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


def _depth(raw: bytes) -> int:
    """How deep the first element of a list in JSON is nested; 1 for another value."""
    at = depth = 0
    while (match := _OPENING.match(raw, at)) is not None and depth <= MAX_RANK:
        at, depth = match.end(), depth + 1
    return max(depth, 1)


@cache
def _nested_decoder(element: type, depth: int) -> msgspec.json.Decoder[Any]:
    """Decodes lists of one depth."""
    kind: Any = element
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)
