"""Requests of V2 over gRPC as they are received.

Messages in the form that clients usually send are read without protobuf, which costs ten times as
much; all others by protobuf.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, TypeVar

import msgspec
from google.protobuf.message import DecodeError, Message
from msgspec.structs import replace

from service.access.caller import PREDICT, Caller
from service.codec.decoding import decode_element, detach_error, invalid
from service.codec.media import Media
from service.core.errors import CarryError, MalformedBody
from service.core.memo import Memo
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.common.stream_order import PendingChunk
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.inference import Inference
from service.transports.v2.parameters import (
    InferParameters,
    Parameter,
    parse_parameters,
    parse_sequence_id,
)
from service.transports.v2.request import InferCall, InferRequest, RequestedOutput
from service.transports.v2.tensors import (
    BOOL,
    BYTES,
    FP32,
    MAX_RANK,
    InputTensor,
    Shape,
)

MAX_FIELDS: Final = 1000
"""Most fields of a long message, besides the elements of its tensors."""

MAX_SCANNED_BYTES: Final = 512
"""Most bytes of the parameters, tensors and outputs of a message that is not parsed by protobuf."""

CACHED_HEADS: Final = 4096
"""Most such fields that are cached with their values, since clients repeat them."""

_CONTENTS: Final = {FP32: "fp32_contents", BYTES: "bytes_contents", BOOL: "bool_contents"}
_INPUTS: Final = pb.ModelInferRequest.INPUTS_FIELD_NUMBER
_RAW: Final = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
LENGTH_DELIMITED: Final = 2
_POSITION: Final = b"\n\x08position\x12"
_INT64: Final = 2 << 3
_NAMES: Final = re.compile(rb"\n[\x01-\x40][a-z0-9_-]+(?:\x12[\x01-\x0c][0-9a-f]+)?").match
"""The fields of the name and the version of a model, if the lengths in it are theirs."""

_ID_TAG: Final = 3 << 3 | LENGTH_DELIMITED
_PARAMETERS_TAG: Final = 4 << 3 | LENGTH_DELIMITED
_TENSOR_TAGS: Final = (5 << 3 | LENGTH_DELIMITED, 6 << 3 | LENGTH_DELIMITED)
_RAW_TAG: Final = _RAW << 3 | LENGTH_DELIMITED
_NO_HEAD: Final = pb.ModelInferRequest()
_NO_REQUEST: Final = InferRequest("", ())

M = TypeVar("M", bound=Message)


class InferMessage(PendingChunk):
    """One received request: decoded at once, a long one when it is its turn.

    Its `stream` is model and stream; empty if it names no valid stream.

    Attributes:
        request: its value, without the tensors of a long one; the error of an invalid one.
        model, version, id: of the request, as far as they could be parsed.
        size: its length in bytes.
        is_long: whether its tensors are not decoded yet.
        shape: the bytes that determine its tensor and outputs; None if it was parsed by protobuf.
        is_dry_run: whether it changes nothing.
        outcome: its response in a stream of requests, once it may be sent.
    """

    __slots__ = (
        "_data",
        "id",
        "is_dry_run",
        "is_long",
        "model",
        "request",
        "shape",
        "size",
        "version",
    )

    def __init__(self, data: bytes):
        self.size = len(data)
        self.is_long = self.size >= LONG_BYTES
        self._data = data if self.is_long else None
        head = _NO_HEAD
        self.request: InferRequest | CarryError
        try:
            request, self.shape = (None, None) if self.is_long else scan_request(data)
            if request is None:
                head = parse(pb.ModelInferRequest, _head(data) if self.is_long else data)
                request = _decode_request(head, [] if self.is_long else _inputs(head))
            self.request = request
            self.model, self.version, self.id = request.model, request.version, request.id
            parameters = request.parameters
            stream, self.is_dry_run = parameters.stream, parameters.dry_run
            appends = parameters.position is None and not parameters.starts_over
        except CarryError as error:
            self.request, sent = detach_error(error), head.parameters
            self.model, self.version, self.id = head.model_name, head.model_version, head.id
            stream, appends = _stream_of(head), True
            self.is_dry_run = "dry_run" in sent and sent["dry_run"].bool_param
        super().__init__("" if stream is None else f"{self.model}/{stream}")
        self.appends = appends

    async def read(self, inference: Inference, caller: Caller, deadline_s: float) -> InferCall:
        """Read the request, whose bytes are dropped.

        Raises:
            CarryError
        """
        request, data = self.request, self._data
        self.drop()
        if isinstance(request, CarryError):
            raise request
        if data is None:
            return inference.read(caller, request, deadline_s)
        stream = request.parameters.stream
        inference.served(caller, PREDICT, request.model, request.version, stream)

        def read() -> InferCall:
            inputs = _inputs(parse(pb.ModelInferRequest, data))
            return inference.read(caller, replace(request, inputs=inputs), deadline_s)

        return await inference.api.long_bodies.read(self.size, deadline_s, read)

    def drop(self) -> None:
        """Drop what was received: the request is read, or answered."""
        self._data, self.request = None, _NO_REQUEST


def parse(kind: type[M], data: bytes) -> M:
    """The message in these bytes.

    Raises:
        MalformedBody
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise _malformed(kind.DESCRIPTOR.full_name) from error


