"""Requests for inference as they are received: bytes, which are checked before they are parsed.

A long message (`LONG_BYTES`) is parsed when it is its turn. Its head, all but the tensors, is
parsed at once, and one with more fields than a request may have is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from service.access.caller import Caller
from service.codec.decoding import invalid
from service.core.errors import CarryError, MalformedBody
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.messages import decode_parameter, decode_request
from service.transports.v2.inference import Inference, ReadRequest
from service.transports.v2.parameters import parse_sequence_id
from service.transports.v2.values import InferReply

SEQUENCE_ID: Final = "sequence_id"

MAX_FIELDS: Final = 1000
"""Most fields of a long message, besides those within its tensors."""

_INPUTS: Final = pb.ModelInferRequest.INPUTS_FIELD_NUMBER
_RAW: Final = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER

M = TypeVar("M", bound=Message)


class InferMessage:
    """One received request; its bytes are dropped once they are decoded.

    Attributes:
        head: the message; if it is long, without its tensors.
        size: its length in bytes.

    Raises:
        MalformedBody, InvalidInput
    """

    __slots__ = ("_data", "head", "size")

    def __init__(self, data: bytes):
        self.size = len(data)
        self._data = data if self.size >= LONG_BYTES else None
        self.head = parse(pb.ModelInferRequest, data if self._data is None else _head(data))

    def sequence(self) -> str | None:
        """Model and stream; None if it names no valid stream."""
        if SEQUENCE_ID not in self.head.parameters:
            return None
        try:
            parameter = decode_parameter(SEQUENCE_ID, self.head.parameters[SEQUENCE_ID])
            stream = parse_sequence_id(parameter)
        except CarryError:
            return None
        return None if stream is None else f"{self.head.model_name}/{stream}"

    async def infer(self, inference: Inference, caller: Caller, deadline_s: float) -> InferReply:
        """Answer the request, once.

        Raises:
            CarryError
        """
        data, self._data = self._data, None
        if data is None:
            return await inference.infer(caller, decode_request(self.head), deadline_s)

        def read() -> ReadRequest:
            request = decode_request(parse(pb.ModelInferRequest, data))
            return inference.read(caller, request, deadline_s)

        ready = await inference.api.long_bodies.read(self.size, deadline_s, read)
        return await inference.answer(caller, ready)


def parse(kind: type[M], data: bytes) -> M:
    """The message in these bytes.

    Raises:
        MalformedBody
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise _malformed(kind.DESCRIPTOR.full_name) from error


class _Field(NamedTuple):
    """A field in the wire format: where it begins, and where its value begins and ends."""

    number: int
    begin: int
    start: int
    end: int


def _fields(data: bytes, at: int, end: int) -> Iterator[_Field]:
    """The fields of the message between two places.

    Raises:
        MalformedBody
    """
    while at < end:
        begin = at
        key, at = _varint(data, at)
        wire_type = key & 7
        if wire_type == 2:
            length, at = _varint(data, at)
        elif wire_type == 0:
            length = _varint(data, at)[1] - at
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise _malformed()
        if at + length > end:
            raise _malformed()
        yield _Field(key >> 3, begin, at, at + length)
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the place after it."""
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    value = shift = 0
    for byte in data[at : at + 10]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _malformed()


def _head(data: bytes) -> bytes:
    """A long message without its tensors.

    Raises:
        MalformedBody, InvalidInput
    """
    parts = []
    for count, field in enumerate(_fields(data, 0, len(data)), start=1):
        if count > MAX_FIELDS:
            raise _too_many(MAX_FIELDS)
        if field.number not in (_INPUTS, _RAW):
            parts.append(data[field.begin : field.end])
    head = b"".join(parts)
    if len(head) >= LONG_BYTES:
        expected = f"less than {LONG_BYTES} bytes besides the tensors"
        raise invalid("message", expected, f"{len(head)} bytes")
    return head


def _too_many(most: int) -> CarryError:
    return invalid("message", f"at most {most} fields", "more")


def _malformed(expected: str = pb.ModelInferRequest.DESCRIPTOR.full_name) -> MalformedBody:
    return MalformedBody(
        f"message: expected {expected}, got bytes that cannot be parsed as one",
        at="message",
        expected=expected,
        got="other bytes",
    )
