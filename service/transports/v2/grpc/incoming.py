"""Requests for inference as they are received: bytes, which are checked before they are parsed.

Parsing takes time and memory for each element. So of a long message (`LONG_BYTES`) first the fields
are counted, a few at a time, and one with more of them than a request may have is rejected. Only
its head, all but the tensors, is parsed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from service.access.caller import Caller
from service.codec.limits import LONG_BYTES
from service.codec.long_bodies.admission import Checkpoint
from service.core.errors import CarryError, MalformedBody
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.messages import decode_parameter, decode_request
from service.transports.v2.inference import Inference
from service.transports.v2.parameters import parse_sequence_id
from service.transports.v2.values import InferReply, invalid

SEQUENCE_ID: Final = "sequence_id"

MAX_FIELDS: Final = 1000
"""Most fields of a long message, besides the elements of its tensors."""

FIELDS_AT_ONCE: Final = 2000
"""Fields that are counted in one turn of the event loop, in less than a millisecond."""

_INPUTS: Final = pb.ModelInferRequest.INPUTS_FIELD_NUMBER
_RAW: Final = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_CONTENTS: Final = pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER
_VALUES: Final = (
    pb.InferTensorContents.BOOL_CONTENTS_FIELD_NUMBER,
    pb.InferTensorContents.FP32_CONTENTS_FIELD_NUMBER,
    pb.InferTensorContents.BYTES_CONTENTS_FIELD_NUMBER,
)

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
        most = inference.api.limits.max_predict_steps
        async with inference.api.long_bodies.admit(data, deadline_s) as checkpoint:
            await _check_fields(data, most, checkpoint)
            request = decode_request(parse(pb.ModelInferRequest, data))
            del data
            ready = await inference.read_long(caller, request, deadline_s, checkpoint)
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


async def _check_fields(data: bytes, most: int, checkpoint: Checkpoint) -> None:
    """Reject a long message with more fields, or longer ones, than a request may have.

    Args:
        most: most elements of a tensor, each of which may be a field.

    Raises:
        MalformedBody, InvalidInput
    """
    others = elements = 0
    for top in _fields(data, 0, len(data)):
        others += 1
        inside = _fields(data, top.start, top.end) if top.number == _INPUTS else ()
        for field in inside:
            others += 1
            if others > MAX_FIELDS:
                raise _too_many(MAX_FIELDS)
            if field.number != _CONTENTS:
                _check_length("inputs", field)
                continue
            for value in _fields(data, field.start, field.end):
                elements += 1
                if elements > most:
                    raise _too_many(most)
                if elements % FIELDS_AT_ONCE == 0:
                    await checkpoint()
                if value.number not in _VALUES:
                    _check_length("inputs.contents", value)


def _check_length(at: str, field: _Field) -> None:
    if field.end - field.start >= LONG_BYTES:
        expected = f"less than {LONG_BYTES} bytes in all fields but bool_, bytes_ and fp32_contents"
        raise invalid(at, expected, f"{field.end - field.start} bytes")


def _too_many(most: int) -> CarryError:
    return invalid("message", f"at most {most} fields", "more")


def _malformed(expected: str = pb.ModelInferRequest.DESCRIPTOR.full_name) -> MalformedBody:
    return MalformedBody(
        f"message: expected {expected}, got bytes that cannot be parsed as one",
        at="message",
        expected=expected,
        got="other bytes",
    )