def _head(data: bytes) -> bytes:
    """A long message without its tensors, of which each byte could become an object.

    Raises:
        MalformedBody, InvalidInput
    """
    parts, count = [], 0
    for number, begin, start, end in _fields(data, 0, len(data)):
        count += 1
        if number == _INPUTS:
            count += sum(1 for _ in islice(_fields(data, start, end), MAX_FIELDS))
        if count > MAX_FIELDS:
            raise invalid("message", f"at most {MAX_FIELDS} fields", "more")
        if number not in (_INPUTS, _RAW):
            parts.append(data[begin:end])
    head = b"".join(parts)
    if len(head) >= LONG_BYTES:
        expected = f"less than {LONG_BYTES} bytes besides the tensors"
        raise invalid("message", expected, f"{len(head)} bytes")
    return head


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message in the wire format: number, begin, and begin and end of the value.

    Raises:
        MalformedBody
    """
    while at < end:
        begin = at
        key, at = _varint(data, at)
        start = at
        match key & 7:
            case 0:
                _, at = _varint(data, at)
            case 1 | 5:
                at += 8 if key & 7 == 1 else 4
            case 2:
                length, start = _varint(data, at)
                at = start + length
            case _:
                raise _malformed()
        if at > end:
            raise _malformed()
        yield key >> 3, begin, start, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the place after it."""
    value = 0
    for shift, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise _malformed()


def _malformed(expected: str = pb.ModelInferRequest.DESCRIPTOR.full_name) -> MalformedBody:
    return MalformedBody(
        f"message: expected {expected}, got bytes that cannot be parsed as one",
        at="message",
        expected=expected,
        got="other bytes",
    )


def _decode_request(message: pb.ModelInferRequest, inputs: Sequence[InputTensor]) -> InferRequest:
    """The value of a message.

    Raises:
        InvalidInput, InvalidName
    """
    for index, output in enumerate(message.outputs):
        _reject_parameters(f"outputs[{index}]", output.parameters)
    parameters = {name: _parameter(name, value) for name, value in message.parameters.items()}
    return InferRequest(
        message.model_name,
        inputs,
        parse_parameters(parameters),
        tuple([RequestedOutput(output.name) for output in message.outputs]),
        message.model_version,
        message.id,
    )


def _inputs(message: pb.ModelInferRequest) -> list[InputTensor]:
    # before anything is made of each of them
    if not 1 <= len(message.inputs) <= 2:
        expected = "one tensor, optionally followed by reset"
        raise invalid("inputs", expected, len(message.inputs))
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        expected = f"one element for each of {len(message.inputs)} inputs, or none"
        raise invalid("raw_input_contents", expected, len(raw))
    tensors = []
    for index, tensor in enumerate(message.inputs):
        _reject_parameters(f"inputs[{index}]", tensor.parameters)
        # the rest is not copied: each of its bytes may be a number
        axes = list(tensor.shape[: MAX_RANK + 1])
        shape = decode_element(Media.JSON, axes, Shape, f"inputs[{index}].shape")
        if raw and tensor.HasField("contents"):
            expected = "none, since raw_input_contents has the values"
            raise invalid(f"inputs[{index}].contents", expected, "some")
        field = _CONTENTS.get(tensor.datatype)
        values = () if field is None else getattr(tensor.contents, field)
        # not a list: its length is checked before its values are copied
        data = raw[index] if raw else values
        tensors.append(InputTensor(tensor.name, tensor.datatype, shape, data))
    return tensors


class ScannedFields(msgspec.Struct, frozen=True, gc=False):
    """The fields of a message after its id, without the position and the values.

    Attributes:
        shape: the bytes that determine tensor and outputs.
        values_bytes: the length of the values.
    """

    parameters: InferParameters
    tensor: InputTensor
    outputs: tuple[RequestedOutput, ...]
    shape: bytes
    values_bytes: int


