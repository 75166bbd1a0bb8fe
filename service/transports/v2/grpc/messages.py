"""Messages of V2 over gRPC: requests as they are received, and replies.

Messages in the form that clients usually send are read and written without protobuf, which costs
ten times as much; all others by protobuf.
"""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message
from msgspec.structs import replace

from service.access.caller import PREDICT, Caller
from service.codec.decoding import decode_element, detach_error, invalid
from service.codec.media import Media, dumps
from service.core.errors import CarryError, MalformedBody
from service.core.memo import Memo
from service.core.values import Reply
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.common.stream_order import PendingChunk
from service.transports.v1.problems import problem
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.status import status_details
from service.transports.v2.inference import (
    VERSION,
    InferCall,
    Inference,
    InferReply,
    constant_output,
    reply_to_chunk,
)
from service.transports.v2.request import (
    InferParameters,
    InferRequest,
    Parameter,
    RequestedOutput,
    Signature,
    parse_parameters,
    parse_sequence_id,
)
from service.transports.v2.tensors import (
    BOOL,
    BYTES,
    FP32,
    MAX_RANK,
    InputTensor,
    Shape,
    binary_values,
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
_LENGTH_DELIMITED: Final = 2
_POSITION: Final = b"\n\x08position\x12"
_INT64: Final = 2 << 3
_PARAMETERS_TAG: Final = 4 << 3 | _LENGTH_DELIMITED
_TENSOR_TAGS: Final = (5 << 3 | _LENGTH_DELIMITED, 6 << 3 | _LENGTH_DELIMITED)
_RAW_TAG: Final = _RAW << 3 | _LENGTH_DELIMITED
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


def scan_request(data: bytes) -> tuple[InferRequest | None, bytes | None]:
    """The request in a short message as clients write it, and its shape: the fields in order, and
    one tensor in the binary format at the end. None for any other, which protobuf parses.

    Parameters and tensors are parsed by protobuf once for the same bytes.
    """
    try:
        at, strings = 0, [b"", b"", b""]
        for field in range(3):  # name and version of the model, and the id
            if data[at] == (field + 1) << 3 | _LENGTH_DELIMITED:
                end = at + 2 + data[at + 1]
                if data[at + 1] >= 0x80:
                    return None, None
                strings[field], at = data[at + 2 : end], end
        begin = position_at = position_end = at
        while data[at] == _PARAMETERS_TAG and data[at + 1] < 0x80:
            end = at + 2 + data[at + 1]
            if data.startswith(_POSITION, at + 2):
                position_at, position_end = at, end
            at = end
        middle = at
        while data[at] in _TENSOR_TAGS and data[at + 1] < 0x80:
            at += 2 + data[at + 1]
        length, start = _varint(data, at + 1)
        is_last = data[at] == _RAW_TAG and start + length == len(data)
        if not is_last or at - begin > MAX_SCANNED_BYTES:
            return None, None
        shape = data[middle:at]
        # a position differs from request to request, and is no part of what is cached
        others = data[begin:position_at] + data[position_end:middle]
        options, tensors = _SCANNED[others].parameters, _SCANNED_TENSORS[shape]
        if position_at < position_end:
            options = _with_position(options, data[position_at + len(_POSITION) + 2 : position_end])
        model, version, identity = [each.decode() for each in strings]
    except (CarryError, IndexError, UnicodeDecodeError):
        return None, None
    tensor = tensors.inputs[0]
    inputs = (InputTensor(tensor.name, tensor.datatype, tensor.shape, data[start:]),)
    return InferRequest(model, inputs, options, tensors.outputs, version, identity), shape


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


def encode_reply(reply: InferReply, message: pb.ModelInferResponse) -> pb.ModelInferResponse:
    """Write a reply into an empty message, its tensors in the binary format."""
    message.model_name, message.model_version, message.id = reply.model, reply.version, reply.id
    for output in reply.outputs:
        message.outputs.add(name=output.name, datatype=output.datatype, shape=output.values.shape)
        message.raw_output_contents.append(output.data)
    for name, value in reply.parameters.items():
        parameter = message.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            parameter.int64_param = value
        else:
            parameter.string_param = str(value)
    return message


class ReplyEncoder:
    """Encodes replies to chunks; what is the same in each reply of a signature is cached."""

    def __init__(self) -> None:
        self._constants = Memo(_constant_fields, CACHED_HEADS)

    def encode(self, call: InferCall, reply: Reply, *, in_stream: bool) -> bytes:
        """The bytes of the response to a chunk; of a stream of requests with `in_stream`."""
        constants = self._constants[call.signature]
        if constants is None or reply.output_position is not None:
            response = encode_reply(reply_to_chunk(call, reply), pb.ModelInferResponse())
            data = response.SerializeToString()
        else:
            before, after, values_head = constants
            head, position = reply.head, _encode_varint(reply.head.position)
            data = b'%b%b"%c\n\x08position\x12%c\x10%b%b%b%b%b%b%b%b%b%b' % (
                before,
                _field(3, call.id.encode()) if call.id else b"",
                len(position) + 13,
                len(position) + 1,
                position,
                b'"\x1b\n\x05epoch\x12\x12\x1a\x10',
                hexlify(head.epoch),
                b'"\x29\n\x03tag\x12\x22\x1a\x20',
                hexlify(head.tag),
                _REPLAYED if reply.replayed else _NOT_REPLAYED,
                b'"\x0d\n\x07created\x12\x02\x08\x01' if reply.created else b"",
                after,
                values_head,
                binary_values(reply.outputs),
            )
        return b"\x12%b%b" % (_encode_varint(len(data)), data) if in_stream else data


_REPLAYED: Final = b'"\x0e\n\x08replayed\x12\x02\x08\x01'
_NOT_REPLAYED: Final = b'"\x0e\n\x08replayed\x12\x02\x08\x00'


def _constant_fields(signature: Signature) -> tuple[bytes, bytes, bytes] | None:
    """The fields of a response before and after its parameters, and the head of its values, if it
    has one output, with the same shape in every reply."""
    output = constant_output(signature)
    if output is None:
        return None
    names = pb.ModelInferResponse(model_name=signature.codec.served.name, model_version=VERSION)
    tensor = pb.ModelInferResponse()
    tensor.outputs.add(name=output.name, datatype=output.datatype, shape=output.values.shape)
    values_head = b"\x32" + _encode_varint(output.values.nbytes)
    return names.SerializeToString(), tensor.SerializeToString(), values_head


def _field(number: int, value: bytes) -> bytes:
    return b"%c%b%b" % (number << 3 | _LENGTH_DELIMITED, _encode_varint(len(value)), value)


def _encode_varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def error_response(error: CarryError, message: InferMessage) -> pb.ModelStreamInferResponse:
    """The response to a request of a stream that failed; the stream continues."""
    response = pb.ModelInferResponse(
        model_name=message.model, model_version=message.version, id=message.id
    )
    response.parameters["carry_error"].string_param = error.code
    document = dumps(Media.JSON, problem(error))
    response.parameters["carry_problem"].string_param = document.decode()
    return pb.ModelStreamInferResponse(error_message=status_details(error), infer_response=response)