class RequestScanner:
    """Reads short messages as clients write them: the fields in order, and one tensor in the binary
    format at the end.

    The name of the model, and what follows the id without the position and the values, are the same
    bytes in many messages: they are parsed once.
    """

    def __init__(self) -> None:
        self._names = Memo(_parse_names, CACHED_HEADS)
        self._known: dict[tuple[int, bytes], ScannedFields] = {}
        self._values_bytes = 0

    def scan(self, data: bytes) -> tuple[InferRequest | None, bytes | None]:
        """The request in a message, and its shape; None for any other, which protobuf parses."""
        try:
            match = _NAMES(data)
            names = b"" if match is None else match[0]
            model, version = self._names[names]
            at, identity = len(names), b""
            if data[at] == _ID_TAG:
                at, begin = at + 2 + data[at + 1], at + 2
                if data[begin - 1] >= 0x80:
                    return None, None
                identity = data[begin:at]
            # most messages have as many values as the last one
            start = len(data) - self._values_bytes
            begin, end = _find_position(data, at, start)
            key = begin - at, data[at:begin] + data[end:start]
            fields = self._known.get(key)
            if fields is None or fields.values_bytes != len(data) - start:
                begin, end, start, fields = _scan_fields(data, at)
                self._values_bytes = fields.values_bytes
                if len(self._known) >= CACHED_HEADS:
                    self._known.clear()
                self._known[begin - at, data[at:begin] + data[end:start]] = fields
            parameters = fields.parameters
            if begin < end:
                parameters = _with_position(parameters, data[begin + len(_POSITION) + 2 : end])
            request_id = identity.decode()
        except (CarryError, IndexError, UnicodeDecodeError):
            return None, None
        tensor = fields.tensor
        inputs = (InputTensor(tensor.name, tensor.datatype, tensor.shape, data[start:]),)
        outputs = fields.outputs
        request = InferRequest(model, inputs, parameters, outputs, version, request_id)
        return request, fields.shape


def _parse_names(data: bytes) -> tuple[str, str]:
    """The name and the version of the model.

    Raises:
        MalformedBody: the lengths in these bytes are not theirs.
    """
    message = parse(pb.ModelInferRequest, data)
    model, version = message.model_name, message.model_version
    if pb.ModelInferRequest(model_name=model, model_version=version).SerializeToString() != data:
        raise _malformed()
    return model, version


def _find_position(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Begin and end of what may be the position among the parameters, or the end twice."""
    found = data.find(_POSITION, at + 2, end)
    if found < 0 or data[found - 2] != _PARAMETERS_TAG:
        return end, end
    return found - 2, found + data[found - 1]


def _scan_fields(data: bytes, at: int) -> tuple[int, int, int, ScannedFields]:
    """The fields after the id: begin and end of the position, begin of the values, and the rest.

    Raises:
        CarryError, IndexError: protobuf parses them.
    """
    first = at
    position = None
    while data[at] == _PARAMETERS_TAG and data[at + 1] < 0x80:
        end = at + 2 + data[at + 1]
        if data.startswith(_POSITION, at + 2):
            position = at, end
        at = end
    middle = at
    while data[at] in _TENSOR_TAGS and data[at + 1] < 0x80:
        at += 2 + data[at + 1]
    length, start = _varint(data, at + 1)
    is_last = data[at] == _RAW_TAG and start + length == len(data)
    if not is_last or at - first > MAX_SCANNED_BYTES:
        raise _malformed()
    begin, end = position or (start, start)
    tensors = _SCANNED_TENSORS[data[middle:at]]
    parameters = _SCANNED[data[first : min(begin, middle)] + data[end:middle]].parameters
    fields = ScannedFields(parameters, tensors.inputs[0], tensors.outputs, data[middle:at], length)
    return begin, end, start, fields


def _with_position(options: InferParameters, value: bytes) -> InferParameters:
    """The parameters with a position, the value of whose field is an integer.

    Raises:
        MalformedBody: protobuf parses it.
    """
    position, end = _varint(value, 2)
    is_number = value[0] == end - 1 and value[1] == _INT64 and end == len(value)
    if not is_number or position >= 2**63 or options.stream is None or options.starts_over:
        raise _malformed()
    return replace(options, position=position)


def _parse_scanned(fields: bytes) -> InferRequest:
    """The value of some fields of a message.

    Raises:
        MalformedBody, InvalidInput, InvalidName
    """
    return _decode_request(parse(pb.ModelInferRequest, fields), ())


def _parse_scanned_tensors(fields: bytes) -> InferRequest:
    """The value of the fields of one tensor in the binary format, and of the outputs.

    Raises:
        MalformedBody, InvalidInput
    """
    message = parse(pb.ModelInferRequest, fields)
    message.raw_input_contents.append(b"")
    return _decode_request(message, _inputs(message))


_SCANNED: Final = Memo(_parse_scanned, CACHED_HEADS)
_SCANNED_TENSORS: Final = Memo(_parse_scanned_tensors, CACHED_HEADS)
scan_request: Final = RequestScanner().scan


def _parameter(name: str, value: pb.InferParameter) -> Parameter:
    """The value of a parameter.

    Raises:
        InvalidInput: it has none.
    """
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise invalid(f"parameters.{name[:100]}", "a value", "none")
    parameter: Parameter = getattr(value, kind)
    return parameter


def _stream_of(head: pb.ModelInferRequest) -> str | None:
    """The stream of a message that is invalid; None if it names no valid one."""
    name = "sequence_id"
    try:
        if name in head.parameters:
            return parse_sequence_id(_parameter(name, head.parameters[name]))
    except CarryError:
        pass
    return None


def _reject_parameters(at: str, parameters: Mapping[str, pb.InferParameter]) -> None:
    """Reject parameters of a tensor: Carry has neither shared memory nor classification."""
    for name in parameters:
        raise invalid(f"{at}.parameters", "none", repr(name[:100]))
